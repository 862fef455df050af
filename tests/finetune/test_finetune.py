"""`upcycle finetune` from end to end, in this process."""

import itertools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import kill, killed
from reference import experts, gap, load, logits, read_json, routers, weights
from safetensors import SafetensorError, safe_open
from torch.nn import functional
from training import held_out
from transformers import PreTrainedModel

import upcycle
from upcycle import AlreadyFinished, UpcycleError
from upcycle.core.errors import Diverged
from upcycle.finetune import preparing, step
from upcycle.finetune.preparing import Watch
from upcycle.finetune.schedule import learning_rate
from upcycle.finetune.settings import Training
from upcycle.models.frontmatter import split_card
from upcycle.models.loading import load_model
from upcycle.models.record.file import read_record
from upcycle.models.train_log import read_log
from upcycle.models.workspace import partial_folder

TARGETS = ["qwen2_moe", "mixtral", "glm4_moe", "granitemoeshared"]


@pytest.fixture
def split(dense, moe):
    """A split, with shared experts where the target has them."""

    def make(target="qwen2_moe", source=None, **settings):
        shared = 0 if target == "mixtral" else 0.25
        return moe(source or dense(), target=target, shared=shared, **settings)

    return make


def group(name):
    """Which group a tensor of the hub layouts belongs to."""
    kinds = {
        "router": ("mlp.gate.", "block_sparse_moe.gate.", "block_sparse_moe.router."),
        "shared experts": ("shared_expert", "shared_mlp"),
        "experts": ("experts.", "block_sparse_moe.input_linear", "block_sparse_moe.output_linear"),
        "attention": ("self_attn.",),
        "dense FFNs": ("layers.0.mlp.",),
    }
    for kind, parts in kinds.items():
        if any(part in name for part in parts):
            return kind
    return "norms, embeddings"


def changed_groups(before, after):
    one, other = weights(before), weights(after)
    assert one.keys() == other.keys()
    return {group(name) for name in one if not torch.equal(one[name], other[name])}


def layout(folder):
    return {name: (tuple(t.shape), t.dtype) for name, t in weights(folder).items()}


def held_out_loss(done, folder=None):
    """Of the written checkpoint or of another, by plain transformers."""
    model = load(folder or done.out)
    held = held_out(done.out, done.settings.data, steps=done.settings.total_steps)
    total, count = 0.0, 0
    for tokens_L, mask_L in zip(held.tokens_BL, held.mask_BL, strict=True):
        tokens_L = tokens_L[mask_L]
        z_LV = logits(model, tokens_L[None])[0]
        total += float(functional.cross_entropy(z_LV[:-1], tokens_L[1:], reduction="sum"))
        count += len(tokens_L) - 1
    return total / count


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*")}


# --- what comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_result_is_the_trained_model_in_the_same_layout(split, train, target):
    source = split(target)
    done = train(source, steps=10)
    assert done.after["loss"] < done.before["loss"] - 0.3
    assert done.last["loss"] < done.log[1]["loss"]
    assert layout(done.out) == layout(source)
    assert (done.out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert done.reload_error < 1e-6
    assert held_out_loss(done) == pytest.approx(done.after["loss"], abs=1e-4)
    expected = {"model.safetensors", "train_log.jsonl"} | {p.name for p in source.iterdir()}
    assert {path.name for path in done.out.iterdir()} == expected
    assert not partial_folder(done.out).exists()


@pytest.mark.parametrize(
    ("train_", "changed"),
    [
        ("router", {"router"}),
        ("experts", {"experts", "shared experts"}),
        ("moe", {"router", "experts", "shared experts"}),
        ("all", {"router", "experts", "shared experts", "attention", "dense FFNs",
                 "norms, embeddings"}),
    ],
)  # fmt: skip
def test_only_what_was_asked_for_changes(split, train, train_, changed):
    source = split(keep_dense=[0])
    done = train(source, train=train_, balance=0.0, z_loss=0.0, keep_best=False)
    assert changed_groups(source, done.out) == changed
    assert {name for name, row in done.groups.items() if row["trained"]} == changed
    size = sum(t.numel() for t in weights(source).values())
    assert sum(row["parameters"] for row in done.groups.values()) == size


@pytest.mark.parametrize("target", TARGETS)
def test_low_rank_changes_reach_every_group(split, train, target):
    source = split(target)
    done = train(source, lora=2, merge=True)
    changed = {"router", "experts", "attention"}
    changed |= set() if target == "mixtral" else {"shared experts"}
    assert changed_groups(source, done.out) == changed
    assert {name for name, row in done.groups.items() if row["trained"]} == changed
    assert layout(done.out) == layout(source)
    assert not list(done.out.glob("adapter*"))


def test_an_adapter_loads_by_peft_and_is_what_merge_merges(split, train, tmp_path):
    from peft import PeftModel

    source = split("glm4_moe")
    adapter = train(source, tmp_path / "adapter", lora=2)
    assert adapter.after["loss"] < adapter.before["loss"]
    assert not list(adapter.out.glob("model*"))
    config = read_json(adapter.out / "adapter_config.json")
    assert config["base_model_name_or_path"] == os.path.relpath(source, adapter.out)
    with safe_open(adapter.out / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118
    merged = logits(load(train(source, lora=2, merge=True).out))
    unmerged = logits(PeftModel.from_pretrained(load(source), adapter.out).eval())
    assert gap(merged, unmerged) < 1e-3
    assert gap(unmerged, logits(load(source))) > 1e-2


def test_an_adapter_of_laguna_is_found_by_peft(dense, moe, train):
    """Though transformers reads its shared expert by another name."""
    from peft import PeftModel

    source = moe(dense("qwen3"), target="laguna", shared=0.25)
    adapter = train(source, lora=2, steps=1)
    assert adapter.groups["shared experts"]["trained"] > 0
    unmerged = logits(PeftModel.from_pretrained(load(source), adapter.out).eval())
    assert gap(unmerged, logits(load(source))) > 1e-4


def test_low_rank_changes_of_the_moe_leave_attention_and_dense_layers(split, train):
    source = split(keep_dense=[0])
    done = train(source, lora=2, merge=True, train="moe")
    assert changed_groups(source, done.out) == {"router", "experts", "shared experts"}


@pytest.mark.parametrize("settings", [{}, {"lora": 2, "merge": True}])
def test_a_bfloat16_checkpoint_stays_one(dense, split, train, settings):
    source = split("glm4_moe", dense(dtype=torch.bfloat16))
    done = train(source, steps=6, **settings)
    assert layout(done.out) == layout(source)
    assert {t.dtype for t in weights(source).values()} == {torch.bfloat16, torch.float32}
    assert done.after["loss"] < done.before["loss"]
    assert held_out_loss(done) == pytest.approx(done.after["loss"], abs=0.1)


def test_low_rank_changes_of_rounded_weights_are_of_the_whole_ones(split, train):
    """The adapter, whose model is not the one in memory while it trains."""
    source = split()
    done = train(source, lora=2, dtype="bfloat16", merge=True)
    assert changed_groups(source, done.out) == {"router", "experts", "shared experts", "attention"}


def test_a_tensor_that_is_written_wrong_is_noticed(split, train, tmp_path, monkeypatch):
    """Even where rounding blurs the logits."""
    from upcycle.finetune import writing

    def wrong(*args):
        model = load_model(*args)
        model.model.norm.weight.data[3] *= 1.01
        return model

    load_model = writing.load_result
    monkeypatch.setattr(writing, "load_result", wrong)
    with pytest.raises(writing.CheckFailed, match=r"another model\.norm\.weight"):
        train(split(), precision="bf16")
    assert files(tmp_path) >= {Path(".out.partial/aside/state.safetensors")}
    assert not (tmp_path / "out").exists()


def test_mixed_precision_ends_with_its_run(split, train, tmp_path):
    """accelerate keeps its precision for the whole process."""
    source = split()
    exact = train(source, tmp_path / "a")
    rounded = train(source, tmp_path / "b", precision="bf16")
    assert 1e-4 < abs(exact.last["loss"] - rounded.last["loss"]) < 0.1
    for wrong in ({"micro_batch": 3}, {"device": "cuda"}, {"tracker": "nonsense"}):
        if not (torch.cuda.is_available() and "device" in wrong):
            with pytest.raises(UpcycleError):
                train(source, tmp_path / "c", precision="bf16", **wrong)
    assert train(source, tmp_path / "d").last["loss"] == exact.last["loss"]


# --- losses, in the loop ---------------------------------------------------------------------


def test_micro_batches_and_checkpointing_do_not_change_the_losses(dense, split, train, tmp_path):
    source = split()
    runs = [
        train(
            source, tmp_path / str(number), teacher=str(dense()), distill=0.5, match_layers=0.1,
            z_loss=0.1, balance=0.0, **settings,
        )
        for number, settings in enumerate(
            [{"micro_batch": 1}, {"micro_batch": 4}, {"gradient_checkpointing": True}]
        )
    ]  # fmt: skip
    for name in ("loss", "next_token", "distill", "match_layers", "z_loss", "grad_norm"):
        one, *others = ([row[name] for row in done.log if name in row] for done in runs)
        assert len(one) == 4
        for other in others:
            assert other == pytest.approx(one, rel=2e-4), name
    row = next(row for row in runs[0].log if "loss" in row)
    parts = (
        row["next_token"],
        0.5 * row["distill"],
        0.1 * row["match_layers"],
        0.1 * row["z_loss"],
    )
    assert row["loss"] == pytest.approx(sum(parts), rel=1e-5)


def test_healing_learns_from_the_dense_model_that_it_was_made_from(dense, split, train):
    done = train(split(), preset="heal", next_token=0, steps=10, lr=2e-3)
    assert done.settings.teacher == str(dense())
    assert done.after["kl"] < done.before["kl"] * 0.95
    assert not any("next_token" in row for row in done.log)
    ratio = math.exp(done.after["loss"] - held_out_loss(done, dense()))
    assert done.after["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_balance_evens_out_the_load(split, train, tmp_path):
    """By a loss, and by the selection bias of a target that has one."""
    runs = {
        name: train(
            split("glm4_moe"), tmp_path / name, train="moe", lr=1e-5, router_lr=0.05, steps=10,
            z_loss=0.0, warmup=0, keep_best=False, balance=balance, balance_bias=bias,
        )
        for name, balance, bias in (("none", 0, 0), ("loss", 30, 0), ("bias", 0, 0.0025))
    }  # fmt: skip
    last = {n: sum(r["imbalance"] for r in d.log[-6:] if "loss" in r) for n, d in runs.items()}
    assert last["loss"] < last["none"] * 0.9
    assert last["bias"] < last["none"] * 0.9
    biases = {
        name: [t for n, t in weights(done.out).items() if n.endswith("correction_bias")]
        for name, done in runs.items()
    }
    assert all(bool(t.any()) == (name == "bias") for name in biases for t in biases[name])


def moved_biases(done):
    """How far the selection biases that moved at all are from zero."""
    found = [t for n, t in weights(done.out).items() if n.endswith("correction_bias")]
    sizes = torch.cat(found).abs()
    assert sizes.any()
    return sizes[sizes > 0].tolist()


STEP_OF_BIAS = {"steps": 1, "balance_bias": 0.001, "balance": 0, "keep_best": False}


def test_a_selection_bias_that_lies_beside_the_router_moves_too(dense, moe, train):
    source = moe(dense("lfm2", dtype=torch.bfloat16), experts=8, top_k=2)
    done = train(source, train="moe", **STEP_OF_BIAS)
    found = [t for name, t in weights(done.out).items() if name.endswith("expert_bias")]
    assert len(found) == 3
    assert all(t.any() and t.dtype == torch.float32 for t in found)
    assert layout(done.out) == layout(source)


@pytest.mark.parametrize("family", ["lfm2", "nemotron_h"])
def test_low_rank_changes_of_layers_of_all_kinds(dense, moe, train, family):
    """But for what kernels read past its module."""
    done = train(moe(dense(family), experts=8, top_k=2), steps=1, train="all", lora=2, merge=True)
    trained = {group: row["trained"] for group, row in done.groups.items()}
    assert trained["attention"] > 0
    assert trained["experts"] > 0
    assert done.reload_error < 1e-5


@pytest.mark.parametrize("made", ["copies", "shards", "split"])
def test_a_step_moves_the_selection_bias_by_what_was_asked_for(dense, moe, train, made):
    """As DeepSeek-V3's does, of any router that is not tempered."""
    settings = {
        "copies": {"method": "copy", "experts": 4},
        "shards": {"method": "copy", "experts": 4, "granularity": 2, "top_k": 2},
        "split": {"router_spread": 0.1, "shared": 0.25},
    }[made]
    done = train(moe(dense(), target="glm4_moe", **settings), **STEP_OF_BIAS)
    assert moved_biases(done) == pytest.approx([0.001] * len(moved_biases(done)))


@pytest.mark.parametrize(
    ("target", "family"),
    [("deepseek_v3", "youtu"), ("laguna", "qwen3"), ("ernie4_5_moe", "ernie4_5")],
)
def test_selection_biases_move_whatever_the_class_keeps_them_in(dense, moe, train, target, family):
    """Buffers, parameters of the router, or of a module of its own; and nothing else takes them
    for parameters, though everything trains."""
    source = moe(dense(family), target=target, router_spread=0.1, shared=0.25)
    done = train(source, train="all", weight_decay=0.1, **STEP_OF_BIAS)
    assert moved_biases(done) == pytest.approx([0.001] * len(moved_biases(done)))
    assert layout(done.out) == layout(source)
    assert done.reload_error < 1e-4


def test_a_step_of_the_selection_bias_is_a_tempered_routers_own(split, train):
    """The same share of the scores' spread as where logits spread by 0.05."""
    done = train(split("glm4_moe", router_spread=1e-4), **STEP_OF_BIAS)
    expected = [0.001 * 1e-4 / 0.05] * len(moved_biases(done))
    assert moved_biases(done) == pytest.approx(expected, rel=0.5)


def test_routers_move_alone_during_their_warmup(split, train):
    source = split()
    done = train(source, router_warmup=1.0, keep_best=False, weight_decay=0.1)
    assert changed_groups(source, done.out) == {"router"}


def test_parts_move_from_the_shares_of_the_steps_that_they_start_at(split, train, tmp_path):
    """Norms with the routers, then FFNs, attention not yet."""
    settings = {"router_warmup": 1.0, "keep_best": False, "weight_decay": 0.1}
    starts = {"norms": 0.0, "ffn": 0.5, "attention": 1.0}
    source = split(keep_dense=[0])
    done = train(source, starts=starts, train="all", **settings)
    assert changed_groups(source, done.out) == {
        "router", "norms, embeddings", "experts", "shared experts", "dense FFNs",
    }  # fmt: skip
    one, other = weights(source), weights(done.out)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert "model.norm.weight" in changed
    assert "model.embed_tokens.weight" not in changed
    plain = Training(steps=100, warmup=0.1, router_warmup=0.3, train="all", starts=starts)
    assert [plain.start(part) for part in ("router", "norms", "ffn", "embeddings")] == [
        0, 0, 0.5, 0.3,
    ]  # fmt: skip
    assert [learning_rate(plain, step, "ffn") for step in (49, 50, 59)] == [0, 0.1, 1]


def test_layers_are_matched_over_the_first_share_of_the_steps(dense, split, train):
    """With a weight that falls to 0; then the hidden states are no longer asked for."""
    done = train(
        split(), teacher=str(dense()), match_layers=2.0, match_warmdown=0.5, steps=8, balance=0.0,
        z_loss=0.0,
    )  # fmt: skip
    rows = [row for row in done.log if "loss" in row]
    assert ["match_layers" in row for row in rows] == [True] * 4 + [False] * 4
    for row, weight in zip(rows, (2.0, 1.5, 1.0, 0.5, 0, 0, 0, 0), strict=True):
        expected = row["next_token"] + weight * row.get("match_layers", 0.0)
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_learning_rate_rises_and_falls_as_a_cosine():
    settings = Training(steps=100, warmup=0.1, final_lr=0.2, router_warmup=0.1)
    other = [learning_rate(settings, step, "other") for step in range(100)]
    assert other[:10] == [0.0] * 10
    assert other[10:20] == pytest.approx([i / 10 for i in range(1, 11)])
    assert other[60] == pytest.approx(0.6)
    assert other[99] == pytest.approx(0.2, abs=1e-3)
    assert all(a > b for a, b in itertools.pairwise(other[20:]))
    router = [learning_rate(settings, step, "router") for step in range(100)]
    assert router[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert router[55] == pytest.approx(0.6)
    assert learning_rate(Training(steps=1), 0, "other") == 1


@pytest.mark.parametrize(
    "way", [{"method": "copy", "experts": 4}, {"shared": 0}, {"shared": 0, "router_spread": 0.01}]
)
def test_the_learning_rate_goes_by_the_weights_whatever_gains_they_hold(dense, moe, train, way):
    read = [t.double() for n, t in weights(dense()).items() if "gate_proj" in n or "up_proj" in n]
    rms = math.sqrt(sum(t.square().sum() for t in read) / sum(t.numel() for t in read))
    folder = moe(dense(), target="mixtral", **way)
    done = train(folder, preset="heal", teacher=None, distill=0.0, steps=1, lr=None)
    hidden_size = read_json(dense() / "config.json")["hidden_size"]
    assert done.settings.lr == pytest.approx(0.025 * rms / math.sqrt(hidden_size), rel=0.02)
    kept = read_json(done.out / "upcycle.json")["training"][-1]["settings"]
    assert kept["lr"] == done.settings.lr


def test_the_dense_gradient_reaches_every_router_of_top_1_copies(dense, moe, train, tmp_path):
    """Whose renormalised weight is always 1."""
    for target in ("mixtral", "granitemoeshared"):
        source = moe(
            dense(), target=target, method="copy", experts=4, top_k=1, allow_frozen_router=True
        )
        with pytest.raises(UpcycleError, match="the routers get no gradient"):
            train(source, balance=0.0, z_loss=0.0)
        assert not files(tmp_path)
    done = train(source, balance=0.0, z_loss=0.0, train="router", dense_router_gradient=True)
    assert sum(group(name) == "router" for name in weights(done.out)) == 3
    one, other = weights(source), weights(done.out)
    # Copies are equal at first, so no expert is better than another: only rounding moves routers.
    assert changed_groups(source, done.out) <= {"router"}
    assert one.keys() == other.keys()


# --- which state is kept ---------------------------------------------------------------------


def test_the_best_state_is_the_result(split, train, tmp_path):
    """Not the last one, when that is worse: here, after steps that are far too long."""
    settings = {"steps": 8, "validate_every": 1, "lr": 1.0, "warmup": 1.0}
    done = train(split(), **settings)
    validations = {r["step"]: r["validation"]["loss"] for r in done.log if "validation" in r}
    assert sorted(validations) == list(range(9))
    best = min(validations, key=validations.get)
    assert 0 < best < 8
    assert done.result_step == best
    assert done.after["loss"] == validations[best]
    assert held_out_loss(done) == pytest.approx(validations[best], abs=1e-4)
    last = train(split(), tmp_path / "last", keep_best=False, **settings)
    assert last.result_step == 8
    assert held_out_loss(last) == pytest.approx(validations[8], abs=1e-4)


def test_balance_is_of_the_whole_batch_whatever_its_parts(split, train, tmp_path):
    """Of four sequences at once, or one by one."""
    wanted = {"balance": 5.0, "z_loss": 0.0, "keep_best": False, "warmup": 0}
    logs = [
        train(split(), tmp_path / str(size), micro_batch=size, **wanted).log for size in (4, 2, 1)
    ]
    for other in logs[1:]:
        for row, expected in zip(other, logs[0], strict=True):
            if row["step"] > 2:  # rounding has sent a token to other experts by then
                break
            for name in row.keys() & {"balance", "grad_norm", "loss"}:
                assert row[name] == pytest.approx(expected[name], rel=1e-3), name


def no_constant(name):
    raise AssertionError(f"{name} is not JSON")


def strict_lines(path):
    return [json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines()]


def test_a_run_that_diverges_stops_at_that_step_and_leaves_the_best_state(split, train, tmp_path):
    source, out = split(), tmp_path / "out"
    with pytest.raises(Diverged) as caught:
        train(source, lr=1e9, precision="no", warmup=0)
    said = str(caught.value)
    number = int(re.search(r"stopped at step (\d):", said)[1])
    assert 1 <= number <= 4
    assert re.search(r"is (nan|inf) \(learning rate 1e\+09 of `lr=1e\+09`, precision no\)", said)
    assert said.endswith(f"{out} holds the state after step 0, the best before")
    assert changed_groups(source, out) == set()
    card = (out / "README.md").read_text()
    assert f": {number - 1} steps of 4\n" in card
    assert "It was to take 4, but a loss or a gradient came to be no number." in card
    assert torch.isfinite(logits(load(out))).all()
    assert all(row["step"] <= number for row in strict_lines(out / "train_log.jsonl"))
    assert not partial_folder(out).exists()


def test_the_best_state_is_the_best_there_was(split, train, tmp_path, monkeypatch):
    """Of a run that learns, until its third step has a loss that is no number."""
    gradients = step._gradients

    def broken(setup, number, *args):
        row = gradients(setup, number, *args)
        return row | {"loss": math.inf} if number == 2 else row

    monkeypatch.setattr(step, "_gradients", broken)
    with pytest.raises(Diverged, match=r"stopped at step 3: .*after step 2, the best before"):
        train(split(), validate_every=1)
    rows = strict_lines(tmp_path / "out" / "train_log.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 1, 2, 2]
    trained = read_json(tmp_path / "out" / "upcycle.json")["training"][-1]
    assert trained["step"] == 2
    assert trained["after"]["loss"] == rows[-1]["validation"]["loss"]
    load(tmp_path / "out")


@pytest.mark.parametrize("name", ["grad_norm", "loss"])
def test_weights_never_take_a_step_that_is_no_number(split, train, tmp_path, monkeypatch, name):
    """Without a best state to go back to nothing is left."""
    stepped = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: stepped.append(1))
    gradients = step._gradients

    def broken(setup, *args):
        row = gradients(setup, *args)
        if name == "loss":
            return row | {"loss": math.nan}
        next(p for p in setup.model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return row

    monkeypatch.setattr(step, "_gradients", broken)
    with pytest.raises(Diverged, match=rf"stopped at step 1: the {name.replace('_', ' ')} is"):
        train(split(), keep_best=False)
    assert not stepped
    assert not files(tmp_path)


def test_a_held_out_row_of_one_token_spoils_nothing(split, train, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a" * 32 * 12)  # and the end of the sequence
    assert train(split(), data=str(path)).after["loss"] > 0


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "missing.txt"}, "`data='missing.txt'` is not a file"),
        ({"data": "self"}, "`data='self'` is not a file: give builtin"),
        ({"seq_len": 4096}, "is more than the model.s 1024 positions"),
        ({"micro_batch": 3}, "`batch_size=4` is not a multiple of 3"),
        ({"balance_bias": 0.1}, "`balance_bias=0.1` has no effect on qwen2_moe"),
        ({"train": "experts", "balance": 0.1}, "`balance=0.1` has no effect with `train=experts`"),
        ({"distill": 1.0, "teacher": "/no/such"}, "`teacher`: .*/no/such"),
        ({"preset": "hael"}, "unknown recipe 'hael'"),
        ({"tracker": "nonsense"}, "nonsense"),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(split, train, tmp_path, settings, message):
    with pytest.raises(UpcycleError, match=message) as caught:
        train(split(), **settings)
    assert "\n" not in str(caught.value)
    assert not files(tmp_path)


def test_models_that_do_not_serve_are_refused(dense, split, train, tmp_path):
    with pytest.raises(UpcycleError, match="is dense, so `upcycle convert` it first"):
        train(dense())
    with pytest.raises(UpcycleError, match="has a vocabulary of 300, but the model of 272"):
        train(split(), distill=1.0, teacher=str(dense(vocab_size=300)))
    with pytest.raises(UpcycleError, match="2 layers of 48 and the model 3 layers of 48"):
        train(split(), match_layers=1.0, teacher=str(dense(num_hidden_layers=2)))
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("eurobert", {}, "is an encoder, which teaches a decoder nothing"),
        ("t5", {}, "teaches a decoder nothing"),
        ("llama", {"max_position_embeddings": 16}, "`seq_len=32` .* 16 positions"),
    ],
)
def test_a_teacher_predicts_the_next_token_of_the_models_sequences(
    dense, split, train, tmp_path, family, fields, message
):
    with pytest.raises(UpcycleError, match=f"^`teacher`: .*{message}"):
        train(split(), distill=1.0, teacher=str(dense(family, **fields)))
    assert not files(tmp_path)


def test_what_stands_in_out_is_safe(split, train, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UpcycleError, match=str(out)):
            train(split(), overwrite=overwrite)
    assert files(tmp_path) == {
        out.relative_to(tmp_path),
        (out / "thesis.txt").relative_to(tmp_path),
    }
    first = train(split(), tmp_path / "result")
    with pytest.raises(UpcycleError, match="`overwrite`"):
        train(split(), first.out, seed=1)
    before = weights(first.out)
    train(split(), first.out, seed=1, overwrite=True)
    assert any(not torch.equal(t, before[n]) for n, t in weights(first.out).items())
    with pytest.raises(UpcycleError, match="holds the source"):
        train(first.out, first.out, overwrite=True)


def test_what_is_read_is_not_overwritten(split, train, repeated):
    """A dense model that upcycle has trained, or a text that was put beside a result."""
    first = train(split())
    text = Path(shutil.copy(repeated, first.out / "notes.txt"))
    for read in ({"teacher": str(first.out), "distill": 1.0}, {"data": str(text)}):
        with pytest.raises(UpcycleError, match=r"out` holds .*, which is read: give another"):
            train(split(), overwrite=True, **read)
    assert text.is_file()


def test_a_full_disk_leaves_a_former_result_and_the_saved_state(split, train, monkeypatch):
    done = train(split(), seed=1)
    before = {path: path.read_bytes() for path in done.out.iterdir()}

    def fail(self, place, **_):
        (place / "model.safetensors").write_bytes(b"torn")
        (place / ".tmp1234").write_bytes(b"torn")
        message = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(message)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fail)
        sentence = r"beside .*out: No space left on device; make room, then `resume` goes on from "
        with pytest.raises(UpcycleError, match=sentence + "step 4"):
            train(split(), overwrite=True)
    assert {path: path.read_bytes() for path in done.out.iterdir()} == before
    resumed = train(split(), overwrite=True, resume=True)
    assert not list(resumed.out.glob(".*"))
    assert trained_bytes(resumed) == trained_bytes(train(split(), done.out.parent / "other"))
    assert sorted(p.name for p in done.out.parent.iterdir()) == ["other", "out"]


# --- going on --------------------------------------------------------------------------------


def at_step(step, act):
    def row(row, done, total):
        if row["step"] == step and "validation" not in row:
            act()

    return Watch(row=row)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def trained_bytes(done):
    times = ("tokens_per_second",)
    rows = [{k: v for k, v in row.items() if k not in times} for row in done.log]
    lines = [json.loads(line) for line in (done.out / "train_log.jsonl").read_text().splitlines()]
    assert lines == done.log
    return {p.name: p.read_bytes() for p in done.out.glob("*.safetensors")}, rows, done.after


GOING_ON = {
    "selection bias": ("glm4_moe", {"balance_bias": 0.1, "weight_decay": 0.1}),
    "low-rank changes": ("qwen2_moe", {"preset": "heal", "lora": 2, "merge": True}),
    "best state before the interrupt": (
        "granitemoeshared",
        {"dense_router_gradient": True, "gradient_checkpointing": True, "lr": 1.0, "warmup": 0.0},
    ),
}


@pytest.mark.parametrize("kind", GOING_ON)
def test_interrupted_and_resumed_is_the_same_as_never_stopped(split, train, tmp_path, kind):
    target, settings = GOING_ON[kind]
    settings = {"steps": 7, "validate_every": 2} | settings
    source = split(target)
    whole = train(source, tmp_path / "whole", **settings)
    assert whole.result_step < 3 or "best" not in kind
    with pytest.raises(KeyboardInterrupt):
        train(source, watch=at_step(3, interrupt), **settings)
    assert not (tmp_path / "out").exists()
    assert partial_folder(tmp_path / "out").is_dir()
    steps = []
    resumed = train(
        source, resume=True, watch=Watch(row=lambda row, *_: steps.append(row["step"])), **settings
    )
    assert min(steps) == 4
    assert trained_bytes(resumed) == trained_bytes(whole)


def test_dropout_is_the_same_after_a_resume(split, train, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(split(), source)
    config = read_json(source / "config.json") | {"attention_dropout": 0.3}
    (source / "config.json").write_text(json.dumps(config))
    plain = train(split(), tmp_path / "plain")
    whole = train(source, tmp_path / "whole")
    assert whole.last["loss"] != plain.last["loss"]
    with pytest.raises(KeyboardInterrupt):
        train(source, watch=at_step(2, interrupt))
    assert trained_bytes(train(source, resume=True)) == trained_bytes(whole)


@pytest.mark.parametrize("step", [1, 4])
def test_killed_and_resumed_is_the_same_as_never_stopped(split, train, tmp_path, step):
    """Before and after the state was saved for the first time, and before all validations."""
    settings = {"steps": 5, "validate_every": 5}
    whole = train(split(), tmp_path / "whole", **settings)
    assert killed(lambda: train(split(), watch=at_step(step, kill), **settings))
    log = partial_folder(tmp_path / "out") / "train_log.jsonl"
    with log.open("a") as file:
        file.write('{"step": 5, "lo')  # a line cut short
    steps = []
    watch = Watch(row=lambda row, *_: steps.append(row["step"]))
    resumed = train(split(), resume=True, watch=watch, **settings)
    assert trained_bytes(resumed) == trained_bytes(whole)
    assert steps[0] == (0 if step == 1 else step)


def test_resuming_a_finished_run_says_so_and_changes_nothing(split, train):
    done = train(split(), resume=True)
    before = {path: path.read_bytes() for path in done.out.iterdir()}
    with pytest.raises(AlreadyFinished, match="out is the finished result of this run"):
        train(split(), resume=True)
    with pytest.raises(UpcycleError, match="exists and is not empty"):
        train(split(), resume=True, steps=5)
    assert {path: path.read_bytes() for path in done.out.iterdir()} == before


def test_resume_goes_on_with_the_threads_that_the_run_began_with(
    split, train, monkeypatch, threads_asked_for
):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        with pytest.raises(KeyboardInterrupt):
            train(split(), watch=at_step(2, interrupt))
    done = train(split(), resume=True)
    assert read_json(done.out / "upcycle.json")["run"]["threads"] == 3
    assert threads_asked_for[-2:] == [3, 3]


@pytest.mark.parametrize("name", ["model", "text"])
def test_what_changes_while_it_is_loaded_is_noticed(split, train, repeated, tmp_path, name):
    source = shutil.copytree(split(), tmp_path / "source")
    text = shutil.copy(repeated, tmp_path / "text.txt")
    path = source / "model.safetensors" if name == "model" else Path(text)

    def touch_up(*arguments):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return load_model(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "load_model", touch_up)
        with pytest.raises(UpcycleError, match="changed while it was read"):
            train(source, data=str(text))
    assert not (tmp_path / "out").exists()


def test_only_the_same_request_goes_on(split, train, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(split(), watch=at_step(2, interrupt))
    state = files(tmp_path)
    for change in ({"lr": 1e-4}, {"steps": 5}):
        with pytest.raises(UpcycleError, match="drop `resume` to start anew"):
            train(split(), resume=True, **change)
    with pytest.raises(UpcycleError, match="drop `resume` to start anew"):
        train(split("mixtral"), resume=True)
    assert files(tmp_path) == state
    train(split(), lr=1e-4)
    assert not partial_folder(tmp_path / "out").exists()


def test_a_second_interrupt_stops_at_once(split, train, tmp_path):
    def twice():
        interrupt()
        interrupt()

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(split(), watch=at_step(2, twice))
    assert signal.getsignal(signal.SIGINT) is before
    assert trained_bytes(train(split(), resume=True)) == trained_bytes(
        train(split(), tmp_path / "whole")
    )


# --- history ---------------------------------------------------------------------------------


def test_every_run_is_in_the_history(split, train, tmp_path):
    source = split()
    first = train(source, tmp_path / "first", preset=None)
    second = train(first.out, tmp_path / "second", train="router", lora=2, merge=True, seed=1)
    assert first.settings.name == "heal"
    record, original = read_json(second.out / "upcycle.json"), read_json(source / "upcycle.json")
    assert record.keys() == original.keys() | {"training"}
    assert record["plan"] == original["plan"]
    assert record["check"] is None
    assert [entry["model"] for entry in record["training"]] == [source.name, "first"]
    assert [entry["settings"]["train"] for entry in record["training"]] == ["all", "router"]
    assert record["training"][0]["check_before"] == original["check"]
    for entry, done in zip(record["training"], (first, second), strict=True):
        teacher = done.settings.teacher
        public = {"data": "repeated.txt", "teacher": teacher and Path(teacher).name}
        assert Training(**entry["settings"]) == done.settings.model_copy(update=public)
        assert entry["after"] == done.after
    card = (second.out / "README.md").read_text()
    assert split_card((source / "README.md").read_text())[1] in card
    assert card.count("\n## Training\n") == 2
    assert f"{second.after['perplexity']:.3f}" in card
    assert read_record(second.out / "upcycle.json").training[1].step == second.result_step
    log = read_log(second.out / "train_log.jsonl")
    assert [line.step for line in log if line.loss is not None] == [1, 2, 3, 4]


def test_a_model_that_upcycle_did_not_make_trains_too(dense, moe, train, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(moe(dense(), target="mixtral", method="copy", experts=4), source)
    (source / "upcycle.json").unlink()
    (source / "README.md").unlink()
    done = train(source, preset=None)
    assert done.settings.name == "specialise"
    assert read_json(done.out / "upcycle.json").keys() == {"check", "training", "run"}
    assert (done.out / "README.md").is_file()


def test_copies_come_to_differ(dense, moe, train):
    source = moe(dense(), target="mixtral", method="copy", experts=4, top_k=2)
    done = train(source, steps=10)
    (one, *_), (router, *_) = experts(load(done.out)), routers(load(done.out))
    assert all(not torch.equal(one.down_proj[0], one.down_proj[e]) for e in range(1, 4))
    assert router.weight.abs().max() > 0
    assert done.after["loss"] < done.before["loss"]


def test_function_of_the_package_has_the_name_of_a_folder():
    assert callable(upcycle.finetune)
    assert upcycle.finetune.__module__ == "upcycle"
