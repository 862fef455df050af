"""The check: it catches what is broken, and its numbers are the ones that plain loops give."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from models import PLAIN_SPLIT, SIZES
from reference import load, routers, selections
from typer.testing import CliRunner

import upcycle
from upcycle import CheckFailed, UpcycleError, check, conversion, planning
from upcycle import layer as one_layer
from upcycle.assemble import assemble_head
from upcycle.cli import app
from upcycle.split import SPLITS
from upcycle.targets import base

TOKENS = 128
SETTINGS = PLAIN_SPLIT | {"calibration_tokens": 128, "seq_len": 64}


@pytest.fixture(autouse=True)
def short_check(monkeypatch):
    monkeypatch.setitem(planning.CHECK_TOKENS, "fast", TOKENS)


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


def test_router_that_is_not_tempered_is_caught(dense, out, monkeypatch):
    monkeypatch.setattr(one_layer, "temper", lambda router_ED, x_TD, dtype: router_ED)
    assert_caught(dense, out, BROKEN)


def test_tensor_under_a_wrong_name_is_caught(dense, out, monkeypatch):
    def misspelt(outer):
        for name, tensor in assemble_head(outer):
            yield name.replace("norm", "nrom"), tensor

    for module in (planning, conversion):
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
def checked(request, dense, tmp_path_factory):
    """A finished conversion, the held-back tokens, and both models by plain transformers."""
    family, settings = request.param
    out = tmp_path_factory.mktemp("checked") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(planning.CHECK_TOKENS, "fast", TOKENS)
        done = upcycle.convert(str(dense(family)), out, **SETTINGS | settings)
        _, held_BL = conversion._tokens(done.plan)
    return SimpleNamespace(done=done, tokens=held_BL, dense=load(dense(family)), moe=load(out))


@torch.no_grad()
def probabilities(model, window):
    return model(input_ids=window[None], use_cache=False).logits[0].double().softmax(-1)


def naive_perplexity(model, windows):
    losses = []
    for window in windows:
        p = probabilities(model, window)
        losses += [-p[i, window[i + 1]].log().item() for i in range(len(window) - 1)]
    return torch.tensor(losses).mean().exp().item()


def test_perplexities_are_those_of_a_plain_loop(checked):
    report = checked.done.check
    dense, moe = (naive_perplexity(model, checked.tokens) for model in (checked.dense, checked.moe))
    assert report.perplexity_dense == pytest.approx(dense, rel=1e-4)
    assert report.perplexity_moe == pytest.approx(moe, rel=1e-4)
    assert report.perplexity_ratio == pytest.approx(moe / dense, rel=2e-4)
    assert abs(report.perplexity_ratio - 1) > 0.01  # so that a mix-up would show


def test_divergence_is_that_of_a_plain_loop(checked):
    divergences = []
    for window in checked.tokens:
        p, q = probabilities(checked.dense, window), probabilities(checked.moe, window)
        divergences += [(p[i] * (p[i] / q[i]).log()).sum().item() for i in range(len(window))]
    assert checked.done.check.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-3)


def test_agreement_is_that_of_a_plain_loop(checked):
    same = []
    for window in checked.tokens:
        p, q = probabilities(checked.dense, window), probabilities(checked.moe, window)
        same += [int(p[i].argmax() == q[i].argmax()) for i in range(len(window))]
    expected = sum(same) / len(same)
    assert checked.done.check.top1_agreement == pytest.approx(expected, abs=2 / TOKENS)


def test_load_is_that_of_a_plain_count(checked):
    report, geometry = checked.done.check, checked.done.plan.geometry
    counts = [[0] * geometry.num_experts for _ in checked.done.plan.moe_layers]
    for window in checked.tokens:
        with selections(checked.moe) as selected:
            probabilities(checked.moe, window)
        for layer, chosen_TK in enumerate(selected):
            for expert in chosen_TK.flatten().tolist():
                counts[layer][expert] += 1
    fair = checked.tokens.numel() * geometry.top_k / geometry.num_experts
    assert report.load == [[pytest.approx(n / fair, abs=1e-4) for n in layer] for layer in counts]
    assert report.dead_experts == sum(n == 0 for layer in counts for n in layer)


def test_sizes_are_those_of_the_held_back_tokens(checked):
    assert (checked.done.check.tokens, checked.done.check.window) == (TOKENS, 64)


@pytest.mark.parametrize(
    ("level", "seq_len", "tokens"),
    [("fast", 64, 128), ("fast", 100, 200), ("full", 512, 16384), ("none", 64, 0)],
)
def test_level_sets_how_much_text_is_held_back(dense, level, seq_len, tokens):
    assert upcycle.plan(str(dense()), check=level, seq_len=seq_len).held_tokens == tokens


def test_copies_equal_the_dense_model_to_rounding(dense, out):
    report = upcycle.convert(str(dense()), out, method="copy", **SETTINGS).check
    assert report.exact_error < 1e-5
    assert report.kl < 1e-5
    assert report.top1_agreement > 0.98
    assert report.perplexity_ratio == pytest.approx(1, abs=1e-5)


def test_copies_agree_with_the_dense_model_on_every_token(dense, out):
    report = upcycle.convert(str(dense()), out, method="copy", **SETTINGS).check
    assert report.top1_agreement == 1


def test_split_equals_the_dense_model_with_all_experts_on(dense, out):
    report = upcycle.convert(str(dense()), out, **SETTINGS | {"top_k": 1}).check
    assert report.exact_error < report.exact_tolerance == 1e-2
    assert report.kl > 0.01


def test_changed_copies_are_not_asked_to_be_exact(dense, out):
    assert upcycle.convert(str(dense()), out, method="drop", **SETTINGS).check.exact_error is None


def test_models_are_compared_in_float32_whatever_they_are_stored_in(dense, out, monkeypatch):
    dtypes, load_model = [], check.load_model
    monkeypatch.setattr(
        check,
        "load_model",
        lambda folder, dtype, device: dtypes.append(dtype) or load_model(folder, dtype, device),
    )
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
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**6))
    with pytest.raises(UpcycleError, match=r"0\.0 GB of memory are free: pass --check none"):
        upcycle.convert(str(dense()), out, **SETTINGS)
    assert list(out.parent.iterdir()) == []


def test_memory_does_not_grow_with_tokens_times_vocabulary(dense):
    def needed(*dtype, **settings):
        return upcycle.plan(str(dense()), seq_len=64, **settings).check_bytes(*dtype)

    assert needed(check="none") == 0
    more_tokens = planning.CHECK_TOKENS["full"] - TOKENS
    assert needed(check="full") - needed(check="fast") == more_tokens * SIZES["hidden_size"] * 4
    plan = upcycle.plan(str(dense()), seq_len=64)
    head = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    hidden = TOKENS * SIZES["hidden_size"] * 4
    assert needed() == plan.bytes + head + hidden + 600 * 2**20
    stored = needed(dtype="bfloat16")
    assert needed(torch.float32, dtype="bfloat16") - 600 * 2**20 == 2 * (stored - 600 * 2**20)


@pytest.mark.parametrize(("spare", "dtype"), [(0, torch.bfloat16), (1, torch.float32)])
def test_models_are_compared_in_what_fits(dense, monkeypatch, spare, dtype):
    plan = upcycle.plan(str(dense(dtype=torch.bfloat16)), dtype="bfloat16")
    free = SimpleNamespace(available=plan.check_bytes(torch.float32) + spare)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert check._dtype_that_fits(plan) == dtype
