"""Every gate against its formula in loops, or numpy's and scipy's on the same tokens."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from tiny import normal

from upcycle.conversion.design import bind
from upcycle.core.errors import UpcycleError
from upcycle.core.passages import Passage
from upcycle.core.settings import Choice
from upcycle.router_init.gates import GATES
from upcycle.router_init.gates.base import GateRows, LayerTexts
from upcycle.router_init.gates.domain import project
from upcycle.router_init.gates.perplexity import sequence_weights

D, E = 12, 3
OWNERS = [(0, False), (1, False), (0, False), (2, False), (1, True), (2, False), (1, False)]
LENGTHS = [9, 21, 6, 17, 8, 40, 5]
FRONT = 1
FITTED = ["text", "loss", "perplexity", "domain"]


def make_texts(owners=OWNERS, lengths=LENGTHS, noise=1.0, num_experts=E):
    """Passages of unlike length whose inputs lie around their expert's topic, or of a negative one,
    another's, after a token in front that is far away."""
    passages, states = [], {"embedded": [], "entering": [], "inputs": [], "losses": []}
    for place, ((expert, negative), length) in enumerate(zip(owners, lengths, strict=True)):
        ids_L = torch.full((length,), place)
        passages.append(Passage(ids_L, expert, negative, front=FRONT))
        for kind, field in enumerate(("embedded", "entering", "inputs")):
            x_LD = (
                noise * normal(length, D, seed=10 * place + kind)
                + 2 * torch.eye(D)[(expert + negative) % E]
            )
            x_LD[:FRONT] = 50.0
            states[field].append(x_LD)
        losses_lE = 3 + normal(length - 1, num_experts, seed=10 * place + 9).abs()
        losses_lE[:, expert] -= 1.5
        states["losses"].append(losses_lE)
    return LayerTexts(num_experts, passages, **states)


def run(name, texts, **params):
    bound = bind(GATES, Choice(name=name, **params))
    return bound.run(texts, bound.params, torch.Generator())


def rows(name, texts, **params):
    return run(name, texts, **params).rows_ED


def unit(vector):
    return vector / np.linalg.norm(vector)


def contrast(texts, vector):
    """Rows in loops: mean of positives minus mean of negatives, at unit length."""
    found = []
    for expert in range(E):
        sums = {False: [], True: []}
        for place, passage in enumerate(texts.passages):
            if passage.expert == expert:
                sums[passage.negative].append(vector(place))
        row = np.mean(sums[False], axis=0)
        if sums[True]:
            row = row - np.mean(sums[True], axis=0)
        found.append(unit(row))
    return torch.from_numpy(np.stack(found)).float()


@pytest.mark.parametrize("name", ["hidden", "hidden_last"])
def test_hidden_is_the_last_tokens_state_positive_minus_negative(name):
    texts = make_texts()
    expected_ED = contrast(texts, lambda place: texts.entering[place][-1].double().numpy())
    torch.testing.assert_close(rows(name, texts), expected_ED)


def test_hidden_avg_is_the_mean_over_a_prompts_own_tokens():
    texts = make_texts()
    expected_ED = contrast(texts, lambda place: texts.entering[place].double().numpy().mean(0))
    torch.testing.assert_close(rows("hidden_avg", texts), expected_ED)


def test_cheap_embed_is_the_direction_of_all_embeddings_minus_that_of_the_negatives():
    texts = make_texts()
    sums = {(e, n): np.zeros(D) for e in range(E) for n in (False, True)}
    for passage, embedded_LD in zip(texts.passages, texts.embedded, strict=True):
        sums[passage.expert, passage.negative] += embedded_LD.double().numpy().sum(0)
    expected = [unit(sums[e, False]) for e in range(E)]
    expected[1] = unit(expected[1] - unit(sums[1, True]))
    torch.testing.assert_close(
        rows("cheap_embed", texts), torch.from_numpy(np.stack(expected)).float()
    )


def counted_passages(texts, like, before=None):
    """How many passages are the same expert's."""
    owner = (like.expert, like.negative)
    return sum((p.expert, p.negative) == owner for p in texts.passages[:before])


def samples(texts, name):
    """Tokens x, each expert's share of them, what they count, and whether rows are fitted on them
    before they are tried on the others; all token by token."""
    counts = {}
    for passage in texts.passages:
        key = (passage.expert, passage.negative)
        counts[key] = counts.get(key, 0) + len(passage.ids_L) - FRONT
    found = []
    for place, passage in enumerate(texts.passages):
        last = len(passage.ids_L) - (0 if name == "text" else 1)
        losses = texts.losses[place].double().numpy()
        places = counted_passages(texts, passage, before=place)
        for at in range(FRONT, last):
            share, counted = np.eye(E)[passage.expert], 1.0
            if name == "text":
                if passage.negative:
                    share = (1 - share) / (E - 1)
                counted = 1 / counts[passage.expert, passage.negative]
            elif name == "loss":
                share = softmax(-losses[at])
            else:
                inverse = 1 / np.exp(losses[FRONT:].mean(0))
                best = sorted(range(E), key=lambda e: -inverse[e])[:2]
                share = np.zeros(E)
                share[best] = softmax(inverse[best])
            if counted_passages(texts, passage) == 1:
                first = at - FRONT < (last - FRONT + 1) // 2
            else:
                first = places % 2 == 0
            x = texts.inputs[place][at].double().numpy()
            found.append((x, share, counted, first))
    return tuple(np.stack([sample[i] for sample in found]) for i in range(4))


def weighted_ridge(x, share, counted, strength):
    xx = x.T @ (counted[:, None] * x)
    penalty = strength * np.trace(xx) / D
    return np.linalg.solve(xx + penalty * np.eye(D), x.T @ (counted[:, None] * (share - 1 / E))).T


@pytest.mark.parametrize("name", ["text", "loss", "perplexity"])
@pytest.mark.parametrize("strength", [0.1, 3.0])
def test_fitted_rows_are_numpys_ridge_as_long_as_fits_the_other_passages_best(name, strength):
    texts = make_texts()
    x, share, counted, first = samples(texts, name)
    ridge_ED = weighted_ridge(x, share, counted, strength)
    tried_ED = weighted_ridge(x[first], share[first], counted[first], strength)
    logits = x[~first] @ tried_ED.T

    def cross_entropy(log_factor):
        fit = (share[~first] * log_softmax(np.exp(log_factor) * logits, axis=1)).sum(1)
        return -(counted[~first] * fit).sum()

    best = minimize_scalar(cross_entropy, bounds=(0, np.log(30)), options={"xatol": 1e-6})
    expected_ED = torch.from_numpy(ridge_ED * np.exp(best.x)).float()
    assert name == "perplexity" or best.x > 0.3
    torch.testing.assert_close(
        rows(name, texts, strength=strength), expected_ED, rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("name", ["text", "loss", "domain"])
def test_fitted_rows_send_new_tokens_to_their_topics_expert(name):
    rows_ED = rows(name, make_texts(noise=0.5))
    for expert in range(E):
        x_TD = 0.5 * normal(100, D, seed=99) + 2 * torch.eye(D)[expert]
        logits_TE = x_TD @ rows_ED.T
        assert (logits_TE.argmax(1) == expert).float().mean() > 0.95
        assert logits_TE.softmax(1)[:, expert].mean() > (0.5 if name == "loss" else 0.7)


@pytest.mark.parametrize("name", FITTED)
def test_what_stands_before_a_text_counts_nothing(name):
    texts, other = make_texts(), make_texts()
    for field in ("embedded", "inputs"):
        for x_LD in getattr(other, field):
            x_LD[:FRONT] = -7.0
    for losses_lE in other.losses:
        losses_lE[:FRONT] = 9.0
    assert torch.equal(rows(name, texts), rows(name, other))


def test_an_experts_text_counts_the_same_however_long():
    once = make_texts(
        [(0, False), (0, False), (1, False), (1, False)], [30, 9, 31, 12], num_experts=2
    )
    places = [0, 1, *[2, 3] * 9]
    often = LayerTexts(
        2, [once.passages[i] for i in places], inputs=[once.inputs[i] for i in places]
    )
    torch.testing.assert_close(rows("text", often), rows("text", once), rtol=1e-3, atol=1e-5)


def test_mergemes_weights_by_hand():
    """Perplexities 2, 4 and 10: the softmax of 0.5 and 0.25, and nothing."""
    weight_E = sequence_weights(torch.tensor([4.0, 2.0, 10.0]).log(), 2)
    expected = np.exp([0.25, 0.5])
    expected_E = torch.tensor([*expected / expected.sum(), 0.0]).float()
    torch.testing.assert_close(weight_E, expected_E)


def test_domains_rows_are_those_of_text_projected_from_the_mean_embeddings():
    texts = make_texts()
    made = run("domain", texts)
    torch.testing.assert_close(made.rows_ED, rows("text", texts), rtol=1e-4, atol=1e-5)
    for expert in range(E):
        tokens = [
            embedded_D.double().numpy()
            for passage, embedded_LD in zip(texts.passages, texts.embedded, strict=True)
            if (passage.expert, passage.negative) == (expert, False)
            for embedded_D in embedded_LD[FRONT:]
        ]
        domain_V = made.beside["domains"][expert]
        torch.testing.assert_close(domain_V, torch.from_numpy(np.mean(tokens, axis=0)).float())
        torch.testing.assert_close(project(made.beside, domain_V[None])[0], made.rows_ED[expert])


def test_a_later_domain_between_two_gets_the_row_between_theirs():
    made = run("domain", make_texts())
    between_1V = made.beside["domains"][:2].mean(0, keepdim=True)
    torch.testing.assert_close(
        project(made.beside, between_1V), made.rows_ED[:2].mean(0, keepdim=True)
    )


@pytest.mark.parametrize("name", sorted(set(GATES) - {"loss", "perplexity"}))
def test_an_expert_without_passages_is_named(name):
    with pytest.raises(UpcycleError, match="expert 2 has neither prompts nor text"):
        run(name, make_texts(OWNERS[:3], LENGTHS[:3]))


@pytest.mark.parametrize("name", ["text", "domain"])
def test_an_expert_whose_prompts_are_empty_is_named(name):
    with pytest.raises(UpcycleError, match="expert 1's prompts hold no text"):
        run(name, make_texts([(0, False), (1, False), (2, False)], [9, FRONT, 9]))


@pytest.mark.parametrize("name", ["text", "domain"])
def test_one_token_per_expert_makes_rows(name):
    rows_ED = rows(name, make_texts([(0, False), (1, False), (2, False)], [FRONT + 1] * 3))
    assert rows_ED.isfinite().all()


@pytest.mark.parametrize("name", GATES)
def test_every_gate_reads_what_it_says_and_makes_float32_rows(name):
    whole = make_texts()
    fields = {field: getattr(whole, field) for field in GATES[name].reads}
    rows_ED = rows(name, LayerTexts(E, whole.passages, **fields))
    assert rows_ED.shape == (E, D)
    assert rows_ED.dtype == torch.float32
    assert torch.equal(rows_ED, rows(name, whole))


def added(name, texts, before, **params):
    bound = bind(GATES, Choice(name=name, **params))
    return bound.method.add_row(texts, before, bound.params)


@pytest.mark.parametrize("name", ["hidden", "hidden_avg", "hidden_last", "cheap_embed"])
def test_the_row_of_a_later_expert_is_what_it_would_have_been_from_the_start(name):
    texts = make_texts()
    all_ED = rows(name, texts)
    places = [i for i, passage in enumerate(texts.passages) if passage.expert == E - 1]
    fields = {name: [getattr(texts, name)[i] for i in places] for name in ("entering", "embedded")}
    own = LayerTexts(E, [texts.passages[i] for i in places], **fields)
    found = added(name, own, GateRows(all_ED[:-1]))
    torch.testing.assert_close(found.rows_ED, all_ED[-1:])


@pytest.mark.parametrize("name", ["text", "loss", "perplexity"])
def test_a_later_experts_fitted_row_takes_from_the_others_what_its_text_gives_it(name):
    """The ridge's row, as long as fits the other passages best beside rows that stay."""
    texts, before_ED = make_texts(), normal(E - 1, D, seed=77) * 0.3
    x, share, counted, first = samples(texts, name)
    row = weighted_ridge(x, share, counted, 0.1)[-1]
    tried = weighted_ridge(x[first], share[first], counted[first], 0.1)[-1]
    others = x[~first] @ before_ED.double().numpy().T

    def cross_entropy(log_factor):
        logit = np.exp(log_factor) * (x[~first] @ tried)
        own = log_softmax(np.column_stack([others, logit]), axis=1)[:, -1]
        rest = np.log1p(-np.exp(own))
        fit = share[~first, -1] * own + (1 - share[~first, -1]) * rest
        return -(counted[~first] * fit).sum()

    best = minimize_scalar(cross_entropy, bounds=(0, np.log(30)), options={"xatol": 1e-6})
    expected_1D = torch.from_numpy(row * np.exp(best.x)).float()[None]
    found = added(name, texts, GateRows(before_ED), strength=0.1)
    assert name == "perplexity" or best.x > 0.3
    torch.testing.assert_close(found.rows_ED, expected_1D, rtol=2e-3, atol=1e-4)


def test_a_later_experts_text_may_stand_against_text_that_is_no_ones():
    owners = [(0, False), (1, False), (0, False), (1, False)]
    old_ED = rows("text", make_texts(owners, [40] * 4, noise=0.5, num_experts=2))
    later = make_texts([(2, False), (2, True), (2, False), (2, True)], [40] * 4, noise=0.5)
    row_1D = added("text", later, GateRows(old_ED)).rows_ED
    x_TD = 0.5 * normal(100, D, seed=99) + 2 * torch.eye(D)[2]
    logits_TE = x_TD @ torch.cat([old_ED, row_1D]).T
    assert (logits_TE.argmax(1) == 2).float().mean() > 0.95


def test_a_later_domains_row_is_what_the_kept_projector_makes_of_it():
    texts = make_texts()
    made = run("domain", texts)
    own = LayerTexts(E + 1, [Passage(torch.zeros(4), E, front=FRONT)], [normal(4, D, seed=5)])
    found = added("domain", own, made)
    new_D = own.embedded[0][FRONT:].mean(0)
    expected = (new_D - made.beside["centre"]) @ made.beside["projector"]
    torch.testing.assert_close(found.rows_ED, expected[None])
    assert torch.equal(found.beside["projector"], made.beside["projector"])
    assert torch.equal(found.beside["domains"][:-1], made.beside["domains"])
    torch.testing.assert_close(found.beside["domains"][-1], new_D)
