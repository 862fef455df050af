"""Evaluation: its numbers are those of plain loops, alone and against the dense model."""

import json
import math
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from reference import load, read_json, selections
from tiny import SIZES, make_tokenizer

from upcycle import UpcycleError
from upcycle.evaluation import comparing, speed
from upcycle.evaluation import run as stage
from upcycle.evaluation.measured import Evaluation, TextResult, evaluation_summary
from upcycle.evaluation.opening import choose_dtype
from upcycle.evaluation.run import evaluate
from upcycle.models.blocks import moe_blocks
from upcycle.models.tokens import open_reader

LENGTH = {"tokens": 192, "seq_len": 64}
WINDOWS = LENGTH["tokens"] // LENGTH["seq_len"]


def test_experts_without_a_known_router_are_no_dense_model():
    layer = torch.nn.Module()
    layer.gate = torch.nn.Linear(4, 2)
    layer.experts = torch.nn.Module()
    layer.experts.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 3))
    with pytest.raises(UpcycleError, match="layer 0 of ModuleList has experts, but no router"):
        moe_blocks(torch.nn.ModuleList([layer]))


@pytest.fixture(scope="session")
def split(dense, moe):
    return moe(dense(), experts=8, top_k=2)


@pytest.fixture(scope="session")
def other_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("Counting to a thousand: " + " ".join(map(str, range(1000))))
    return path


def naive_log_probs(folder, text):
    model = load(folder)
    reader = open_reader(folder, SIZES["vocab_size"])
    windows = reader.windows(str(text), WINDOWS, LENGTH["seq_len"], seed=0)
    with torch.no_grad():
        return windows, model(windows).logits.double().log_softmax(-1)


def naive_perplexity(windows, log_probs):
    losses = [
        -log_probs[b, t, windows[b, t + 1]].item()
        for b in range(len(windows))
        for t in range(windows.shape[1] - 1)
    ]
    return math.exp(sum(losses) / len(losses))


def on_one_text(model, text, **settings) -> TextResult:
    (result,) = evaluate(str(model), [str(text)], **LENGTH, **settings).texts
    return result


# --- texts -----------------------------------------------------------------------------------


def test_perplexity_alone(dense, text):
    result = on_one_text(dense(), text)
    assert result.text == str(text)
    assert result.perplexity == pytest.approx(naive_perplexity(*naive_log_probs(dense(), text)))
    assert result.perplexity_against is result.perplexity_ratio is None
    assert result.kl is result.top1_agreement is result.worst_window_ratio is None


def assert_naive(result, dense_folder, folder, text):
    """The numbers are those of loops over everything that both models say."""
    windows, expected = naive_log_probs(dense_folder, text)
    _, actual = naive_log_probs(folder, text)
    kl = (expected.exp() * (expected - actual)).sum(-1).mean().item()
    same = (expected.argmax(-1) == actual.argmax(-1)).double().mean().item()
    ratios = [
        naive_perplexity(windows[b : b + 1], actual[b : b + 1])
        / naive_perplexity(windows[b : b + 1], expected[b : b + 1])
        for b in range(len(windows))
    ]
    assert result.perplexity == pytest.approx(naive_perplexity(windows, actual), rel=1e-5)
    assert result.perplexity_against == pytest.approx(naive_perplexity(windows, expected), rel=1e-5)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(same, abs=1e-12)
    assert result.perplexity_ratio == result.perplexity / result.perplexity_against
    assert result.worst_window_ratio == pytest.approx(max(ratios), rel=1e-5)
    assert max(ratios) > 1.01 * result.perplexity_ratio  # so that a mix-up would show


@pytest.mark.parametrize("chunk", [2**24, 10 * SIZES["vocab_size"], 1], ids=["whole", "10", "1"])
@pytest.mark.parametrize("family", ["llama", "granite", "gemma"])
def test_against_the_dense_model(dense, moe, text, monkeypatch, family, chunk):
    monkeypatch.setattr(comparing, "CHUNK", chunk)
    folder = moe(dense(family), experts=8, top_k=2)
    result = on_one_text(folder, text, against=str(dense(family)))
    assert_naive(result, dense(family), folder, text)


def test_of_equally_likely_tokens_the_first_counts(dense, split, text, tmp_path):
    """Two tokens of a tie are the same answer only if both models would give the same one."""

    def double(weight_VD):
        weight_VD[136:] = weight_VD[:136]

    twins = [with_head(dense(), tmp_path / "dense", double), with_head(split, tmp_path, double)]
    assert_naive(on_one_text(twins[1], text, against=str(twins[0])), *twins, text)


@pytest.mark.parametrize(("sum_", "kl"), [(-1e-9, 0.0), (2.5, 2.5), (math.nan, math.nan)])
def test_a_divergence_is_never_negative(sum_, kl, monkeypatch):
    monkeypatch.setattr(comparing, "counting_pairs", nullcontext)
    monkeypatch.setattr(comparing, "decode", lambda *_: None)
    monkeypatch.setattr(comparing, "_compare_window", lambda *_: [1.0, 1.0, sum_, 1.0])
    found = comparing.compare(None, torch.zeros(1, 8), [None], lambda _: None)
    assert found.kl == pytest.approx(kl, nan_ok=True)


def test_a_model_against_itself_is_no_different(dense, text):
    result = on_one_text(dense(), text, against=str(dense()))
    assert result.perplexity_ratio == 1
    assert result.kl == pytest.approx(0, abs=1e-5)
    assert result.top1_agreement == 1


def test_several_texts_equal_single_runs(dense, split, text, other_text):
    texts = [str(text), str(other_text)]
    both = evaluate(str(split), texts, against=str(dense()), **LENGTH)
    assert both.tokens == LENGTH["tokens"]
    assert both.texts == [on_one_text(split, name, against=str(dense())) for name in texts]


def test_each_model_is_loaded_once_and_its_layers_are_alone(
    dense, split, text, other_text, monkeypatch
):
    events, load_model = [], stage.load_model

    def watched(folder, dtype, device):
        model = load_model(folder, dtype, device)
        events.append(f"{folder.name} loaded")
        weakref.finalize(model.model.layers[0].mlp, events.append, f"{folder.name} gone")
        return model

    monkeypatch.setattr(stage, "load_model", watched)
    evaluate(str(split), [str(text), str(other_text)], against=str(dense()), **LENGTH)
    names = [dense().name, split.name]
    assert events == [f"{name} {what}" for name in names for what in ("loaded", "gone")]


def test_the_builtin_text_is_not_in_the_order_that_conversions_calibrate_on(dense, monkeypatch):
    seen, compare = [], stage.compare
    monkeypatch.setattr(
        stage,
        "compare",
        lambda model, tokens, *rest: seen.append(tokens) or compare(model, tokens, *rest),
    )
    evaluate(str(dense()), ["builtin"], **LENGTH)
    reader = open_reader(dense(), SIZES["vocab_size"])
    calibrated = reader.windows("builtin", WINDOWS, LENGTH["seq_len"], seed=0)
    assert not torch.equal(seen[0], calibrated)


# --- routing, similarity, cost ---------------------------------------------------------------


def test_routing_is_over_all_texts(dense, split, text, other_text):
    report = evaluate(str(split), [str(text), str(other_text)], **LENGTH)
    model, counts = load(split), [Counter() for _ in range(3)]
    for name in (text, other_text):
        windows, _ = naive_log_probs(dense(), name)
        with selections(model) as seen, torch.no_grad():
            model(windows)
        for count, chosen in zip(counts, seen, strict=True):
            count.update(chosen.flatten().tolist())
    plan = read_json(split / "upcycle.json")["plan"]
    routed, fair = plan["experts"], 2 * LENGTH["tokens"] * 2 / plan["experts"]
    assert [layer.layer for layer in report.routing] == [0, 1, 2]
    for layer, count in zip(report.routing, counts, strict=True):
        assert layer.load == pytest.approx([count[e] / fair for e in range(routed)], abs=1e-4)


def test_layers_keep_their_numbers(dense, moe, text):
    folder = moe(dense(), experts=8, top_k=2, keep_dense="0", target="qwen2_moe")
    report = evaluate(str(folder), [str(text)], **LENGTH)
    assert [layer.layer for layer in report.routing] == [1, 2]
    assert [layer.layer for layer in report.similarity] == [1, 2]


def test_a_dense_model_has_no_routing(dense, text):
    report = evaluate(str(dense()), [str(text)], **LENGTH)
    assert report.routing == report.similarity == []
    assert report.params.total == report.params.active
    assert report.flops.total == report.flops.active
    assert report.params.total_against is report.flops.active_against is None


def test_copies_are_alike_and_cost_more(dense, moe, text):
    folder = moe(dense(), method="copy", experts=4, top_k=2)
    report = evaluate(str(folder), [str(text)], against=str(dense()), **LENGTH)
    assert [layer.cosine for layer in report.similarity] == [1, 1, 1]
    assert report.params.total > report.params.active > report.params.total_against
    assert report.params.total_against == report.params.active_against
    assert report.flops.total > report.flops.active > report.flops.active_against


# --- speed -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(speed, "ROUNDS", 1)
    monkeypatch.setattr(speed, "DECODE_STEPS", 2)


def test_speed_takes_its_batch_from_all_texts(dense, split, text, other_text, quick):
    texts = [str(text), str(other_text)]
    report = evaluate(
        str(split), texts, against=str(dense()), speed=True, batch_size=2 * WINDOWS, **LENGTH
    )
    assert report.speed.batch_size == 2 * WINDOWS
    assert report.speed.decode_against > 0
    with pytest.raises(UpcycleError, match=r"`batch_size=7` needs as many windows .* 6: raise"):
        evaluate(str(split), texts, speed=True, batch_size=7, **LENGTH)


# --- the JSON object -------------------------------------------------------------------------


def test_summary_is_the_contract(dense, split, text, quick):
    """Report pages and scripts read these names."""
    report = evaluate(str(split), [str(text)], against=str(dense()), speed=True, **LENGTH)
    summary = json.loads(json.dumps(evaluation_summary(report)))
    assert list(summary) == [field.name for field in fields(Evaluation)]
    assert [*summary["texts"][0]] == [
        "text", "perplexity", "perplexity_against", "perplexity_ratio", "kl", "top1_agreement",
        "worst_window_ratio", "fitted", "load",
    ]  # fmt: skip
    assert [*summary["routing"][0]] == ["layer", "load", "entropy", "dead", "co_selection"]
    assert [*summary["similarity"][0]] == ["layer", "cosine"]
    assert [*summary["params"]] == ["total", "active", "total_against", "active_against"]
    assert [*summary["flops"]] == ["active", "total", "active_against"]
    assert [*summary["speed"]] == [
        "batch_size", "threads", "dtype", "experts_implementation",
        "prefill", "decode", "prefill_against", "decode_against", "machine",
    ]  # fmt: skip
    assert summary["tasks"] is None
    assert (summary["window"], summary["tokens"]) == (64, 192)


# --- numbers that are none -------------------------------------------------------------------


def with_head(folder, out, change):
    """A copy of the model with another output head."""
    model = load(folder)
    change(model.lm_head.weight.data)
    model.save_pretrained(out)
    make_tokenizer().save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("change", "is_so"),
    [(lambda w: w.fill_(torch.nan), math.isnan), (lambda w: w.mul_(1e6), math.isinf)],
    ids=["NaN", "infinity"],
)
def test_perplexity_that_is_no_number(dense, text, tmp_path, change, is_so):
    broken = with_head(dense(), tmp_path, change)
    result = on_one_text(broken, text, against=str(dense()))
    assert is_so(result.perplexity)
    assert is_so(result.perplexity_ratio)
    assert math.isfinite(result.perplexity_against)
    reverse = on_one_text(dense(), text, against=str(broken))
    assert is_so(reverse.perplexity_against)
    assert math.isfinite(reverse.perplexity)


# --- what is refused -------------------------------------------------------------------------


def test_too_little_text(dense, text):
    with pytest.raises(UpcycleError, match=r"holds [\d,]+ tokens, but 9,999,872 are needed"):
        evaluate(str(dense()), [str(text)], tokens=10**7, seq_len=512)


def test_too_little_text_for_one_window(dense, text):
    with pytest.raises(UpcycleError, match=r"but 16,384 are needed \(`seq_len`\)"):
        evaluate(str(dense(max_position_embeddings=16384)), [str(text)], tokens=8, seq_len=16384)


@pytest.mark.parametrize(
    ("family", "reference", "told"),
    [
        ("t5", "llama", "is a decoder, but .* is an encoder-decoder: give the dense model"),
        ("llama", "t5", "is an encoder-decoder, but .* is a decoder"),
        ("llama", "eurobert", "is an encoder, but .* is a decoder"),
    ],
)
def test_reference_that_predicts_something_else(family, reference, told, dense):
    with pytest.raises(UpcycleError, match=told):
        evaluate(str(dense(family)), ["probes"], against=str(dense(reference)), **LENGTH)


def test_windows_longer_than_the_model_reads(dense, text):
    with pytest.raises(UpcycleError, match="`seq_len=128` is more than the model's 64 positions"):
        evaluate(str(dense(max_position_embeddings=64)), [str(text)], tokens=256, seq_len=128)


def test_model_that_is_not_there(text):
    with pytest.raises(UpcycleError, match="does not exist"):
        evaluate("./nowhere", [str(text)])


@pytest.mark.parametrize("name", ["self", "none", "nowhere.txt"])
def test_text_that_is_no_text(dense, text, name):
    with pytest.raises(
        UpcycleError, match=f"`text='{name}'` is not a file: give probes, builtin, "
    ):
        evaluate(str(dense()), [str(text), name])


def test_dense_model_of_another_vocabulary(dense, split, text):
    other = dense(vocab_size=280)
    with pytest.raises(UpcycleError, match=r"vocabulary of 280 tokens, but .* one of 272: give"):
        evaluate(str(split), [str(text)], against=str(other), **LENGTH)


# --- dtype and device ------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "used"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_dtype_on_a_cpu(dense, text, quick, dtype, used):
    source = dense(dtype=torch.bfloat16)
    report = evaluate(str(source), [str(text)], speed=True, dtype=dtype, device="cpu", **LENGTH)
    assert report.speed.dtype == used


def test_dtype_elsewhere_is_the_checkpoints(dense):
    source = dense(dtype=torch.bfloat16)
    assert choose_dtype("auto", source, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"dtype": "int8"}, "`dtype='int8'` is unknown: give auto, float32, bfloat16, float16"),
        ({"device": "tpu"}, "`device='tpu'` is not a device: give auto, cpu or cuda"),
    ],
)
def test_setting_that_is_wrong(dense, text, setting, words):
    with pytest.raises(UpcycleError, match=words):
        evaluate(str(dense()), [str(text)], **setting)
