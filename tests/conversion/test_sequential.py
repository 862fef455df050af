"""Compensation and the sequential stream in whole conversions: each layer is fitted on what the
layers before it put out, what is written is that fit, the check sees it, and no kill changes it."""

import math
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from processes import kill, killed
from reference import (
    TOLERANCE,
    content,
    dense_logits,
    experts,
    gap,
    load,
    load_all_alike,
    logits,
    moe_layers,
    naive_weights,
    read_json,
    routers,
    weights,
)
from safetensors.torch import save_file
from tiny import make_tokenizer, once
from torch.nn.functional import silu

import upcycle
from upcycle import CheckFailed, UpcycleError
from upcycle.conversion import run as conversion
from upcycle.conversion import writing
from upcycle.conversion.converted import ConvertedLayer
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.core.types import DenseFFN, ExpertLayout, LayerActivations
from upcycle.models.stream import HiddenStream
from upcycle.models.workspace import Workspace
from upcycle.models.writer import CheckpointWriter

PAIRS = [
    ("llama", "qwen2_moe"),
    ("llama", "glm4_moe"),
    ("qwen3", "qwen3_moe"),
    ("mistral", "mixtral"),
    ("granite", "granitemoeshared"),
    ("olmo2", "flex_olmo"),
    ("qwen2", "qwen2_moe"),
    ("phi3", "mixtral"),
    ("gemma", "granitemoeshared"),
]
ONE_PER_TARGET = PAIRS[:6]
"""Of families that name their tensors as llama does."""
ROUTED, TOP_K, SEQ_LEN = 4, 2, 64
GAIN = {
    "qwen2_moe": ROUTED,
    "qwen3_moe": TOP_K,
    "flex_olmo": ROUTED,
    "mixtral": TOP_K,
    "granitemoeshared": TOP_K,
    "glm4_moe": 1,
}
"""All powers of two, so that a gain rounds nothing."""
SHARED_GAIN = {"qwen2_moe": 2, "glm4_moe": 1, "granitemoeshared": 1}
PLAIN = {
    "split": "random",
    "router": "ridge",
    "compensate": "none",
    "sequential": False,
    "keep_dense": [],
}
REFIT = {"compensate": "least_squares"}
JITTER = 1e-6
"""Of the mean second moment: all that holds the neurons that are never on."""
SEQUENTIAL = {"sequential": True, **REFIT}
DESCENT = {
    "sequential": True,
    "compensate": {"name": "descent", "rate": 0.1},
    "calibration_tokens": 40 * 64,  # enough for steps that help on others
}
PRUNED = {
    "method": "prune",
    "router": "kmeans",
    "shared": 0,
    "experts": ROUTED,
    "top_k": 1,
}
LAYERS = range(3)

pairs = pytest.mark.parametrize(("family", "target"), PAIRS)
targets = pytest.mark.parametrize(("family", "target"), ONE_PER_TARGET)
streams = pytest.mark.parametrize("sequential", [False, True])


def settings_for(target, **settings):
    """As many routed experts on every target, beside a shared one as wide as two of them where it
    has one."""
    shared = 2 / (ROUTED + 2) if target in SHARED_GAIN else 0
    geometry = {"experts": ROUTED, "shared": shared, "top_k": TOP_K}
    sizes = {"calibration_tokens": 8 * SEQ_LEN, "seq_len": SEQ_LEN}
    return PLAIN | {"target": target} | geometry | sizes | settings


@pytest.fixture(autouse=True, scope="module")
def short_check_and_small_batches():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHECK_TOKENS, "fast", 64)
        patch.setattr("upcycle.conversion.compensate.descent.BATCH", 32)
        yield


@pytest.fixture(scope="module")
def convert(dense, text, tmp_path_factory):
    """Converts a tiny model, once per settings, and notes what its layers were fitted on."""

    @once
    def converted(family, dtype, **settings):
        out = tmp_path_factory.mktemp("sequential") / "out"
        source = dense(family, dtype=dtype)
        return convert_and_watch(source, out, calibration=str(text), **settings)

    def run(family="llama", target="qwen2_moe", dtype=torch.float32, **settings):
        return converted(family, dtype, **settings_for(target, **settings))

    return run


@contextmanager
def watched_stream():
    """Of the conversion in the context, the tokens that are fitted on [B, L]; by layer what its FFN
    sees [T, D] with the norms of what its output is added to [T]; and the latter itself [T, D].

    (Where there is a stream through the dense model, too, it is the first to pass a layer.)"""
    tokens, seen, added_to = [], {}, {}

    class Watched(HiddenStream):
        def __init__(self, config, embed_VD, tokens_BL, device):
            super().__init__(config, embed_VD, tokens_BL, device)
            tokens.append(tokens_BL)

        def attend(self, layer, weights):
            x_TD, norm_T = super().attend(layer, weights)
            seen[layer] = x_TD.clone(), norm_T.clone()
            added_to[layer] = torch.cat([hidden_bLD.flatten(0, 1) for hidden_bLD in self.hidden])
            return x_TD, norm_T

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "HiddenStream", Watched)
        yield tokens, seen, added_to


def convert_and_watch(source, out, **settings):
    """The folders, the check's report, and what the stream gave."""
    with watched_stream() as (tokens, seen, added_to):
        check = upcycle.convert(str(source), out, **settings).check
    watched = {"tokens": tokens[0], "seen": seen, "added_to": added_to}
    return SimpleNamespace(source=source, out=out, check=check, **watched)


# --- what a layer is fitted on ---------------------------------------------------------------


@torch.no_grad()
def inputs(model, modules, tokens_BL):
    """What each of the modules sees on the tokens [T, D]."""
    seen = []
    for module in modules:
        module.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))
        )
    model(input_ids=tokens_BL, use_cache=False)
    return seen


def dense_inputs(run):
    model = load(run.source)
    return inputs(model, [layer.mlp for layer in model.model.layers], run.tokens)


def moe_inputs(run):
    model = load(run.out)
    return inputs(model, routers(model), run.tokens)


def fitted_on(run):
    return [run.seen[record["layer"]] for record in moe_layers(run.out)]


def gaps(run, expected):
    """By sequence, the largest of all MoE layers between what they were fitted on and what is
    expected of them."""
    layers = [
        [gap(*pair) for pair in zip(x_TD.split(SEQ_LEN), other_TD.split(SEQ_LEN), strict=True)]
        for (x_TD, _), other_TD in zip(fitted_on(run), expected, strict=True)
    ]
    return [max(sequence) for sequence in zip(*layers, strict=True)]


def assert_close_but_for_ties(sequences):
    """transformers compares weights, which tie where logits almost do: once in thousands of
    tokens, and then the rest of that sequence moves."""
    assert sum(sequence > TOLERANCE["sum"] for sequence in sequences) <= 2 < len(sequences) / 3


@pairs
@pytest.mark.parametrize("compensate", ["none", "least_squares", DESCENT["compensate"]], ids=str)
def test_sequential_layers_see_what_the_converted_models_see(convert, family, target, compensate):
    run = convert(family, target, sequential=True, compensate=compensate)
    assert_close_but_for_ties(gaps(run, moe_inputs(run)))


@pairs
@pytest.mark.parametrize("compensate", ["none", "least_squares"])
def test_so_do_those_of_pruned_copies(convert, family, target, compensate):
    run = convert(family, target, sequential=True, compensate=compensate, **PRUNED)
    assert_close_but_for_ties(gaps(run, moe_inputs(run)))


@pairs
def test_other_layers_see_what_the_dense_models_see(convert, family, target):
    run = convert(family, target, **REFIT)
    assert max(gaps(run, dense_inputs(run))) < TOLERANCE["mean"]


@pairs
def test_the_two_differ_after_the_first_layer(convert, family, target):
    sequential, other = (convert(family, target, **s).seen for s in (SEQUENTIAL, REFIT))
    assert torch.equal(sequential[0][0], other[0][0])
    assert all(gap(sequential[layer][0], other[layer][0]) > 0.05 for layer in (1, 2))


def test_a_layer_kept_dense_is_passed_by_its_own_ffn(convert):
    run = convert(**SEQUENTIAL, keep_dense=[1])
    assert len(fitted_on(run)) == 2
    assert_close_but_for_ties(gaps(run, moe_inputs(run)))


def test_streams_end_with_the_last_converted_layer(convert):
    run = convert(keep_dense=[2], **SEQUENTIAL)
    assert sorted(run.seen) == [0, 1]


@pytest.mark.parametrize(("family", "target"), [("olmo2", "flex_olmo"), ("llama", "qwen2_moe")])
@pytest.mark.parametrize(("sequential", "look"), [(False, dense_inputs), (True, moe_inputs)])
def test_so_it_is_with_sources_in_bfloat16(convert, family, target, sequential, look):
    run = convert(family, target, torch.bfloat16, **REFIT, sequential=sequential)
    assert_close_but_for_ties(gaps(run, look(run)))


def test_copies_see_what_the_dense_model_sees(convert):
    copies = {"method": "copy", "router": "kmeans", "shared": 0}
    run = convert(**copies, sequential=True)
    assert max(gaps(run, dense_inputs(run))) < TOLERANCE["mean"]


def weigh_by_sigmoid(logits_TE):
    """Of the three largest."""
    top_TK = logits_TE.topk(3)
    return torch.zeros_like(logits_TE).scatter(1, top_TK.indices, top_TK.values.sigmoid())


@pytest.mark.parametrize("refits", [[], ["down_DF"], ["gate_FD"], ["up_FD"]])
def test_a_converted_layer_is_the_shared_expert_and_what_the_selected_ones_count(refits):
    rng = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    ffn = DenseFFN(normal(40, 12), normal(40, 12), normal(12, 40), silu)
    order_F = torch.randperm(40, generator=rng)
    layout = ExpertLayout(order_F[8:].view(4, 8), order_F[:8])
    router_ED, x_TD = normal(4, 12), normal(9, 12)
    refit = replace(ffn, **{name: normal(*getattr(ffn, name).shape) for name in refits})
    converted = ConvertedLayer(refit, layout, router_ED, torch.arange(40))
    y_TD = converted.output(LayerActivations(ffn, x_TD), weigh_by_sigmoid)
    for x_D, y_D in zip(x_TD, y_TD, strict=True):
        logits_E = [float(router_D @ x_D) for router_D in router_ED]
        expected_D = refit.take(layout.shared_S)(x_D)
        for e in sorted(range(4), key=lambda e: logits_E[e])[1:]:
            own_D = refit.take(layout.experts_EM[e])(x_D)
            expected_D = expected_D + own_D / (1 + math.exp(-logits_E[e]))
        torch.testing.assert_close(y_D, expected_D)


# --- what is written -------------------------------------------------------------------------


def dense_ffn(folder, layer):
    """Of a family with llama's names."""
    tensors = weights(folder)
    return DenseFFN(*(tensors[f"model.layers.{layer}.mlp.{n}_proj.weight"] for n in MATRICES), silu)


MATRICES = ("gate", "up", "down")


def permutation(run, layer):
    (record,) = (r for r in moe_layers(run.out) if r["layer"] == layer)
    return torch.tensor(record["permutation"])


def written_down(run, target, layer):
    """The checkpoint's down_proj without its gains, in the dense order of neurons [D, F]."""
    routed = experts(load(run.out))[layer].down_proj.data / GAIN[target]
    shared = [
        tensor.float() / SHARED_GAIN[target]
        for tensor in shared_tensors(run, layer, "down_proj", "output_linear")
    ]
    return torch.cat([*shared, *routed], 1)[:, permutation(run, layer).argsort()]


def written_gate_and_up(run, layer):
    """Of all neurons in the dense order, [2 F, D]."""
    shared = shared_tensors(run, layer, "gate_proj", "up_proj", "input_linear")
    routed = experts(load(run.out))[layer].gate_up_proj.data
    pairs = [torch.cat(shared).float(), *routed] if shared else routed
    halves = zip(*(pair.chunk(2) for pair in pairs), strict=True)
    order_F = permutation(run, layer).argsort()
    return torch.cat([torch.cat(half)[order_F] for half in halves])


def shared_tensors(run, layer, *names):
    prefix, tensors = f"model.layers.{layer}.", weights(run.out)
    return [
        tensors[name]
        for ending in names
        for name in tensors
        if name.startswith(prefix) and "shared_" in name and name.endswith(f".{ending}.weight")
    ]


def is_down(name):
    return name.endswith(("down_proj.weight", "output_linear.weight", ".w2.weight"))


def is_router(name):
    return name.endswith((".mlp.gate.weight", ".router.layer.weight"))


def neurons_count(run, target, layer):
    """What each neuron counts by the stored router, for what the layer was fitted on [T, F]."""
    router_ED = routers(load(run.out))[layer].weight.data.double()
    weight_TE = naive_weights(target, run.seen[layer][0].double() @ router_ED.T, TOP_K)
    shared_size = read_json(run.out / "upcycle.json")["plan"]["shared_size"]
    order_F = permutation(run, layer)
    count_TF = torch.ones(len(weight_TE), len(order_F), dtype=torch.float64)
    for e, neurons_M in enumerate(order_F[shared_size:].view(ROUTED, -1)):
        count_TF[:, neurons_M] = weight_TE[:, e, None]
    return count_TF


@torch.no_grad()
def wanted_outputs(run, family):
    """By layer, the FFN's output [T, D] after which the hidden states would be the dense model's;
    None where a norm comes between."""
    if family == "olmo2":
        return [None] * len(LAYERS)
    model, states = load(run.source), []
    for layer in model.model.layers:
        layer.register_forward_hook(
            lambda _, args, out: states.append(
                (out if torch.is_tensor(out) else out[0]).flatten(0, 1)
            )
        )
    model(input_ids=run.tokens, use_cache=False)
    scale = getattr(model.config, "residual_multiplier", 1.0)
    return [(states[layer] - run.added_to[layer]) / scale for layer in LAYERS]


def naive_refit(ffn, x_TD, norm_T, count_TF, strength, wanted_TD=None, feedback=0.0):
    """The normal equations in float64; an error counts relative to its token's norm. Columns are
    held to the dense ones times the factor that makes the counted activations most like the
    others."""
    x_TD, gate_FD, up_FD, down_DF = (
        m.double() for m in (x_TD, ffn.gate_FD, ffn.up_FD, ffn.down_DF)
    )
    h_TF = silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)
    on_TF = h_TF * count_TF
    weighted_FT = on_TF.T / norm_T.double() ** 2
    moment_F = (weighted_FT @ on_TF).diagonal()
    held_DF = down_DF * (weighted_FT @ h_TF).diagonal() / moment_F
    penalty_FF = (strength * moment_F + JITTER * moment_F.mean()).diag()
    y_TD = h_TF @ down_DF.T
    if wanted_TD is not None:
        y_TD = (1 - feedback) * y_TD + feedback * wanted_TD.double()
    right_FD = weighted_FT @ y_TD + penalty_FF @ held_DF.T
    return torch.linalg.solve(weighted_FT @ on_TF + penalty_FF, right_FD).T


def assert_refit(run, target, tolerance, strength=0.3, family="llama", feedback=0.0):
    wanted = wanted_outputs(run, family)
    for layer in LAYERS:
        ffn = dense_ffn(run.source, layer)
        count_TF = neurons_count(run, target, layer)
        assert count_TF.max() > 1.01
        expected_DF = naive_refit(
            ffn, *run.seen[layer], count_TF, strength, wanted[layer], feedback
        )
        assert gap(written_down(run, target, layer), expected_DF) < tolerance
        assert gap(ffn.down_DF.float(), expected_DF) > 0.1


@targets
@streams
def test_down_proj_is_what_least_squares_gives(convert, family, target, sequential):
    run = convert(family, target, **REFIT, sequential=sequential)
    assert_refit(run, target, 1e-4, family=family, feedback=0.5 if sequential else 0.0)


@pytest.mark.parametrize("feedback", [0.0, 0.2, 1.0])
def test_down_proj_makes_up_for_earlier_layers_as_much_as_asked(convert, feedback):
    run = convert(compensate={"name": "least_squares", "feedback": feedback}, sequential=True)
    assert_refit(run, "qwen2_moe", 1e-4, feedback=feedback)


def test_down_proj_is_held_as_strongly_as_asked(convert):
    stronger = {"name": "least_squares", "strength": 2.0}
    run = convert(compensate=stronger, sequential=True)
    assert_refit(run, "qwen2_moe", 1e-4, strength=2.0, feedback=0.5)


@streams
def test_down_proj_in_bfloat16_is_rounded_once(convert, sequential):
    run = convert(dtype=torch.bfloat16, **REFIT, sequential=sequential)
    assert_refit(run, "qwen2_moe", 0.03, feedback=0.5 if sequential else 0.0)
    assert {tensor.dtype for tensor in weights(run.out).values()} == {torch.bfloat16}


@targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_and_up_are_the_sources(convert, family, target, dtype):
    run = convert(family, target, dtype, **SEQUENTIAL)
    for layer in LAYERS:
        ffn = dense_ffn(run.source, layer)
        expected = torch.cat([ffn.gate_FD, ffn.up_FD]).float()
        assert torch.equal(written_gate_and_up(run, layer), expected)


@targets
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_that_is_no_ffn_is_the_sources(convert, family, target, dtype):
    run = convert(family, target, dtype, **SEQUENTIAL)
    written = weights(run.out)
    kept = {name: t for name, t in weights(run.source).items() if ".mlp." not in name}
    assert len(kept) > 3 * 6
    assert all(torch.equal(written[name], tensor) for name, tensor in kept.items())


@pairs
def test_least_squares_change_down_proj_and_selection_alone(convert, family, target):
    before, after = (
        weights(convert(family, target, compensate=c, router_spread=0.1).out)
        for c in ("none", "least_squares")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    # What the shared neurons can stand in for needs no routing any more.
    selecting = {name for name in changed if is_router(name)}
    assert len(selecting) == (len(LAYERS) if target in SHARED_GAIN else 0)
    assert changed - selecting == {name for name in before if is_down(name)}


@pytest.mark.parametrize("spread", [1e-4, 0.01])
def test_with_all_experts_selected_nothing_changes_but_what_they_count_unevenly(convert, spread):
    before, after = (
        weights(convert("mistral", "mixtral", compensate=c, top_k=ROUTED, router_spread=spread).out)
        for c in ("none", "least_squares")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(is_down(name) for name in changed)
    assert max(gap(after[name], before[name]) for name in changed) < 10 * spread


def test_what_all_experts_count_unevenly_is_made_up_for(convert):
    settings = {"top_k": ROUTED, "router_spread": 0.3}
    before, after = (
        output_error(convert("mistral", "mixtral", compensate=c, **settings))
        for c in ("none", "least_squares")
    )
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))


def test_a_token_that_is_nothing_yet_does_not_own_the_fit(dense, tmp_path):
    """Embeddings of zero, as of a padding token that ends documents too, at a sequence's start:
    what the first FFN's output is added to has norm zero."""
    source = tmp_path / "source"
    shutil.copytree(dense(), source)
    tensors = weights(source)
    tensors["model.embed_tokens.weight"][make_tokenizer().encode("a")] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 100)
    settings = settings_for("qwen2_moe", **REFIT, check="none", calibration=str(text))
    run = convert_and_watch(source, tmp_path / "out", **settings)
    assert run.seen[0][1].min() == 0
    assert all(tensor.isfinite().all() for tensor in weights(run.out).values())


def test_the_weakest_penalty_on_the_fewest_tokens_gives_finite_weights(convert):
    weakest = {"name": "least_squares", "strength": 1e-3}
    run = convert(compensate=weakest, calibration_tokens=SEQ_LEN, check="none")
    assert all(tensor.isfinite().all() for tensor in weights(run.out).values())


@torch.no_grad()
def output_error(run):
    """By layer, what the MoE misses of the dense FFN's output on what the layer was fitted on,
    relative to the norms."""
    dense, moe, errors = load(run.source), load(run.out), []
    for layer, (x_TD, norm_T) in run.seen.items():
        dense_TD = dense.model.layers[layer].mlp(x_TD[None])[0]
        moe_TD = moe.model.layers[layer].mlp(x_TD[None])[0]
        errors.append(float(((moe_TD - dense_TD) / norm_T[:, None]).square().sum()))
    return errors


@pytest.mark.parametrize(
    ("family", "target"), [p for p in ONE_PER_TARGET if p[1] != "granitemoeshared"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_moe_misses_less_of_the_dense_ffn(convert, family, target, dtype):
    before, after = (
        output_error(convert(family, target, dtype, compensate=c))
        for c in ("none", "least_squares")
    )
    assert all(new < 0.9 * old for new, old in zip(after, before, strict=True))


# --- the check -------------------------------------------------------------------------------


@pairs
@streams
def test_the_check_passes(convert, family, target, sequential):
    check = convert(family, target, **REFIT, sequential=sequential).check
    assert check.exact_error < 1e-5 < check.exact_tolerance


@targets
def test_the_check_passes_in_bfloat16(convert, family, target):
    check = convert(family, target, torch.bfloat16, **SEQUENTIAL).check
    assert check.exact_error < check.exact_tolerance


@pytest.mark.parametrize("keep_dense", [[0], [1], [0, 2]])
def test_the_check_passes_with_layers_kept_dense(convert, keep_dense):
    assert convert(**SEQUENTIAL, keep_dense=keep_dense).check.exact_error < 1e-5


@pairs
def test_all_experts_on_are_the_dense_model_with_its_down_proj_refit(convert, family, target):
    run = convert(family, target, **SEQUENTIAL)
    model = load(run.source)
    assert gap(logits(load_all_alike(run.out)), dense_logits(run.source)) > 0.1
    for layer in LAYERS:
        model.model.layers[layer].mlp.down_proj.weight.data = written_down(run, target, layer)
    assert gap(logits(load_all_alike(run.out)), logits(model)) < TOLERANCE["mean"]


@pairs
def test_all_experts_on_are_the_dense_model_with_all_of_its_ffns_refit(convert, family, target):
    run = convert(family, target, **DESCENT)
    assert run.check.exact_error < 1e-5
    model, changed = load(run.source), 0
    for layer in LAYERS:
        mlp = model.model.layers[layer].mlp
        written = written_gate_and_up(run, layer)
        fused = hasattr(mlp, "gate_up_proj")
        pieces = [mlp.gate_up_proj] if fused else [mlp.gate_proj, mlp.up_proj]
        changed += not torch.equal(written, torch.cat([piece.weight.data for piece in pieces]))
        for piece, tensor in zip(pieces, written.chunk(len(pieces)), strict=True):
            piece.weight.data = tensor
        mlp.down_proj.weight.data = written_down(run, target, layer)
    assert changed
    assert gap(logits(load_all_alike(run.out)), logits(model)) < TOLERANCE["mean"]


@targets
def test_the_check_passes_in_bfloat16_after_descent(convert, family, target):
    check = convert(family, target, torch.bfloat16, **DESCENT).check
    assert check.exact_error < check.exact_tolerance


@pytest.mark.parametrize("matrix", ["gate_FD", "up_FD", "down_DF"])
def test_a_descent_that_is_not_written_is_caught(dense, text, tmp_path, monkeypatch, matrix):
    make, source = ConvertedLayer.experts, dense()

    def make_dense(self, plan, layer):
        original = getattr(dense_ffn(source, layer), matrix)
        return make(replace(self, ffn=replace(self.ffn, **{matrix: original})), plan, layer)

    monkeypatch.setattr(ConvertedLayer, "experts", make_dense)
    with pytest.raises(CheckFailed, match="is not the dense model's equal"):
        upcycle.convert(
            str(source),
            tmp_path / "out",
            calibration=str(text),
            **settings_for("qwen2_moe", **DESCENT),
        )


def test_the_rest_is_measured_against_the_dense_model_as_it_is(convert):
    plain, refit = (convert(compensate=c).check for c in ("none", "least_squares"))
    assert len(plain.kinds) > 1
    for one, other in zip(refit.kinds, plain.kinds, strict=True):
        assert (one.kind, one.perplexity_dense) == (other.kind, other.perplexity_dense)
        assert one.kl != other.kl


def assert_caught(dense, text, out, family, target):
    with pytest.raises(CheckFailed, match="is not the dense model's equal"):
        upcycle.convert(
            str(dense(family)), out, calibration=str(text), **settings_for(target, **SEQUENTIAL)
        )
    assert list(out.parent.iterdir()) == []


def with_one_neuron_silent(ffn):
    down_DF = ffn.down_DF.clone()
    down_DF[:, 17] = 0
    return replace(ffn, down_DF=down_DF)


@targets
def test_a_refit_that_is_written_wrong_is_caught(
    dense, text, tmp_path, monkeypatch, family, target
):
    make = ConvertedLayer.experts
    monkeypatch.setattr(
        ConvertedLayer,
        "experts",
        lambda self, *where: make(replace(self, ffn=with_one_neuron_silent(self.ffn)), *where),
    )
    assert_caught(dense, text, tmp_path / "out", family, target)


@targets
def test_a_refit_that_is_not_written_is_caught(dense, text, tmp_path, monkeypatch, family, target):
    make, source = ConvertedLayer.experts, dense(family)

    def make_dense(self, plan, layer):
        down_DF = dense_ffn(source, layer).down_DF
        return make(replace(self, ffn=replace(self.ffn, down_DF=down_DF)), plan, layer)

    monkeypatch.setattr(ConvertedLayer, "experts", make_dense)
    assert_caught(dense, text, tmp_path / "out", family, target)


def test_a_refit_of_another_layer_is_caught(dense, text, tmp_path, monkeypatch):
    kept = Workspace.kept
    monkeypatch.setattr(Workspace, "kept", lambda self, unit: kept(self, "layer 0"))
    assert_caught(dense, text, tmp_path / "out", "llama", "qwen2_moe")


@pytest.mark.parametrize("settings", [{}, REFIT, SEQUENTIAL], ids=["none", "refit", "sequential"])
@targets
def test_the_check_passes_where_experts_repeat_neurons(convert, family, target, settings):
    check = convert(family, target, **settings, split="sharing_inner").check
    assert check.exact_error < check.exact_tolerance


@pytest.mark.parametrize("settings", [{}, REFIT, SEQUENTIAL], ids=["none", "refit", "sequential"])
@pairs
def test_the_check_passes_for_pruned_copies(convert, family, target, settings):
    check = convert(family, target, **PRUNED, **settings).check
    assert check.exact_error < 1e-5 < check.exact_tolerance


@targets
def test_the_check_passes_for_pruned_copies_in_bfloat16(convert, family, target):
    check = convert(family, target, torch.bfloat16, **PRUNED, **SEQUENTIAL).check
    assert check.exact_error < check.exact_tolerance


@pytest.mark.parametrize("settings", [{}, SEQUENTIAL], ids=["none", "sequential"])
def test_a_repeated_neuron_that_counts_once_is_caught(dense, text, tmp_path, monkeypatch, settings):
    once = property(lambda self: torch.ones(len(self.permutation), dtype=torch.int64))
    monkeypatch.setattr(ExpertLayout, "multiplicity", once)
    repeated = settings_for("qwen2_moe", **settings, split="sharing_inner")
    with pytest.raises(CheckFailed, match="is not the dense model's equal"):
        upcycle.convert(str(dense()), tmp_path / "out", calibration=str(text), **repeated)


def test_a_refit_in_another_order_is_caught(dense, text, tmp_path, monkeypatch):
    keep = Workspace.keep

    def shuffled(self, unit, tensors):
        keep(self, unit, tensors | {"down_DF": tensors["down_DF"].roll(1, 1)})

    monkeypatch.setattr(Workspace, "keep", shuffled)
    assert_caught(dense, text, tmp_path / "out", "llama", "qwen2_moe")


# --- interrupted runs ------------------------------------------------------------------------

VARIANTS = {
    "both": SEQUENTIAL,
    "sequential": {"sequential": True},
    "least squares": REFIT,
    "descent": DESCENT,
    "a layer kept dense": {**SEQUENTIAL, "keep_dense": [1]},
    "repeated neurons": {"split": "sharing_inner"},
    "repeated neurons, both": {**SEQUENTIAL, "split": "sharing_inner"},
    "pruned copies": {**PRUNED, "sequential": True},
    "pruned copies, both": {**PRUNED, **SEQUENTIAL},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def kill_in_a_tensor(patch):
    """Of layer 1, with a tensor in place that is wrong."""
    write = CheckpointWriter.write

    def torn(self, name, tensor):
        if name.startswith("model.layers.1.") and "mlp." in name:
            write(self, name, torch.full_like(tensor, 7))
            kill()
        write(self, name, tensor)

    patch.setattr(CheckpointWriter, "write", torn)


def kill_while_putting_aside(patch):
    """What belongs to the last layer, with half a file written."""
    keep = Workspace.keep

    def torn(self, unit, tensors):
        keep(self, unit, tensors)
        if unit == "layer 2":
            for path in self.folder.rglob(f"{unit}.safetensors"):
                os.truncate(path, path.stat().st_size // 2)
            kill()

    patch.setattr(Workspace, "keep", torn)


def kill_before_layer_2(patch):
    convert_layer = writing.convert_layer
    patch.setattr(
        writing,
        "convert_layer",
        lambda plan, at, *rest: kill() if at == 2 else convert_layer(plan, at, *rest),
    )


MOMENTS = {
    "in a tensor": kill_in_a_tensor,
    "before layer 2": kill_before_layer_2,
    "putting aside": kill_while_putting_aside,
    "in the check": lambda patch: patch.setattr(conversion, "run_check", kill),
    "before publishing": lambda patch: patch.setattr(Workspace, "publish", kill),
}


@pytest.fixture
def attempt(dense, text, tmp_path):
    """Converts to a folder of the test's own by the variant's settings."""

    def run(variant, **options):
        settings = settings_for("qwen2_moe", calibration=str(text), **VARIANTS[variant])
        return upcycle.convert(str(dense()), tmp_path / "out", **(settings | options))

    return run


def start_and_kill(attempt, variant, moment):
    def act():
        with pytest.MonkeyPatch.context() as patch:
            MOMENTS[moment](patch)
            attempt(variant, resume=True)

    assert killed(act)


@variants
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_after_a_kill_gives_the_same_bytes(convert, attempt, tmp_path, variant, moment):
    uninterrupted = content(convert(**VARIANTS[variant]).out)
    start_and_kill(attempt, variant, moment)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    attempt(variant, resume=True)
    assert content(tmp_path / "out") == uninterrupted
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_resumed_after_many_kills_gives_the_same_bytes(convert, attempt, tmp_path):
    uninterrupted = content(convert(**SEQUENTIAL).out)
    for moment in MOMENTS:
        start_and_kill(attempt, "both", moment)
    attempt("both", resume=True)
    assert content(tmp_path / "out") == uninterrupted


def test_resuming_fits_on_the_same_and_does_not_repeat_finished_layers(
    convert, attempt, monkeypatch
):
    expected = convert(**SEQUENTIAL).seen
    start_and_kill(attempt, "both", "before layer 2")
    layers, convert_layer = [], writing.convert_layer
    monkeypatch.setattr(
        writing,
        "convert_layer",
        lambda plan, at, *rest: layers.append(at) or convert_layer(plan, at, *rest),
    )
    with watched_stream() as (_, seen, _):
        attempt("both", resume=True)
    assert layers == [2]
    assert all(torch.equal(*pair) for pair in zip(seen[2], expected[2], strict=True))


@pytest.mark.parametrize(
    "other", [{"sequential": False}, {"compensate": "none"}, {"compensate.strength": 1}]
)
def test_with_another_compensation_or_stream_it_can_not_be_resumed(attempt, other):
    start_and_kill(attempt, "both", "before layer 2")
    with pytest.raises(UpcycleError, match="begun with another source, text, recipe or version"):
        attempt("both", resume=True, **other)


@variants
def test_nothing_that_was_put_aside_is_published(convert, variant):
    names = {path.name for path in convert().out.iterdir()}
    assert {path.name for path in convert(**VARIANTS[variant]).out.iterdir()} == names


def test_a_run_that_fails_leaves_nothing_that_was_put_aside(attempt, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(conversion, "run_check", fail)
    with pytest.raises(RuntimeError, match="broken"):
        attempt("both")
    assert list(tmp_path.iterdir()) == []


@variants
def test_same_request_same_bytes(convert, attempt, tmp_path, variant):
    attempt(variant)
    assert content(tmp_path / "out") == content(convert(**VARIANTS[variant]).out)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "copy", "router": "normal", **REFIT}, "least_squares` goes with a split"),
        ({"method": "drop", "router": "normal", **REFIT}, "least_squares` goes with a split"),
        ({"compensate": "last_squares"}, "'last_squares', did you mean 'least_squares'"),
        ({"compensate": "some"}, "unknown compensation 'some'"),
        ({"compensate": {"name": "least_squares", "strength": 0}}, "strength=0: input should be"),
        ({"compensate": {"name": "least_squares", "strength": "a lot"}}, "strength='a lot': input"),
        ({"compensate": {"name": "least_squares", "strngth": 1}}, "did you mean 'strength'"),
        ({"compensate": {"name": "none", "strength": 1}}, "no parameter 'strength'; it has none"),
        ({"compensate": "none", "compensate.strength": 1}, "'none' has no parameter 'strength'"),
        ({"compensate": 3}, "compensate=3: give a method's name"),
        ({"sequential": "maybe"}, "sequential='maybe': input should be"),
    ],
)  # fmt: skip
def test_the_plan_refuses_in_one_sentence(dense, settings, words):
    with pytest.raises(UpcycleError) as caught:
        upcycle.plan(str(dense()), **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_text_is_refused(dense):
    with pytest.raises(UpcycleError, match="`calibration=none`"):
        upcycle.plan(str(dense()), calibration="none", check="none", **SEQUENTIAL)
