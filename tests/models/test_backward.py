"""The way back through the stream is autograd's on the whole model."""

import pytest
import torch
from reference import down_of, ffn_blocks, ffn_of, gap, load
from tiny import FAMILIES, HEADS
from torch.nn.functional import cross_entropy
from transformers.activations import ACT2FN

import upcycle.models.stream
from upcycle.core.types import LayerActivations, LossGradient
from upcycle.models.assemble import dense_ffn
from upcycle.models.opening import open_source
from upcycle.models.stream import HiddenStream

TOKENS_BL = torch.randint(0, 256, (7, 40), generator=torch.Generator().manual_seed(3))
TOLERANCE = 1e-4
VARIANTS = {
    **{family: (family, {}) for family in FAMILIES if family not in HEADS},
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma, untied": ("gemma", {"tie_word_embeddings": False}),
    "another activation": ("llama", {"hidden_act": "gelu"}),
}


@pytest.fixture(params=VARIANTS)
def folder(request, dense):
    family, fields = VARIANTS[request.param]
    return dense(family, **fields)


@pytest.fixture
def small_batches(monkeypatch):
    """Two sequences go through a layer together, the last alone; predictions cross sequences."""
    monkeypatch.setattr(upcycle.models.stream, "BATCH_TOKENS", 80)
    monkeypatch.setattr(upcycle.models.stream, "PREDICTED_TOKENS", 33)


def stream_back(folder, tokens_BL=TOKENS_BL):
    """∂loss/∂y [T, D] and x [T, D] of each layer's FFN."""
    source = open_source(str(folder))
    outer = source.read(source.outer_names())
    there, seen = (HiddenStream(source.config, outer, tokens_BL, torch.device("cpu")) for _ in "ab")
    entering, inputs = [], []
    layers = source.arch.num_layers
    for layer in range(layers):
        entering.append(there.entering())
        there.through(layer, source.read_layer(layer), to_return=True)
        if layer not in source.arch.ffn_layers:
            seen.through(layer, source.read_layer(layer))
            continue
        inputs.append(seen.attend(layer, source.read_layer(layer))[0])
        seen.advance(layer)
    there.to_loss(outer)
    gradients = []
    for layer in reversed(range(layers)):
        bare = layer not in source.arch.ffn_layers
        gradients.append(there.back(layer, source.read_layer(layer), entering[layer], bare=bare))
    return [each for each in gradients[::-1] if each is not None], inputs


def model_back(folder, tokens_BL=TOKENS_BL):
    """∂loss/∂y [T, D] and h ∂loss/∂h [T, F] of each layer's FFN, by autograd on all of it."""
    model, outputs, hidden = load(folder), [], []

    def keep(place, tensor):
        tensor.retain_grad()
        place.append(tensor)

    for block in ffn_blocks(model):
        ffn_of(block).register_forward_hook(lambda module, given, y: keep(outputs, y))
        down_of(block).register_forward_pre_hook(lambda module, given: keep(hidden, given[0]))
    logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits.float()
    cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten(), reduction="sum"
    ).backward()
    effects = [(h * h.grad).flatten(0, 1).detach() for h in hidden]
    return [y.grad.flatten(0, 1) for y in outputs], effects


def test_gradients_are_autograds_on_the_whole_model(folder, small_batches):
    gradients, _ = stream_back(folder)
    expected, _ = model_back(folder)
    for ours_TD, theirs_TD in zip(gradients, expected, strict=True):
        assert gap(ours_TD, theirs_TD) < TOLERANCE


def test_effects_are_h_times_autograds_gradient_of_h(folder):
    """By the FFN under llama's names, whatever the family calls it."""
    source = open_source(str(folder))
    gradients, inputs = stream_back(folder)
    _, expected = model_back(folder)
    for place, layer in enumerate(source.arch.ffn_layers):
        ffn = dense_ffn(
            source.canonical(source.read_layer(layer)), ACT2FN[source.arch.fields["hidden_act"]]
        )
        loss = LossGradient(gradients[place], torch.zeros(TOKENS_BL.numel(), dtype=torch.int64))
        activations = LayerActivations(ffn, inputs[place], loss=loss)
        effect_TF = torch.cat([effect_tF for _, effect_tF in activations.effects()])
        assert gap(effect_TF, expected[place]) < TOLERANCE


def test_sequences_of_unlike_length_go_back_each_as_alone(dense, small_batches):
    groups = [TOKENS_BL[:3, :9], TOKENS_BL]
    gradients, _ = stream_back(dense("mistral"), groups)
    expected = [model_back(dense("mistral"), tokens_BL)[0] for tokens_BL in groups]
    for layer, ours_TD in enumerate(gradients):
        assert gap(ours_TD, torch.cat([theirs[layer] for theirs in expected])) < TOLERANCE
