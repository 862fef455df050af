"""The check: it catches what is broken, and its numbers are the ones that plain loops give."""

import math
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from reference import load, routers, selections
from tiny import PLAIN_SPLIT, SIZES
from typer.testing import CliRunner

import upcycle
from upcycle import CheckFailed, UpcycleError
from upcycle.cli import app
from upcycle.conversion import check, dry_run, writing
from upcycle.conversion import run as conversion
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.evaluation import result as comparison
from upcycle.evaluation.comparing import Comparison
from upcycle.evaluation.verdict import verdict
from upcycle.models.assemble import assemble_head
from upcycle.models.record.check import CheckReport, KindResult, check_summary
from upcycle.models.targets import base
from upcycle.models.text import PROBES
from upcycle.split import SPLITS

TOKENS = 128
SETTINGS = PLAIN_SPLIT | {"router_spread": 0.1, "calibration_tokens": 128, "seq_len": 64}


@pytest.fixture(autouse=True)
def short_check(monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", TOKENS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def assert_caught(dense, out, words, **settings):
    """The conversion fails its check, and leaves nothing."""
    with pytest.raises(CheckFailed, match=words):
        upcycle.convert(str(dense()), out, **SETTINGS | settings)
    assert list(out.parent.iterdir()) == []


# --- what is broken on purpose ---------------------------------------------------------------

BROKEN = "the finished checkpoint is not the dense model's equal"
MISROUTED = "does not select and weight experts as planned"


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral"])
def test_lost_gain_is_caught(dense, out, monkeypatch, target):
    monkeypatch.setattr(base, "with_gain", lambda ffn, gain: ffn)
    assert_caught(dense, out, BROKEN, target=target)


def test_gain_that_is_one_percent_off_is_caught_in_copies(dense, out, monkeypatch):
    off = 1.01
    monkeypatch.setattr(
        base, "with_gain", lambda ffn, gain: replace(ffn, down_DF=ffn.down_DF * gain * off)
    )
    assert_caught(dense, out, BROKEN, method="copy")


def test_gain_that_is_wrong_for_this_top_k_only_is_caught(dense, out, monkeypatch):
    """With all experts on, renormalised weights look right."""
    gains = base.MoETarget.gains
    monkeypatch.setattr(
        base.MoETarget, "gains", lambda *args: replace(gains(*args), norm_topk_prob=True)
    )
    words = "the selected experts count 7 times instead of 2"
    assert_caught(dense, out, words, target="qwen2_moe", experts=7)


def test_scale_that_is_wrong_for_this_top_k_only_is_caught(dense, out, monkeypatch):
    load_result = check.load_result

    def rescaled(*args):
        model = load_result(*args)
        for router in routers(model):
            router.register_forward_hook(rescale)
        return model

    def rescale(router, _, output):
        return tuple(
            t * 1.03 if t.shape[-1:] == (2,) and t.is_floating_point() else t for t in output
        )

    monkeypatch.setattr(check, "load_result", rescaled)
    assert_caught(dense, out, MISROUTED, target="mixtral")


def test_experts_that_are_selected_by_something_else_are_caught(dense, out, monkeypatch):
    """A bias that the router adds for the selection only: with all experts on it says nothing."""
    load_result = check.load_result

    def biased(*args):
        model = load_result(*args)
        model.model.layers[1].mlp.gate.e_score_correction_bias[0] += 1
        return model

    monkeypatch.setattr(check, "load_result", biased)
    assert_caught(dense, out, f"the router of layer 1 {MISROUTED}", target="glm4_moe")


@pytest.mark.parametrize("method", ["split", "copy"])
def test_swapped_gate_and_up_are_caught(dense, out, monkeypatch, method):
    separate = base.separate

    def swapped(prefix, ffn, names):
        return separate(prefix, replace(ffn, gate_FD=ffn.up_FD, up_FD=ffn.gate_FD), names)

    monkeypatch.setattr(base, "separate", swapped)
    assert_caught(dense, out, BROKEN, method=method)


def test_neurons_in_two_experts_are_caught(dense, out, monkeypatch):
    contiguous = SPLITS["contiguous"]

    def doubled(*arguments):
        experts_EM = contiguous.run(*arguments)
        experts_EM[1] = experts_EM[0]
        return experts_EM

    monkeypatch.setitem(SPLITS._entries, "contiguous", replace(contiguous, run=doubled))
    assert_caught(dense, out, BROKEN, split="contiguous")


def test_tensor_under_a_wrong_name_is_caught(dense, out, monkeypatch):
    def misspelt(*arguments):
        for name, tensor in assemble_head(*arguments):
            yield name.replace("norm", "nrom"), tensor

    for module in (dry_run, writing):
        monkeypatch.setattr(module, "assemble_head", misspelt)
    assert_caught(dense, out, "does not load whole: ")


def test_expert_under_a_wrong_name_is_caught(dense, out, monkeypatch):
    separate = base.separate

    def misspelt(prefix, ffn, names):
        for name, tensor in separate(prefix, ffn, names):
            yield name.replace("up_proj", "upp_proj"), tensor

    monkeypatch.setattr(base, "separate", misspelt)
    assert_caught(dense, out, "does not load")


def test_command_line_asks_to_report_it(dense, out, monkeypatch):
    monkeypatch.setattr(base, "with_gain", lambda ffn, gain: ffn)
    arguments = ["convert", str(dense()), "-o", str(out)]
    arguments += ["--calibration-tokens", "128", "--seq-len", "64"]
    arguments += ["--calibration", "builtin", "--keep-dense", "none"]
    result = CliRunner().invoke(app, arguments)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 1
    assert last.startswith(f"error: {BROKEN}: its logits differ by ")
    assert last.endswith("please report this")


# --- its numbers -----------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        ("llama", {"shared": 0.25, "top_k": 3}),
        ("granite", {"experts": 4, "top_k": 2}),
        ("llama", {"target": "glm4_moe", "keep_dense": [0]}),
        ("qwen3", {"method": "drop", "experts": 3}),
    ],
    ids=["qwen2_moe", "granitemoeshared", "glm4_moe", "drop"],
)
def checked(request, dense, text, tmp_path_factory):
    """A finished conversion, what was held back of each kind, and both models by transformers."""
    family, settings = request.param
    out, calibration = tmp_path_factory.mktemp("checked") / "out", {"calibration": str(text)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHECK_TOKENS, "fast", TOKENS)
        done = upcycle.convert(str(dense(family)), out, **SETTINGS | settings | calibration)
        held = conversion._tokens(done.plan, lambda *_: None).held
    kinds = {kind.kind: kind for kind in done.check.kinds}
    models = {"dense": load(dense(family)), "moe": load(out)}
    return SimpleNamespace(done=done, kinds=kinds, held=held, **models)


@torch.no_grad()
def probabilities(model, window):
    return model(input_ids=window[None], use_cache=False).logits[0].double().softmax(-1)


def naive_losses(model, windows):
    """The mean loss of each window."""
    losses = []
    for window in windows:
        p = probabilities(model, window)
        each = [-p[i, window[i + 1]].log().item() for i in range(len(window) - 1)]
        losses.append(sum(each) / len(each))
    return losses


def test_every_kind_of_text_has_its_own_row(checked, text):
    assert list(checked.kinds) == list(checked.held) == [str(text), *PROBES]
    for kind, result in checked.kinds.items():
        assert result.tokens == checked.held[kind].numel() == TOKENS
    assert checked.done.check.window == 64


def test_perplexities_are_those_of_a_plain_loop(checked):
    far = []
    for kind, result in checked.kinds.items():
        dense, moe = (naive_losses(m, checked.held[kind]) for m in (checked.dense, checked.moe))
        dense_mean, moe_mean = (sum(losses) / len(losses) for losses in (dense, moe))
        assert result.perplexity_dense == pytest.approx(math.exp(dense_mean), rel=1e-4)
        assert result.perplexity_moe == pytest.approx(math.exp(moe_mean), rel=1e-4)
        assert result.ratio == pytest.approx(math.exp(moe_mean - dense_mean), rel=2e-4)
        worst = max(m - d for m, d in zip(moe, dense, strict=True))
        assert result.worst_window == pytest.approx(math.exp(worst), rel=2e-4)
        far.append(abs(result.ratio - 1))
    assert max(far) > 0.01  # so that a mix-up would show
    assert len(set(far)) == len(far)


def test_divergence_is_that_of_a_plain_loop(checked):
    for kind, result in checked.kinds.items():
        divergences = []
        for window in checked.held[kind]:
            p, q = probabilities(checked.dense, window), probabilities(checked.moe, window)
            divergences += (p * (p / q).log()).sum(1).tolist()
        assert result.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)


def test_agreement_is_that_of_a_plain_loop(checked):
    for kind, result in checked.kinds.items():
        same = []
        for window in checked.held[kind]:
            p, q = probabilities(checked.dense, window), probabilities(checked.moe, window)
            same += [int(p[i].argmax() == q[i].argmax()) for i in range(len(window))]
        assert result.top1_agreement == pytest.approx(sum(same) / len(same), abs=2 / TOKENS)


def test_load_is_that_of_a_plain_count_over_all_kinds(checked):
    report, geometry = checked.done.check, checked.done.plan.design.geometry
    counts = [[0] * geometry.num_experts for _ in checked.done.plan.moe_layers]
    windows = torch.cat(list(checked.held.values()))
    for window in windows:
        with selections(checked.moe) as selected:
            probabilities(checked.moe, window)
        for layer, chosen_TK in enumerate(selected):
            for expert in chosen_TK.flatten().tolist():
                counts[layer][expert] += 1
    fair = windows.numel() * geometry.top_k / geometry.num_experts
    # A token between two experts may go to either, by rounding.
    assert report.load == [[pytest.approx(n / fair, abs=2 / fair) for n in row] for row in counts]
    assert report.dead_experts == sum(n == 0 for row in report.load for n in row)


def kind_result(kind, ratio, tokens=100):
    return KindResult(kind, tokens, 10.0, 10.0 * ratio, ratio, ratio, 0.1, 0.9)


def test_the_worst_kind_stands_for_all():
    kinds = [kind_result("a", 1.0), kind_result("b", 4.0, tokens=50), kind_result("c", 2.0)]
    report = CheckReport(1e-6, 1e-3, kinds, ["self"], 64, [[0.0, 2.0], [1.0, 1.0]])
    assert report.worst == kinds[1]
    assert report.perplexity_ratio == 4.0
    assert report.mean_ratio == pytest.approx(2.0)
    assert report.tokens == 250
    assert report.ratios == {"a": 1.0, "b": 4.0, "c": 2.0}
    summary = check_summary(report)
    found = [summary[key] for key in ("worst_kind", "perplexity_ratio", "dead_experts")]
    assert found == ["b", 4.0, 1]
    assert summary["mean_ratio"] == pytest.approx(2.0)
    assert [kind["kind"] for kind in summary["kinds"]] == ["a", "b", "c"]


KINDS = len(PROBES) + 1
"""Of the default: probes, which stand for the builtin text, and what the model's own holds back."""


@pytest.mark.parametrize(
    ("level", "seq_len", "tokens"),
    [
        ("fast", 64, 128),
        ("fast", 100, 200),
        ("full", 512, 4096),
        ("full", 1000, 4096),
        ("none", 64, 0),
    ],
)
def test_level_sets_how_much_text_of_each_kind_is_held_back(dense, level, seq_len, tokens):
    plan = upcycle.plan(str(dense()), check=level, seq_len=seq_len)
    assert plan.held_tokens == KINDS * tokens


def test_copies_equal_the_dense_model_to_rounding(dense, out):
    report = upcycle.convert(str(dense()), out, method="copy", **SETTINGS).check
    assert report.exact_error < 1e-5
    for kind in report.kinds:
        assert kind.kl < 1e-5
        assert kind.top1_agreement == 1
        assert kind.ratio == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "qwen2_moe"), ("llama", "glm4_moe"), ("qwen3", "qwen3_moe")]
)
def test_copies_that_are_weighted_by_plain_scores_pass(dense, out, family, target):
    """One each: nothing is renormalised, so a copy counts a little more than 1."""
    settings = SETTINGS | {"method": "copy", "experts": 32, "top_k": 1, "target": target}
    report = upcycle.convert(str(dense(family)), out, **settings).check
    assert 1e-6 < report.exact_error < report.exact_tolerance / 2


@pytest.mark.parametrize("spread", [1e-4, 0.1, 1.0])
def test_split_equals_the_dense_model_with_all_experts_alike(dense, out, spread):
    settings = SETTINGS | {"top_k": 1, "router_spread": spread}
    report = upcycle.convert(str(dense()), out, **settings).check
    assert report.exact_error < 1e-5 < report.exact_tolerance == 1e-3
    assert all(kind.kl > 0.01 for kind in report.kinds)


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("llama", "qwen2_moe"),
        ("llama", "glm4_moe"),
        ("llama", "mixtral"),
        ("qwen3", "qwen3_moe"),
        ("granite", "granitemoeshared"),
        ("olmo2", "flex_olmo"),
        ("qwen3", "laguna"),
        ("ernie4_5", "ernie4_5_moe"),
        ("youtu", "deepseek_v3"),
    ],
)
def test_models_that_fit_below_float32_only_pass_too(dense, out, monkeypatch, family, target):
    """Their routers' logits are rounded, which changes what some tokens select."""
    monkeypatch.setattr(check, "dtype_that_fits", lambda plan: torch.bfloat16)
    settings = SETTINGS | {"experts": 12, "top_k": 4, "target": target, "shared": None}
    report = upcycle.convert(str(dense(family)), out, **settings).check
    assert report.exact_error < report.exact_tolerance == 0.1


def test_changed_copies_are_not_asked_to_be_exact(dense, out):
    assert upcycle.convert(str(dense()), out, method="drop", **SETTINGS).check.exact_error is None


def test_models_are_compared_in_float32_whatever_they_are_stored_in(dense, out, monkeypatch):
    dtypes, load_model = [], check.load_model

    def load(folder, dtype, device):
        dtypes.append(dtype)
        return load_model(folder, dtype, device)

    for place in (check, comparison):  # of the dense model, and of what was made
        monkeypatch.setattr(place, "load_model", load)
    settings = {"dtype": "bfloat16", "method": "copy"}
    upcycle.convert(str(dense(dtype=torch.bfloat16)), out, **settings, **SETTINGS)
    assert dtypes == [torch.float32, torch.float32]


def test_all_experts_on_is_undone(dense, out):
    plan = upcycle.convert(str(dense()), out, target="mixtral", check="none", **SETTINGS).plan
    model = load(out)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with check._all_experts_on(model, plan):
        assert {router.top_k for router in routers(model)} == {8}
    assert {router.top_k for router in routers(model)} == {2}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- when it does not run --------------------------------------------------------------------


def test_check_none_skips_it(dense, out, monkeypatch):
    monkeypatch.setattr(conversion, "run_check", lambda *_: pytest.fail("checked"))
    assert upcycle.convert(str(dense()), out, check="none", **SETTINGS).check is None
    assert out.is_dir()


def test_too_little_memory_says_what_to_do_and_leaves_nothing(dense, out, monkeypatch):
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6, total=2**40)
    )
    with pytest.raises(UpcycleError, match=r"0\.0 GB of memory are free: pass `check=none`"):
        upcycle.convert(str(dense()), out, **SETTINGS)
    assert list(out.parent.iterdir()) == []


def test_memory_does_not_grow_with_tokens_times_vocabulary(dense):
    def needed(*dtype, **settings):
        return upcycle.plan(str(dense()), seq_len=64, **settings).check_bytes(*dtype)

    assert needed(check="none") == 0
    more_tokens = CHECK_TOKENS["full"] - TOKENS
    more = KINDS * more_tokens * SIZES["hidden_size"] * 4
    assert needed(check="full") - needed(check="fast") == more
    plan = upcycle.plan(str(dense()), seq_len=64)
    head = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    hidden = KINDS * TOKENS * SIZES["hidden_size"] * 4
    assert needed() == plan.bytes + head + hidden + 600 * 2**20
    stored = needed(dtype="bfloat16")
    assert needed(torch.float32, dtype="bfloat16") - 600 * 2**20 == 2 * (stored - 600 * 2**20)


@pytest.mark.parametrize(("spare", "dtype"), [(0, torch.bfloat16), (1, torch.float32)])
def test_models_are_compared_in_what_fits(dense, monkeypatch, spare, dtype):
    plan = upcycle.plan(str(dense(dtype=torch.bfloat16)), dtype="bfloat16")
    free = SimpleNamespace(available=plan.check_bytes(torch.float32) + spare)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert check.dtype_that_fits(plan) == dtype


def test_a_ratio_that_is_no_number_is_the_worst():
    compared = Comparison([math.nan], [1.0], kl=0.0, top1_agreement=0.0, pairs=[])
    assert check._kind("web", 64, compared).ratio == math.inf
    fine = kind_result("a", 1.0)
    report = CheckReport(None, 1e-3, [fine, check._kind("web", 64, compared)], [], 64, [[1.0]])
    assert report.worst.kind == "web"
    assert verdict(report.ratios).grade == "broken"
