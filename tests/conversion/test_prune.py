"""Pruned copies: which neurons an expert keeps, how it is refit, what is written and said."""

import math
from types import SimpleNamespace

import pytest
import torch
from reference import (
    TOLERANCE,
    dense_logits,
    experts,
    gap,
    load,
    load_all_alike,
    logits,
    moe_layers,
    naive_weights,
    routers,
    weights,
)
from tiny import once
from torch.nn.functional import silu
from typer.testing import CliRunner

import upcycle
from upcycle import CheckFailed, UpcycleError
from upcycle.cli import app
from upcycle.console.output import out
from upcycle.conversion import writing
from upcycle.conversion.converted import ConvertedLayer
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.conversion.recipe import load_recipe
from upcycle.conversion.ways.prune import ALL_TOKENS, overall_strength, strongest_neurons
from upcycle.core.types import DenseFFN, LayerActivations
from upcycle.evaluation.page import origin
from upcycle.models.record.file import read_record

EXPERTS, SEQ_LEN, GAIN = 4, 64, {"qwen2_moe": 4, "mixtral": 1, "glm4_moe": 1}
PRUNE = {
    "method": "prune",
    "experts": EXPERTS,
    "keep_dense": [],
    "compensate": "none",
    "sequential": False,
    "calibration_tokens": 8 * SEQ_LEN,
    "seq_len": SEQ_LEN,
}
TARGETS = pytest.mark.parametrize(
    ("family", "target"), [("llama", "qwen2_moe"), ("llama", "glm4_moe"), ("mistral", "mixtral")]
)


@pytest.fixture(autouse=True, scope="module")
def short_check():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHECK_TOKENS, "fast", 64)
        yield


@pytest.fixture(scope="module")
def convert(dense, text, tmp_path_factory):
    """Converts a tiny model, once per settings, and notes what its layers were fitted on."""

    @once
    def run(family="llama", target="qwen2_moe", **settings):
        out, seen = tmp_path_factory.mktemp("prune") / "out", {}
        original = writing.convert_layer

        def watch(plan, layer, ffn, activations, norm_T, *fitted):
            *unused, _ = fitted
            assert set(unused) == {None}
            seen[layer] = activations.x_TD.clone(), norm_T.clone()
            return original(plan, layer, ffn, activations, norm_T, *fitted)

        settings = PRUNE | {"target": target, "calibration": str(text)} | settings
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writing, "convert_layer", watch)
            done = upcycle.convert(str(dense(family)), out, **settings)
        return SimpleNamespace(source=dense(family), out=out, seen=seen, done=done)

    return run


# --- which neurons ---------------------------------------------------------------------------


def random_ffn(rng):
    return DenseFFN(*(torch.randn(s, generator=rng) for s in ((24, 8), (24, 8), (8, 24))), silu)


def naive_strength(ffn, x_TD, weight_T):
    """Neuron by neuron and token by token."""
    h_TF, tokens, neurons = ffn.hidden(x_TD).double(), range(len(x_TD)), range(ffn.num_neurons)
    length_F = [float(ffn.down_DF[:, i].double().square().sum()) for i in neurons]
    return [
        sum(float(weight_T[t] * h_TF[t, i] ** 2) * length_F[i] for t in tokens) / len(x_TD)
        for i in neurons
    ]


def test_an_expert_keeps_what_puts_out_most_on_its_own_tokens():
    rng = torch.Generator().manual_seed(0)
    ffn = random_ffn(rng)
    x_TD, weight_T = torch.randn(50, 8, generator=rng), torch.rand(50, generator=rng)
    overall_F = torch.rand(24, generator=rng) / ALL_TOKENS
    kept = strongest_neurons(LayerActivations(ffn, x_TD), weight_T, overall_F, 10)
    score_F = torch.tensor(naive_strength(ffn, x_TD, weight_T)) + ALL_TOKENS * overall_F
    assert kept.tolist() == sorted(sorted(range(24), key=lambda i: -score_F[i])[:10])


def test_an_expert_without_tokens_keeps_what_is_strongest_overall():
    rng = torch.Generator().manual_seed(1)
    ffn, overall_F = random_ffn(rng), torch.rand(24, generator=rng)
    nothing = LayerActivations(ffn, torch.empty(0, 8))
    kept = strongest_neurons(nothing, torch.empty(0), overall_F, 10)
    assert torch.equal(kept, overall_F.topk(10).indices.sort().values)


def test_what_is_strongest_overall_is_seen_on_a_sample(monkeypatch):
    monkeypatch.setattr("upcycle.conversion.ways.prune.RANKING_TOKENS", 10)
    rng = torch.Generator().manual_seed(2)
    ffn, x_TD = random_ffn(rng), torch.randn(50, 8, generator=rng)
    weight_T = torch.rand(50, generator=rng)
    overall_F = overall_strength(LayerActivations(ffn, x_TD), weight_T)
    expected_F = torch.tensor(naive_strength(ffn, x_TD[::5], weight_T[::5]))
    torch.testing.assert_close(overall_F.double(), expected_F.double(), rtol=1e-4, atol=0)


# --- what is written -------------------------------------------------------------------------


def counted(run, target, layer):
    """What each expert counts by the stored router for what the layer was fitted on [T, E]."""
    router_ED = routers(load(run.out))[layer].weight.data.double()
    return naive_weights(target, run.seen[layer][0].double() @ router_ED.T, top_k=1)


def kept_neurons(run, layer):
    record = moe_layers(run.out)[layer]
    return torch.tensor(record["permutation"]).view(EXPERTS, -1)


def source_ffn(run, layer):
    tensors = weights(run.source)
    matrices = (
        tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
    )
    return DenseFFN(*matrices, silu)


@pytest.mark.parametrize("active", [0.5, 0.25])
@TARGETS
def test_experts_hold_the_sources_neurons(convert, family, target, active):
    run = convert(family, target, active=active)
    for layer in range(3):
        ffn, written = source_ffn(run, layer), experts(load(run.out))[layer]
        neurons_EM = kept_neurons(run, layer)
        assert neurons_EM.shape[1] == active * ffn.num_neurons
        for expert, neurons_M in enumerate(neurons_EM):
            gate_MD, up_MD = written.gate_up_proj.data[expert].chunk(2)
            assert torch.equal(gate_MD, ffn.gate_FD[neurons_M])
            assert torch.equal(up_MD, ffn.up_FD[neurons_M])
            down_DM = written.down_proj.data[expert] / GAIN[target]
            assert torch.equal(down_DM, ffn.down_DF[:, neurons_M])


def naive_refit(ffn, neurons_M, x_TD, norm_T, count_T, strength=0.3, jitter=1e-6):
    """The normal equations of one expert's neurons on its own tokens, for each of which it counts
    so much, in float64. Columns are held to the dense ones times the factor that makes the counted
    activations most like the others."""
    gate_FD, up_FD, down_DF = (m.double() for m in (ffn.gate_FD, ffn.up_FD, ffn.down_DF))
    h_TF = silu(x_TD.double() @ gate_FD.T) * (x_TD.double() @ up_FD.T)
    on_TM = h_TF[:, neurons_M] * count_T[:, None]
    weighted_MT = on_TM.T / norm_T.double() ** 2
    moment_M = (weighted_MT @ on_TM).diagonal()
    old_DM = down_DF[:, neurons_M] * (weighted_MT @ h_TF[:, neurons_M]).diagonal() / moment_M
    penalty_MM = (strength * moment_M + jitter * moment_M.mean()).diag()
    wanted_MD = weighted_MT @ h_TF @ down_DF.T + penalty_MM @ old_DM.T
    return torch.linalg.solve(weighted_MT @ on_TM + penalty_MM, wanted_MD).T


@pytest.mark.parametrize("sequential", [False, True])
@TARGETS
def test_each_expert_is_refit_on_its_own_tokens(convert, family, target, sequential):
    run = convert(family, target, compensate="least_squares", sequential=sequential)
    for layer in range(3):
        ffn, (x_TD, norm_T) = source_ffn(run, layer), run.seen[layer]
        written_EDM = experts(load(run.out))[layer].down_proj.data / GAIN[target]
        weight_TE = counted(run, target, layer)
        assert weight_TE.max() > 1.01 or target == "mixtral"  # whose only expert always counts 1
        for expert, neurons_M in enumerate(kept_neurons(run, layer)):
            own = weight_TE[:, expert] > 0
            expected_DM = naive_refit(
                ffn, neurons_M, x_TD[own], norm_T[own], weight_TE[own, expert]
            )
            assert gap(written_EDM[expert], expected_DM) < 1e-4
            assert gap(ffn.down_DF[:, neurons_M], expected_DM) > 0.1


def test_descent_changes_an_experts_own_copies_of_neurons(convert, monkeypatch):
    monkeypatch.setattr("upcycle.conversion.compensate.descent.BATCH", 16)
    descent = {"compensate": {"name": "descent", "rate": 0.1}, "calibration_tokens": 40 * SEQ_LEN}
    run = convert(**descent, sequential=True)
    assert run.done.check.exact_error < 1e-3
    changed = 0
    for layer in range(3):
        gate_FD, written = source_ffn(run, layer).gate_FD, experts(load(run.out))[layer]
        for expert, neurons_M in enumerate(kept_neurons(run, layer)):
            gate_MD = written.gate_up_proj.data[expert].chunk(2)[0]
            changed += not torch.equal(gate_MD, gate_FD[neurons_M])
            assert gap(gate_MD, gate_FD[neurons_M]) < 0.5
    assert changed


@TARGETS
def test_all_experts_on_are_the_sum_of_the_pruned_copies(convert, family, target):
    """In the dense model's place for its FFNs, as they are read from the checkpoint."""
    run = convert(family, target, compensate="least_squares", sequential=True)
    model = load(run.source)
    for layer, written in zip(model.model.layers, experts(load(run.out)), strict=True):
        layer.mlp = Sum(written.gate_up_proj.data, written.down_proj.data / GAIN[target])
    assert gap(logits(load_all_alike(run.out)), logits(model)) < TOLERANCE["mean"]
    assert gap(dense_logits(run.source), logits(model)) > 0.1


class Sum(torch.nn.Module):
    def __init__(self, gate_up_EMD, down_EDM):
        super().__init__()
        self.gate_up_EMD, self.down_EDM = gate_up_EMD, down_EDM

    def forward(self, x_BLD):
        total = torch.zeros_like(x_BLD)
        for gate_up_MD, down_DM in zip(self.gate_up_EMD, self.down_EDM, strict=True):
            gate_MD, up_MD = gate_up_MD.chunk(2)
            total += (silu(x_BLD @ gate_MD.T) * (x_BLD @ up_MD.T)) @ down_DM.T
        return total


def test_tokens_reach_their_expert_a_batch_at_a_time(monkeypatch):
    """Against each token alone, through the expert of its largest logit, times its sigmoid."""
    tokens, hidden, neurons, experts = 40, 16, 8, 3
    rng = torch.Generator().manual_seed(0)
    x_TD, router_ED = (torch.randn(n, hidden, generator=rng) for n in (tokens, experts))
    gate_FD, up_FD = torch.randn(2, experts * neurons, hidden, generator=rng)
    ffn = DenseFFN(gate_FD, up_FD, torch.randn(hidden, experts * neurons, generator=rng), silu)
    converted = ConvertedLayer.of_pruned(ffn, torch.arange(experts * neurons) % 12, router_ED)
    monkeypatch.setattr("upcycle.conversion.converted.BATCH_TOKENS", 7)

    def weigh(logits_TE):
        top_T1 = logits_TE.topk(1)
        return torch.zeros_like(logits_TE).scatter(1, top_T1.indices, top_T1.values.sigmoid())

    y_TD = converted.output(LayerActivations(ffn.take(torch.arange(12)), x_TD), weigh)
    for x_D, y_D in zip(x_TD, y_TD, strict=True):
        expert = int((router_ED @ x_D).argmax())
        count = 1 / (1 + math.exp(-float(router_ED[expert] @ x_D)))
        own = ffn.take(torch.arange(expert * neurons, (expert + 1) * neurons))
        torch.testing.assert_close(y_D, count * own(x_D), rtol=1e-4, atol=1e-5)


# --- the check -------------------------------------------------------------------------------


def with_one_neuron_silent(self, *where):
    down_DF = self.ffn.down_DF.clone()
    down_DF[:, 17] = 0
    pruned = DenseFFN(self.ffn.gate_FD, self.ffn.up_FD, down_DF, self.ffn.act)
    return EXPERTS_OF(ConvertedLayer.of_pruned(pruned, self.origin_F, self.router_ED), *where)


EXPERTS_OF = ConvertedLayer.experts


@pytest.mark.parametrize("compensate", ["none", "least_squares"])
@TARGETS
def test_an_expert_that_is_written_wrong_is_caught(
    dense, text, tmp_path, monkeypatch, family, target, compensate
):
    monkeypatch.setattr(ConvertedLayer, "experts", with_one_neuron_silent)
    settings = PRUNE | {"target": target, "compensate": compensate, "sequential": True}
    with pytest.raises(CheckFailed, match="is not the dense model's equal"):
        upcycle.convert(str(dense(family)), tmp_path / "out", calibration=str(text), **settings)
    assert list(tmp_path.iterdir()) == []


# --- how many of everything, and what goes with it -------------------------------------------


def plan(dense, **settings):
    return upcycle.plan(str(dense(**settings.pop("sizes", {}))), method="prune", **settings)


def test_a_copy_keeps_the_active_share(dense):
    made = plan(dense, active=0.3, keep_dense=[])
    neurons = made.source.arch.intermediate_size
    assert made.design.geometry.expert_size == int(0.3 * neurons) // 8 * 8
    assert made.active_ffn_ratio == made.design.geometry.expert_size / neurons
    assert (made.design.geometry.top_k, made.design.geometry.num_experts) == (1, 8)


def test_layers_kept_dense_are_paid_by_the_others(dense):
    made = plan(dense, active=0.5, keep_dense=[0])
    neurons, layers = made.source.arch.intermediate_size, made.source.arch.num_layers
    assert (
        made.design.geometry.expert_size
        == int((0.5 * layers - 1) / (layers - 1) * neurons) // 8 * 8
    )
    assert made.active_ffn_ratio <= 0.5


def test_copies_of_wide_ffns_suit_gpus(dense):
    wide = {"intermediate_size": 4096}
    assert plan(dense, sizes=wide, active=0.45, keep_dense=[]).design.geometry.expert_size == 1792
    assert plan(dense, sizes=wide, active=0.2, keep_dense=[]).design.geometry.expert_size == 816


def test_parameters_are_counted(convert):
    run = convert(active=0.25)
    tensors = weights(run.out).values()
    assert run.done.plan.params_total == sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 2}, "`top_k=2` goes with a split or copies"),
        ({"shared": 0.25}, "`shared=0.25` goes with a split"),
        ({"granularity": 2}, "`granularity=2` goes with copies"),
        ({"router": "ridge"}, "`router=ridge` has nothing to tell copies apart by"),
        ({"active": 0.001, "keep_dense": []}, "`active=0.001` leaves less than 8 of"),
        ({"active": 0.3, "keep_dense": [0]}, "with 1 of 3 layers dense, leaves less than 8 of"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(dense, settings, words):
    with pytest.raises(UpcycleError) as refusal:
        plan(dense, **settings)
    assert words in str(refusal.value)


def test_it_takes_over_what_makes_up_for_losses_from_a_recipe_of_a_split():
    said, default = load_recipe("default", {"method": "prune"}), load_recipe("default")
    for field in ("compensate", "sequential", "keep_dense"):
        assert getattr(said, field) == getattr(default, field)
    assert said.router is None
    assert load_recipe("cmoe", {"method": "prune"}).experts is None


def test_layers_to_keep_dense_are_measured(convert):
    run = convert(keep_dense="auto", active=0.6, compensate="least_squares", sequential=True)
    assert len(run.done.dense_layers.damage) == 3
    assert run.done.dense_layers.layers == run.done.plan.spec.dense_layers
    kept = len(run.done.plan.spec.dense_layers)
    assert len(moe_layers(run.out)) == 3 - kept
    assert run.done.plan.active_ffn_ratio <= 0.6


def test_the_card_says_what_it_is(convert):
    card = (convert(compensate="least_squares", sequential=True).out / "README.md").read_text()
    assert "copied into 4 experts, each pruned to the" in card
    assert "refit down_proj in closed form" in card
    assert "split `" not in card


def test_so_does_the_page(convert):
    run = convert(compensate="least_squares", sequential=True)
    made = read_record(run.out / "upcycle.json")
    told = dict(origin.conversion(made)["facts"])
    assert told["Method"] == "pruned copies, each layer fitted on the converted layers before it"
    assert told["Compensation"] == "least squares"
    assert told["Exactness"].startswith("with all experts on")
    assert "Split by" not in told


def test_so_does_the_command(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(out, "_width", 200)
    options = {"method": "prune", "experts": 4, "keep-dense": "none", "calibration": text}
    sizes = {"calibration-tokens": 512, "seq-len": 64, "active": 0.5}
    words = [str(word) for key, of in (options | sizes).items() for word in (f"--{key}", of)]
    said = {}
    for command, place in (("plan", []), ("convert", ["-o", str(tmp_path / "out")])):
        arguments = [command, str(dense()), *place, *words]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.stderr
        said[command] = " ".join(result.stdout.split())
    neurons = load(dense()).config.intermediate_size // 2
    methods = "pruned copies, router membership, compensation least_squares, layer by layer"
    assert methods in said["plan"]
    assert f"1 of 4 per token, {neurons} neurons each" in said["plan"]
    assert methods in said["convert"]
    assert "A token uses 50 % of each FFN: 1 of 4 pruned copies." in said["convert"]
    assert "tokens that nothing was fitted on" in said["convert"]
