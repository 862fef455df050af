"""The stream is the dense model: layer by layer in two halves it gives transformers' own hidden
states, and with another FFN in place those of the model whose FFN was replaced."""

import functools
import weakref

import pytest
import torch
from reference import FFNS, ffn_blocks, ffn_of, gap, load, logits
from tiny import FAMILIES, SIZES

import upcycle.models.stream
from upcycle.core.errors import UpcycleError
from upcycle.models.opening import open_source
from upcycle.models.stream import HiddenStream

D, LAYERS = SIZES["hidden_size"], SIZES["num_hidden_layers"]
TOKENS_BL = torch.randint(0, 256, (70, 60), generator=torch.Generator().manual_seed(3))
"""The stream's batches are of 4096 tokens, so that these are one batch of 68 and one of 2."""
TOLERANCE = 2e-5
CPU = torch.device("cpu")
VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "tied": ("llama", {"tie_word_embeddings": True}),
    "gemma4, of the small kind": (
        "gemma4_text",
        {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1, "num_hidden_layers": 3},
    ),
    "gemma, untied": ("gemma", {"tie_word_embeddings": False}),
    "some windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "scaled rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 5e3,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "another activation": ("llama", {"hidden_act": "gelu"}),
}

families = pytest.mark.parametrize("family", FAMILIES)
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def source_of(dense):
    """The folder of a variant's source."""

    def source(variant):
        family, fields = VARIANTS[variant]
        return dense(family, **fields)

    return source


def stream_through(folder, tokens_BL=TOKENS_BL, replaced=None):
    """Of tokens, or of several groups of them: what every layer's FFN sees [T, D], the norms of
    what its output is added to [T], and the last hidden states [T, D]; in layers in `replaced`, the
    function there takes the FFN's place. No layer stays in memory."""
    source = open_source(str(folder))
    outer = source.read(source.embedding_names())
    stream = HiddenStream(source.config, outer, tokens_BL, CPU)
    inputs, norms, passed = [], [], []
    for layer in range(source.arch.num_layers):
        assert all(each() is None for each in passed)
        passed.append(weakref.ref(stream.layers[layer]))
        if layer not in source.arch.ffn_layers:
            stream.through(layer, source.read_layer(layer))
            continue
        x_TD, norm_T = stream.attend(layer, source.read_layer(layer))
        inputs.append(x_TD.clone())
        norms.append(norm_T)
        function = (replaced or {}).get(source.arch.ffn_layers.index(layer))
        stream.advance(layer, None if function is None else function(x_TD))
    return inputs, norms, torch.cat([hidden_bLD.flatten(0, 1) for hidden_bLD in stream.hidden])


@torch.no_grad()
def model_through(folder, tokens_BL=TOKENS_BL, replaced=None):
    """The same of the model that transformers loads, all of it at once."""
    model, inputs, residuals, last = load(folder), [], [], []

    def keep(place):
        return lambda _, args: place.append(args[0].flatten(0, 1))

    for block in ffn_blocks(model):
        ffn_of(block).register_forward_pre_hook(keep(inputs))
        norm_before_ffn(block).register_forward_pre_hook(keep(residuals))
    last_norm(model).register_forward_pre_hook(keep(last))
    for layer, function in (replaced or {}).items():
        replace_ffn(model, layer, function)
    model(input_ids=tokens_BL, use_cache=False)
    return inputs, [residual_TD.norm(dim=-1) for residual_TD in residuals], last[0]


def norm_before_ffn(block):
    names = ("ffn_norm", "post_attention_layernorm", "norm")
    if hasattr(block, "post_feedforward_layernorm"):
        names = FFNS  # OLMo 2 has none before it: there, the FFN sees the residual stream itself.
    names = ("pre_feedforward_layernorm", *names)
    return next(getattr(block, name) for name in names if hasattr(block, name))


def last_norm(model):
    names = ("embedding_norm", "norm", "norm_f")
    return next(getattr(model.model, name) for name in names if hasattr(model.model, name))


def replace_ffn(model, layer, function):
    mlp = ffn_of(ffn_blocks(model)[layer])
    mlp.forward = lambda x_BLD: function(x_BLD.flatten(0, 1)).view_as(x_BLD)


def another_ffn(x_TD):
    """As large as the tiny models' own, and of no symmetry."""
    return 3 * torch.tanh(x_TD) + x_TD.roll(1, dims=1) ** 2


@functools.cache
def both(folder):
    """What goes through the stream, and what goes through the model."""
    return stream_through(folder), model_through(folder)


@variants
def test_the_last_hidden_states_are_the_models(source_of, variant):
    (*_, last_TD), (*_, expected_TD) = both(source_of(variant))
    assert last_TD.shape == (TOKENS_BL.numel(), D)
    assert gap(last_TD, expected_TD) < TOLERANCE


@variants
def test_each_ffn_sees_what_the_models_sees(source_of, variant):
    (inputs, *_), (expected, *_) = both(source_of(variant))
    for x_TD, expected_TD in zip(inputs, expected, strict=True):
        assert gap(x_TD, expected_TD) < TOLERANCE


@variants
def test_norms_are_those_of_what_the_ffns_output_is_added_to(source_of, variant):
    (_, norms, _), (_, expected, _) = both(source_of(variant))
    for norm_T, expected_T in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm_T, expected_T, rtol=TOLERANCE, atol=0)


@families
@pytest.mark.parametrize("layer", range(LAYERS))
def test_another_ffn_in_one_layer_is_the_model_with_that_ffn(dense, family, layer):
    replaced = {layer: another_ffn}
    inputs, norms, last_TD = stream_through(dense(family), replaced=replaced)
    expected, expected_norms, expected_TD = model_through(dense(family), replaced=replaced)
    assert gap(last_TD, expected_TD) < TOLERANCE
    for x_TD, other_TD in zip(inputs, expected, strict=True):
        assert gap(x_TD, other_TD) < TOLERANCE
    for norm_T, other_T in zip(norms, expected_norms, strict=True):
        torch.testing.assert_close(norm_T, other_T, rtol=TOLERANCE, atol=0)


@families
def test_another_ffn_changes_the_last_hidden_states(dense, family):
    """So that the test above can fail."""
    *_, last_TD = stream_through(dense(family), replaced={1: another_ffn})
    (*_, dense_TD), _ = both(dense(family))
    assert gap(last_TD, dense_TD) > 0.5


@families
def test_other_ffns_in_all_layers_are_the_model_with_those_ffns(dense, family):
    replaced = {0: another_ffn, 1: torch.sin, 2: lambda x_TD: -x_TD}
    *_, last_TD = stream_through(dense(family), replaced=replaced)
    *_, expected_TD = model_through(dense(family), replaced=replaced)
    assert gap(last_TD, expected_TD) < TOLERANCE


@pytest.mark.parametrize("shape", [(1, 8), (3, 60), (2, 250)])
def test_sequences_of_any_number_and_length(dense, shape):
    tokens_BL = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(4))
    inputs, norms, last_TD = stream_through(dense("mistral"), tokens_BL)
    *_, expected_TD = model_through(dense("mistral"), tokens_BL)
    assert {len(each) for each in (*inputs, *norms)} == {tokens_BL.numel()}
    assert gap(last_TD, expected_TD) < TOLERANCE


@families
def test_groups_of_sequences_of_unlike_length_are_each_read_as_alone(dense, family):
    """Longer and shorter than the windows of some families; the second is two batches."""
    groups = [TOKENS_BL[:2, :9], TOKENS_BL, TOKENS_BL[5:6, 7:8]]
    inputs, norms, last_TD = stream_through(dense(family), groups)
    expected = [model_through(dense(family), tokens_BL) for tokens_BL in groups]
    for layer in range(LAYERS):
        assert gap(inputs[layer], torch.cat([x[layer] for x, _, _ in expected])) < TOLERANCE
        norm_T = torch.cat([norm[layer] for _, norm, _ in expected])
        torch.testing.assert_close(norms[layer], norm_T, rtol=TOLERANCE, atol=0)
    assert gap(last_TD, torch.cat([last for *_, last in expected])) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@families
def test_on_a_cpu_weights_below_float32_run_in_float32(dense, family, dtype):
    (inputs, norms, last_TD), (*_, expected_TD) = both(dense(family, dtype=dtype))
    assert {each.dtype for each in (*inputs, *norms, last_TD)} == {torch.float32}
    assert gap(last_TD, expected_TD) < TOLERANCE


@variants
def test_log_probs_are_those_of_the_model_and_of_the_models_with_one_ffn_replaced(
    source_of, variant
):
    folder, tokens_BL = source_of(variant), TOKENS_BL[:4]
    source = open_source(str(folder))
    outer = source.read(source.outer_names())
    stream = HiddenStream(source.config, outer, tokens_BL, CPU)
    for layer in range(source.arch.num_layers):
        if layer not in source.arch.ffn_layers:
            stream.through(layer, source.read_layer(layer))
            continue
        x_TD, _ = stream.attend(layer, source.read_layer(layer))
        stream.branch(layer, another_ffn(x_TD[: tokens_BL.numel()]))
        stream.advance(layer)
    expected = [logits(load(folder), tokens_BL)]
    for layer in range(LAYERS):
        model = load(folder)
        replace_ffn(model, layer, another_ffn)
        expected.append(logits(model, tokens_BL))
    for log_probs_BLV, expected_BLV in zip(stream.log_probs(outer), expected, strict=True):
        assert gap(log_probs_BLV, expected_BLV.log_softmax(-1)) < TOLERANCE


@pytest.mark.parametrize("at_once", [7, 60, 512])
def test_last_log_probs_are_those_of_the_last_sequences(dense, monkeypatch, at_once):
    monkeypatch.setattr(upcycle.models.stream, "PREDICTED_TOKENS", at_once)
    source = open_source(str(dense("granite")))
    outer = source.read(source.outer_names())
    stream = HiddenStream(source.config, outer, TOKENS_BL, CPU)
    for layer in range(LAYERS):
        stream.attend(layer, source.read_layer(layer))
        stream.advance(layer)
    pieces = list(stream.last_log_probs(outer, TOKENS_BL[-3:].numel()))
    assert {len(piece_tV) for piece_tV in pieces[:-1]} <= {at_once}
    assert len(pieces[-1]) <= at_once
    expected_BLV = logits(load(dense("granite")), TOKENS_BL[-3:])
    assert gap(torch.cat(pieces), expected_BLV.flatten(0, 1).log_softmax(-1)) < TOLERANCE


def test_a_model_that_overflows_is_refused_by_the_layer(dense):
    source = open_source(str(dense()))
    outer = source.read(source.embedding_names())
    stream = HiddenStream(source.config, outer, TOKENS_BL, CPU)
    x_TD, _ = stream.attend(0, source.read_layer(0))
    stream.advance(0, x_TD * torch.inf)
    with pytest.raises(UpcycleError, match="overflows in layer 1 on the calibration text"):
        stream.attend(1, source.read_layer(1))
