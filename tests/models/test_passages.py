"""Prompts and windows through a model: as transformers reads each of them alone."""

import pytest
import torch
from reference import load
from tiny import make_tokenizer
from torch.nn.functional import cosine_similarity, cross_entropy

import upcycle.models.stream
from upcycle.conversion.design import bind
from upcycle.conversion.gating import Gating
from upcycle.core.errors import UpcycleError
from upcycle.core.passages import Passage
from upcycle.core.settings import Choice
from upcycle.models.opening import open_source
from upcycle.models.passages import (
    Grouped,
    losses_of_models,
    next_token_losses,
    prompt_passage,
    text_passages,
)
from upcycle.models.stream import HiddenStream
from upcycle.models.tokens import open_reader
from upcycle.router_init.gates import GATES

BOS = 256
CPU = torch.device("cpu")
PROMPTS = [
    (0, False, "stir until smooth"),
    (1, False, "a"),
    (0, False, "oven"),
    (1, False, "check the rook, and then take the pawn that is left"),
    (1, True, "stir"),
    (0, False, "größer"),
]


def tokens(text):
    """A token per byte, with the beginning-of-sequence token in front."""
    return [BOS, *make_tokenizer()(text)["input_ids"]]


def passages_of(folder):
    source = open_source(str(folder))
    reader = open_reader(source.folder, source.config.vocab_size)
    return [prompt_passage(reader, text, e, negative=n) for e, n, text in PROMPTS]


@torch.no_grad()
def layer_rows(folder, name):
    """Each layer's rows by the gate of this name, from a stream."""
    source, grouped = open_source(str(folder)), Grouped(passages_of(folder))
    outer = source.read(source.outer_names())
    stream = HiddenStream(source.config, outer, grouped.groups, CPU)
    embed_VD = outer["model.embed_tokens.weight"]
    gating = Gating(bind(GATES, Choice(name=name)), 2, grouped, embed_VD)
    found = []
    for layer in range(source.arch.num_layers):
        entering_TD = stream.entering()
        x_TD, _ = stream.attend(layer, source.read_layer(layer))
        stream.advance(layer)
        found.append(gating.rows(entering_TD, x_TD, torch.Generator()).rows_ED)
    return found


@torch.no_grad()
def naive_rows(folder, summary):
    """The same with one prompt after the other through transformers' model: `summary` makes a
    vector of a prompt's token ids and what enters each layer."""
    model, found = load(folder), []
    vectors = {}
    for expert, negative, text in PROMPTS:
        ids = torch.tensor([tokens(text)])
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        vectors.setdefault((expert, negative), []).append(summary(model, ids[0], states[:-1]))
    for layer in range(len(model.model.layers)):
        mean = {key: torch.stack([v[layer] for v in each]).mean(0) for key, each in vectors.items()}
        rows = [mean[e, False] - mean.get((e, True), 0) for e in range(2)]
        found.append(torch.stack([row / row.norm() for row in rows]))
    return found


def last(model, ids, states):
    return [state[0, -1] for state in states]


def average(model, ids, states):
    return [state[0].mean(0) for state in states]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "olmo2"])
@pytest.mark.parametrize(("name", "summary"), [("hidden", last), ("hidden_avg", average)])
def test_rows_are_what_each_prompt_alone_gives_in_transformers(dense, family, name, summary):
    for ours_ED, naive_ED in zip(
        layer_rows(dense(family), name), naive_rows(dense(family), summary), strict=True
    ):
        assert cosine_similarity(ours_ED, naive_ED).min() > 0.9999
        torch.testing.assert_close(ours_ED.norm(dim=1), torch.ones(2))


def test_cheap_embed_is_the_same_in_every_layer(dense):
    embed_VD = load(dense()).model.embed_tokens.weight.detach()
    sums = {}
    for expert, negative, text in PROMPTS:
        ids = torch.tensor(tokens(text))
        sums[expert, negative] = sums.get((expert, negative), 0) + embed_VD[ids].sum(0)
    unit = {key: total / total.norm() for key, total in sums.items()}
    expected = [unit[0, False], unit[1, False] - unit[1, True]]
    for rows_ED in layer_rows(dense(), "cheap_embed"):
        torch.testing.assert_close(rows_ED, torch.stack([row / row.norm() for row in expected]))


def test_a_prompt_is_the_text_of_bos_and_the_prompt(dense):
    first, *_, last_one = passages_of(dense())
    assert first.ids_L.tolist() == tokens("stir until smooth")
    assert (first.expert, first.negative, first.front) == (0, False, 1)
    assert last_one.ids_L.tolist() == tokens("größer")


def test_without_bos_an_empty_prompt_is_refused(dense):
    source = open_source(str(dense()))
    reader = open_reader(source.folder, source.config.vocab_size)
    assert prompt_passage(reader, "", 0).ids_L.tolist() == [BOS]
    reader.tokenizer.bos_token = None
    assert prompt_passage(reader, "ab", 0).ids_L.tolist() == tokens("ab")[1:]
    assert prompt_passage(reader, "ab", 0).front == 0
    with pytest.raises(UpcycleError, match="the prompt '' of expert 3 makes no tokens"):
        prompt_passage(reader, "", 3)


def test_windows_of_a_text_are_an_experts(dense, text):
    source = open_source(str(dense()))
    reader = open_reader(source.folder, source.config.vocab_size)
    found = text_passages(reader, str(text), 4, windows=3, length=32, seed=0)
    expected_BL = reader.windows(str(text), 3, 32, seed=0)
    assert [passage.ids_L.tolist() for passage in found] == expected_BL.tolist()
    assert {(p.expert, p.negative, p.front) for p in found} == {(4, False, len(reader.front))}


def test_grouping_and_back_keeps_every_token_with_its_passage():
    lengths = [4, 2, 9, 2, 4, 1]
    passages = [Passage(torch.arange(n) + 100 * i, i) for i, n in enumerate(lengths)]
    grouped = Grouped(passages)
    assert [tuple(group_BL.shape) for group_BL in grouped.groups] == [
        (1, 1),
        (2, 2),
        (2, 4),
        (1, 9),
    ]
    flat_T = torch.cat([group_BL.flatten() for group_BL in grouped.groups])
    for passage, ids_L in zip(passages, grouped.ungroup(flat_T), strict=True):
        assert torch.equal(passage.ids_L, ids_L)


@pytest.mark.parametrize("at_once", [7, 512])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_losses_are_transformers_on_each_passage_alone(dense, family, at_once, monkeypatch):
    for module in (upcycle.models.stream, upcycle.models.passages):
        monkeypatch.setattr(module, "PREDICTED_TOKENS", at_once)
    model, passages = load(dense(family)), passages_of(dense(family))
    losses = next_token_losses(open_source(str(dense(family))), Grouped(passages), CPU)
    for passage, loss_l in zip(passages, losses, strict=True):
        with torch.no_grad():
            logits_LV = model(input_ids=passage.ids_L[None], use_cache=False).logits[0]
        expected_l = cross_entropy(logits_LV[:-1], passage.ids_L[1:], reduction="none")
        torch.testing.assert_close(loss_l, expected_l, rtol=1e-4, atol=1e-4)


def test_losses_of_models_have_a_column_each():
    one, other = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])], [torch.ones(2), torch.ones(1)]
    first_lE, second_lE = losses_of_models([one, other])
    assert first_lE.tolist() == [[1, 1], [2, 1]]
    assert second_lE.tolist() == [[3, 1]]
