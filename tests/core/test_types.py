"""The values of a conversion against naive loops over numpy float64."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from upcycle.core.types import (
    DenseFFN,
    ExpertLayout,
    Geometry,
    LayerActivations,
    LossGradient,
    MoELayer,
    all_finite,
)

D, F, T = 24, 40, 11


def make_ffn(seed, num_neurons=F):
    rng = torch.Generator().manual_seed(seed)
    gate_FD, up_FD = torch.randn(2, num_neurons, D, generator=rng) / D**0.5
    return DenseFFN(
        gate_FD, up_FD, torch.randn(D, num_neurons, generator=rng), torch.nn.functional.silu
    )


def make_inputs(tokens=T, seed=9):
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def naive_hidden(ffn, x_D):
    """Neuron by neuron, for one token."""
    gate_FD, up_FD = ffn.gate_FD.double().numpy(), ffn.up_FD.double().numpy()
    hidden = []
    for gate_D, up_D in zip(gate_FD, up_FD, strict=True):
        before = float(gate_D @ x_D)
        hidden.append(before / (1 + math.exp(-before)) * float(up_D @ x_D))
    return np.array(hidden)


def naive_ffn(ffn, x_D):
    """The sum of what every neuron adds."""
    down_DF = ffn.down_DF.double().numpy()
    hidden_F = naive_hidden(ffn, x_D)
    return sum(hidden_F[i] * down_DF[:, i] for i in range(len(hidden_F)))


def by_token(function, x_TD):
    return torch.from_numpy(np.stack([function(x_D) for x_D in x_TD.double().numpy()])).float()


def test_hidden_is_activated_gate_times_up():
    ffn, x_TD = make_ffn(0), make_inputs()
    expected_TF = by_token(lambda x_D: naive_hidden(ffn, x_D), x_TD)
    torch.testing.assert_close(ffn.hidden(x_TD), expected_TF)


def test_call_sums_the_neurons():
    ffn, x_TD = make_ffn(0), make_inputs()
    torch.testing.assert_close(ffn(x_TD), by_token(lambda x_D: naive_ffn(ffn, x_D), x_TD))


def test_sizes_come_from_the_weights():
    assert (make_ffn(0).num_neurons, make_ffn(0).hidden_size) == (F, D)


def test_take_keeps_neurons_in_the_order_asked():
    ffn, x_TD = make_ffn(0), make_inputs()
    taken = ffn.take(torch.tensor([30, 2, 17]))
    for place, neuron in enumerate([30, 2, 17]):
        assert torch.equal(taken.gate_FD[place], ffn.gate_FD[neuron])
        assert torch.equal(taken.up_FD[place], ffn.up_FD[neuron])
        assert torch.equal(taken.down_DF[:, place], ffn.down_DF[:, neuron])
    torch.testing.assert_close(taken.hidden(x_TD), ffn.hidden(x_TD)[:, [30, 2, 17]])


def test_complementary_parts_add_up_to_the_whole():
    ffn, x_TD = make_ffn(0), make_inputs()
    shuffled = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    parts = ffn.take(shuffled[:13])(x_TD) + ffn.take(shuffled[13:])(x_TD)
    torch.testing.assert_close(parts, ffn(x_TD))


def test_to_converts_every_matrix_and_leaves_the_original():
    ffn = make_ffn(0)
    half = ffn.to("cpu", torch.bfloat16)
    assert {m.dtype for m in (half.gate_FD, half.up_FD, half.down_DF)} == {torch.bfloat16}
    assert ffn.gate_FD.dtype == torch.float32
    assert half.act is ffn.act


@pytest.mark.parametrize("chunk_elements", [1, 3 * F, 2**24])
def test_chunks_cover_the_tokens_in_order(monkeypatch, chunk_elements):
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", chunk_elements)
    activations = LayerActivations(make_ffn(0), make_inputs())
    chunks = list(activations.chunks())
    assert all(len(x_tD) == len(h_tF) for x_tD, h_tF in chunks)
    assert torch.equal(torch.cat([x_tD for x_tD, _ in chunks]), activations.x_TD)
    h_TF = torch.cat([h_tF for _, h_tF in chunks])
    torch.testing.assert_close(h_TF, activations.ffn.hidden(activations.x_TD))


def test_chunks_stay_below_the_limit(monkeypatch):
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 3 * F + 1)
    sizes = [len(x_tD) for x_tD, _ in LayerActivations(make_ffn(0), make_inputs()).chunks()]
    assert sizes == [3, 3, 3, 2]


@pytest.mark.parametrize("tokens", [1, 2, 4, 10, 11, 99])
def test_sample_is_evenly_spread_and_not_too_long(tokens):
    activations = LayerActivations(make_ffn(0), torch.arange(float(T))[:, None].expand(T, D))
    places = activations.sample(tokens).x_TD[:, 0].tolist()
    assert 1 <= len(places) <= tokens
    assert len(places) >= min(tokens, T) / 2
    gaps = {b - a for a, b in pairwise(places)}
    assert len(gaps) <= 1


def test_sample_of_enough_tokens_is_all_of_them():
    activations = LayerActivations(make_ffn(0), make_inputs())
    assert torch.equal(activations.sample(T).x_TD, activations.x_TD)


def test_activations_of_some_neurons_keep_the_inputs():
    activations = LayerActivations(make_ffn(0), make_inputs())
    some = activations.take(torch.tensor([5, 1]))
    assert some.x_TD is activations.x_TD
    ((_, h_tF),) = some.chunks()
    torch.testing.assert_close(h_tF, activations.ffn.hidden(activations.x_TD)[:, [5, 1]])


GAIN = 3.0


def weigh(top_k, *, average):
    """Of the experts with the largest logits: their softmax, or GAIN times each one's sigmoid."""

    def count(logits_TE):
        top_TK = logits_TE.topk(top_k)
        counts_TK = top_TK.values.softmax(-1) if average else GAIN * top_TK.values.sigmoid()
        return torch.zeros_like(logits_TE).scatter(-1, top_TK.indices, counts_TK)

    return count


def naive_counts(router_ED, x_D, top_k, *, average):
    """The same for one token, by expert."""
    scores = [float(row_D @ x_D) for row_D in router_ED.double().numpy()]
    chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
    total = sum(math.exp(scores[e]) for e in chosen)
    return {
        e: math.exp(scores[e]) / total if average else GAIN / (1 + math.exp(-scores[e]))
        for e in chosen
    }


def naive_moe(router_ED, experts, shared, x_D, top_k, *, average):
    y_D = naive_ffn(shared, x_D) if shared else np.zeros(D)
    for e, count in naive_counts(router_ED, x_D, top_k, average=average).items():
        y_D = y_D + count * naive_ffn(experts[e], x_D)
    return y_D


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_reference_forward_is_the_loop_over_tokens_and_experts(top_k, with_shared, average):
    experts = [make_ffn(seed, num_neurons=8) for seed in range(5)]
    shared = make_ffn(7, num_neurons=16) if with_shared else None
    router_ED, x_TD = make_inputs(5, seed=3), make_inputs()
    moe = MoELayer(router_ED, experts.__getitem__, shared)
    expected_TD = by_token(
        lambda x_D: naive_moe(router_ED, experts, shared, x_D, top_k, average=average), x_TD
    )
    torch.testing.assert_close(moe(x_TD, weigh(top_k, average=average)), expected_TD)


def test_all_experts_of_a_partition_sum_to_the_dense_ffn():
    ffn, x_TD = make_ffn(0), make_inputs()
    layout = ExpertLayout(torch.arange(8, F).view(4, 8).flip(0), torch.arange(8))
    moe = MoELayer(
        make_inputs(4, seed=3), lambda e: ffn.take(layout.experts_EM[e]), ffn.take(layout.shared_S)
    )
    torch.testing.assert_close(moe(x_TD, torch.ones_like), ffn(x_TD))


def test_average_of_copies_is_the_dense_ffn():
    ffn, x_TD = make_ffn(0), make_inputs()
    moe = MoELayer(make_inputs(4, seed=3), lambda e: ffn, None)
    torch.testing.assert_close(moe(x_TD, weigh(2, average=True)), ffn(x_TD))


def test_permutation_lists_shared_neurons_first_then_expert_by_expert():
    layout = ExpertLayout(torch.tensor([[5, 0], [3, 1]]), torch.tensor([2, 4]))
    assert layout.permutation.tolist() == [2, 4, 5, 0, 3, 1]


OVERLAPPING = ExpertLayout(torch.tensor([[5, 0], [3, 0], [5, 3]]), torch.tensor([2, 4]))
"""Of eight neurons; 1, 6 and 7 are in no expert."""


def test_multiplicity_is_how_many_experts_hold_a_neuron():
    assert OVERLAPPING.multiplicity.tolist() == [2, 0, 1, 2, 1, 2, 0, 0]


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_selection_counts_a_neuron_as_all_experts_that_hold_it(top_k, average):
    router_ED, x_TD = make_inputs(3, seed=3), make_inputs()
    count_TF = OVERLAPPING.selection(router_ED, weigh(top_k, average=average))(x_TD)
    for count_F, x_D in zip(count_TF, x_TD.double().numpy(), strict=True):
        counts = naive_counts(router_ED, x_D, top_k, average=average)
        expected = [
            sum(count for e, count in counts.items() if i in OVERLAPPING.experts_EM[e])
            + (i in OVERLAPPING.shared_S)
            for i in range(8)
        ]
        assert count_F.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_selection_counts_a_neuron_once_for_each_expert_that_counts_one(top_k):
    router_ED, x_TD = make_inputs(3, seed=3), make_inputs()
    alike = weigh(top_k, average=False)
    selection = OVERLAPPING.selection(router_ED, lambda logits_TE: (alike(logits_TE) > 0).float())
    for on_F, x_D in zip(selection(x_TD), x_TD, strict=True):
        chosen = sorted(range(3), key=lambda e: -float(router_ED[e] @ x_D))[:top_k]
        held = [2, 4] + [i for e in chosen for i in OVERLAPPING.experts_EM[e].tolist()]
        assert on_F.tolist() == [held.count(i) for i in range(8)]


@pytest.mark.parametrize(
    ("geometry", "copies", "shared", "active"),
    [
        (Geometry(64, 8, 2, 8), 8, 0, 0.25),
        (Geometry(64, 14, 6, 4, shared_size=8), 14, 0.125, 0.5),
        (Geometry(64, 6, 1, 8, shared_size=16), 6, 0.25, 0.375),
        (Geometry(64, 8, 1, 24), 8, 0, 0.375),
        (Geometry(64, 8, 2, 64), 8, 0, 2.0),
        (Geometry(64, 32, 8, 8, granularity=8), 4, 0, 1.0),
        (Geometry(64, 32, 16, 8, granularity=8), 4, 0, 2.0),
    ],
    ids=[
        *("split", "S2A6E16", "a quarter shared", "pruned copies", "copies"),
        *("one whole copy in shards", "two whole copies in shards"),
    ],
)
def test_geometry_of_64_neurons(geometry, copies, shared, active):
    assert geometry.copies == copies
    assert geometry.shared_ratio == shared
    assert geometry.active_ratio == active


HELD = {"held": 2**28, "just held": T * F, "parts held": T * F - 1, "not held": 0}
PARTS = {
    "whole": lambda activations: activations,
    "some": lambda activations: activations.take(torch.tensor([30, 2, 17])),
    "some of some": lambda activations: activations.take(torch.tensor([30, 2, 17, 8, 39])).take(
        torch.tensor([4, 1])
    ),
    "a sample of some": lambda activations: activations.take(torch.tensor([30, 2])).sample(5),
}
NEURONS = {"whole": range(F), "some": [30, 2, 17], "some of some": [39, 2]}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("held", HELD)
def test_chunks_are_the_same_whether_activations_are_held_or_not(monkeypatch, held, part):
    def chunks(limit):
        monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", limit)
        return list(PARTS[part](LayerActivations(make_ffn(0), make_inputs())).chunks())

    for (x_tD, h_tF), (other_tD, other_tF) in zip(chunks(HELD[held]), chunks(0), strict=True):
        assert torch.equal(x_tD, other_tD)
        torch.testing.assert_close(h_tF, other_tF)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("held", HELD)
def test_chunks_of_any_size_cover_the_tokens_of_a_part(monkeypatch, held, part):
    monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", HELD[held])
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 3 * F)
    activations = PARTS[part](LayerActivations(make_ffn(0), make_inputs()))
    place_T = torch.arange(len(activations.x_TD))
    chunks = activations.chunks(place_T, -place_T)
    x_TD, h_TF, *beside = (torch.cat(each) for each in zip(*chunks, strict=True))
    assert torch.equal(x_TD, activations.x_TD)
    torch.testing.assert_close(h_TF, activations.ffn.hidden(x_TD))
    assert torch.equal(torch.stack(beside), torch.stack([place_T, -place_T]))


@pytest.mark.parametrize(("held", "runs"), [("held", 1), ("just held", 1), ("not held", 4)])
def test_what_is_held_is_worked_out_once(monkeypatch, held, runs):
    """Two passes over the whole, and one over each of two parts."""
    monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", HELD[held])
    calls, ffn = [], make_ffn(0)
    act = lambda gate_TF: calls.append(len(gate_TF)) or ffn.act(gate_TF)  # noqa: E731
    counted = DenseFFN(ffn.gate_FD, ffn.up_FD, ffn.down_DF, act)
    activations = LayerActivations(counted, make_inputs())
    parts = [activations.take(torch.arange(20)), activations.take(torch.arange(20, F))]
    for each in (activations, activations, *parts):
        list(each.chunks())
    assert calls == [T] * runs


@pytest.mark.parametrize("part", NEURONS)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("chunk_elements", [3 * F, 2**24])
def test_output_is_the_ffns_token_by_token(monkeypatch, held, part, chunk_elements):
    monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", HELD[held])
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", chunk_elements)
    ffn, x_TD = make_ffn(0), make_inputs()
    down_DF = ffn.down_DF.double().numpy()
    hidden = [naive_hidden(ffn, x_D) for x_D in x_TD.double().numpy()]
    expected = np.array([sum(h[i] * down_DF[:, i] for i in NEURONS[part]) for h in hidden])
    y_TD = PARTS[part](LayerActivations(ffn, x_TD)).output()
    torch.testing.assert_close(y_TD, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part", NEURONS)
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("chunk_elements", [3 * F, 2**24])
def test_energy_is_the_sum_over_tokens_of_what_a_neuron_adds(
    monkeypatch, held, part, chunk_elements
):
    monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", HELD[held])
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", chunk_elements)
    ffn, x_TD = make_ffn(0), make_inputs()
    down_DF = ffn.down_DF.double().numpy()
    hidden = [naive_hidden(ffn, x_D) for x_D in x_TD.double().numpy()]
    expected = [sum(np.sum((h[i] * down_DF[:, i]) ** 2) for h in hidden) for i in NEURONS[part]]
    energy_F = PARTS[part](LayerActivations(ffn, x_TD)).energy()
    torch.testing.assert_close(energy_F, torch.tensor(expected, dtype=torch.float32))


def make_differentiated(ffn):
    """Activations with the gradient of a loss of the FFN's output, the sum of y³; and by autograd,
    h ∂loss/∂h [T, F]."""
    x_TD = make_inputs()
    h_TF = ffn.hidden(x_TD).requires_grad_()
    y_TD = h_TF @ ffn.down_DF.T
    gradients = torch.autograd.grad((y_TD**3).sum(), [y_TD, h_TF])
    loss = LossGradient(gradients[0], torch.arange(T) // 5)
    return LayerActivations(ffn, x_TD, loss=loss), (h_TF * gradients[1]).detach()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("held", HELD)
def test_effects_are_h_times_autograds_gradient(monkeypatch, held, gated):
    monkeypatch.setattr("upcycle.core.types.HELD_ELEMENTS", HELD[held])
    monkeypatch.setattr("upcycle.core.types.CHUNK_ELEMENTS", 3 * F)
    ffn = make_ffn(0) if gated else replace(make_ffn(0), gate_FD=None)
    activations, expected_TF = make_differentiated(ffn)
    for part in PARTS:
        some = PARTS[part](activations)
        _, effects, places = zip(*some.effects(some.gradient.text_T), strict=True)
        stride = -(-T // 5) if "sample" in part else 1
        columns = list(NEURONS.get(part, [30, 2]))
        expected = expected_TF[::stride, columns]
        torch.testing.assert_close(torch.cat(effects), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(torch.cat(places), (torch.arange(T) // 5)[::stride])


def test_without_a_backward_pass_there_are_no_effects():
    activations = LayerActivations(make_ffn(0), make_inputs())
    with pytest.raises(ValueError, match="needs_gradients"):
        next(activations.effects())
    assert activations.take(torch.tensor([1])).loss is activations.sample(3).loss is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 2, 15, 33, 70000])
def test_one_bad_value_anywhere_is_found(dtype, length):
    tensor = torch.randn(length).to(dtype)
    tensor[0] = torch.finfo(dtype).max
    assert all_finite(tensor)
    for place in {0, length // 2, length - 1}:
        for value in (math.nan, math.inf, -math.inf):
            spoilt = tensor.clone()
            spoilt[place] = value
            assert not all_finite(spoilt)


def test_an_empty_tensor_is_finite():
    assert all_finite(torch.empty(0, 3))
