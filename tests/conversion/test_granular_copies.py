"""Copies cut into shards: whole for every token where that is promised, or as in the paper."""

import pytest
import torch
from reference import (
    dense_logits,
    down_of,
    experts,
    ffn_blocks,
    gap,
    load,
    logits,
    read_json,
    routers,
    selections,
    weights,
)

import upcycle
from upcycle import UpcycleError
from upcycle.finetune.run import finetune

COPIES, SHARDS = 8, 4
PER_COPY = {"method": "copy", "experts": COPIES, "granularity": SHARDS, "calibration": "none"}
SOURCES = {
    "mixtral": "llama",
    "qwen2_moe": "llama",
    "granitemoeshared": "llama",
    "glm4_moe": "llama",
    "ernie4_5_moe": "ernie4_5",
    "deepseek_v3": "youtu",
    "laguna": "qwen3",
    "granitemoe_swa": "smollm3",
    "granitemoehybrid": "granitemoehybrid",
    "lfm2_moe": "lfm2",
    "nemotron_h": "nemotron_h",
}
"""By the target, of what family."""
TOKENS_BL = torch.randint(0, 256, (32, 128), generator=torch.Generator().manual_seed(5))
"""4,096 tokens: enough for a router whose scores tie to be found out."""

targets = pytest.mark.parametrize("target", SOURCES)


def torn(chosen_TK):
    """The tokens [T] of which some copy gives some of its shards only, or one of them twice."""
    count_TE = torch.nn.functional.one_hot(chosen_TK, COPIES * SHARDS).sum(1)
    shards_TNG = count_TE.view(len(chosen_TK), COPIES, SHARDS)
    return (shards_TNG.amax(-1) != shards_TNG.amin(-1)).any(-1) | (shards_TNG > 1).any(-1).any(-1)


@pytest.mark.parametrize("target", sorted(SOURCES.keys() - {"laguna"}))  # see the ties below
@pytest.mark.parametrize("copies_per_token", [1, 2, 3])
def test_every_token_gets_whole_copies_and_the_dense_logits(dense, moe, target, copies_per_token):
    out = moe(dense(SOURCES[target]), target=target, top_k=copies_per_token * SHARDS, **PER_COPY)
    model = load(out)
    with selections(model) as chosen:
        found = logits(model, TOKENS_BL)
    for chosen_TK in chosen:
        assert chosen_TK.shape == (TOKENS_BL.numel(), copies_per_token * SHARDS)
        assert torn(chosen_TK).sum() == 0
        assert len(chosen_TK.unique()) == COPIES * SHARDS
    assert gap(found, logits(load(dense(SOURCES[target])), TOKENS_BL)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tempered", [1.0, 1e-5])
@pytest.mark.parametrize("target", ["glm4_moe", "deepseek_v3", "nemotron_h", "lfm2_moe"])
def test_copies_stay_whole_whatever_ties(dense, moe, target, dtype, tempered):
    """By groups of experts, or by a selection bias that prefers one copy to another."""
    source = dense(SOURCES[target], dtype=dtype)
    out = moe(source, target=target, top_k=2 * SHARDS, **PER_COPY)
    if target != "lfm2_moe":
        config = read_json(out / "config.json")
        assert (config["n_group"], config["topk_group"]) == (COPIES, 2)
    model = load(out, dtype)
    for router in routers(model):
        router.weight.data *= tempered
    with selections(model) as chosen:
        logits(model, TOKENS_BL)
    assert sum(int(torn(chosen_TK).sum()) for chosen_TK in chosen) == 0


@targets
def test_whole_copies_are_exact_whatever_the_weights_are(dense, moe, target):
    """Of routers that prefer one copy to another by far."""
    model = load(moe(dense(SOURCES[target]), target=target, top_k=2 * SHARDS, **PER_COPY))
    for router in routers(model):
        router.weight.data *= 20
    assert gap(logits(model), dense_logits(dense(SOURCES[target]))) < 1e-4


@targets
def test_rows_are_those_of_an_ordinary_router_a_copys_all_the_same(dense, moe, target):
    model = load(
        moe(dense(SOURCES[target]), target=target, top_k=SHARDS, router="normal", **PER_COPY)
    )
    for router in routers(model):
        rows_NGD = router.weight.detach().view(COPIES, SHARDS, -1)
        assert torch.equal(rows_NGD, rows_NGD[:, :1].expand_as(rows_NGD))
        assert rows_NGD[:, 0].std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("top_k", [1, 2, 3, 6])
@targets
def test_other_numbers_of_shards_run_and_are_said_not_to_be_the_dense_model(
    dense, moe, target, top_k
):
    wanted = {"target": target, "top_k": top_k, "allow_frozen_router": True, **PER_COPY}
    said = upcycle.plan(str(dense(SOURCES[target])), check="none", **wanted).warnings
    assert any(
        f"`top_k={top_k}` is no multiple of `granularity={SHARDS}`" in note
        and "until it is trained, the result is not the dense model" in note
        for note in said
    )
    model = load(moe(dense(SOURCES[target]), **wanted))
    with selections(model) as chosen:
        logits(model)
    for chosen_TK in chosen:
        assert chosen_TK.shape[1] == top_k
        # The shards are of as few copies as can hold them: the best.
        copies_T = [row.div(SHARDS, rounding_mode="floor").unique() for row in chosen_TK]
        assert all(len(copies) == -(-top_k // SHARDS) for copies in copies_T)


@pytest.mark.parametrize("top_k", [SHARDS, 2 * SHARDS])
def test_whole_copies_are_not_said_to_differ(dense, top_k):
    made = upcycle.plan(str(dense()), top_k=top_k, check="none", **PER_COPY)
    assert not [note for note in made.warnings if "until it is trained" in note]


def test_ties_below_float32_are_said_where_there_are_no_groups(dense):
    def said(family="llama", **settings):
        wanted = {"top_k": SHARDS, "check": "none", **PER_COPY, **settings}
        made = upcycle.plan(str(dense(family, dtype=torch.bfloat16)), **wanted)
        return [note for note in made.warnings if "score the same" in note]

    (note,) = said(target="mixtral")
    assert "`target=glm4_moe` keeps copies whole, and so does `dtype=float32`" in note
    assert not said(target="mixtral", dtype="float32")
    assert not said(target="glm4_moe")
    assert not said(target="mixtral", granularity=1, top_k=2)
    (note,) = said("ernie4_5")
    assert note.startswith("below float32")
    assert note.endswith("`dtype=float32` keeps copies whole")


def test_ties_of_sigmoid_scores_without_groups_are_said_in_float32_too(dense):
    source, wanted = str(dense("qwen3")), {"top_k": SHARDS, "check": "none", **PER_COPY}
    (note,) = upcycle.plan(source, target="laguna", **wanted).warnings[-1:]
    assert note == (
        "two copies score the same on some tokens, which then get shards of both: "
        "`target=glm4_moe` keeps copies whole"
    )


# --- the paper's gain --------------------------------------------------------------------------


def naive_gain(copies, shards, top_k):
    """On all three matrices together, of T shards that softmax weights by 1 / (E G) each."""
    return copies * shards**2 / top_k


@pytest.mark.parametrize("top_k", [2, SHARDS, 2 * SHARDS])
def test_the_papers_gain_is_spread_over_three_matrices(dense, moe, top_k):
    out = moe(dense(), top_k=top_k, spread_gain=True, **PER_COPY)
    config = read_json(out / "config.json")
    assert config["model_type"] == "qwen2_moe"  # whose weights stay as softmax makes them
    assert config["norm_topk_prob"] is False
    source = weights(dense())
    size = config["moe_intermediate_size"]
    root = naive_gain(COPIES, SHARDS, top_k) ** (1 / 3)
    for layer, stacked in enumerate(experts(load(out))):
        gate, up, down = (
            source[f"model.layers.{layer}.mlp.{name}_proj.weight"]
            for name in ("gate", "up", "down")
        )
        for expert in (0, COPIES * SHARDS - 1):
            mine = slice(expert % SHARDS * size, (expert % SHARDS + 1) * size)
            expected = torch.cat([gate[mine], up[mine]]) * root
            torch.testing.assert_close(stacked.gate_up_proj[expert].detach(), expected)
            torch.testing.assert_close(stacked.down_proj[expert].detach(), down[:, mine] * root)


@targets
def test_the_gain_counts_the_dense_ffn_once_at_even_weights(dense, moe, target):
    """With an even router the T selected shards' weights times the product of three gains are G:
    the T / G copies count 1 together."""
    out = moe(dense(SOURCES[target]), target=target, top_k=2 * SHARDS, spread_gain=True, **PER_COPY)
    model, source = load(out), load(dense(SOURCES[target]))
    down_DF = down_of(ffn_blocks(source)[0]).weight
    root = float(experts(model)[0].down_proj[0].norm() / down_DF[:, : 192 // SHARDS].norm())
    seen = []
    for router in routers(model):
        router.weight.data.zero_()
    hook = experts(model)[0].register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    logits(model)
    hook.remove()
    counted = seen[0].float().sum(-1) * root**3
    torch.testing.assert_close(counted, torch.full_like(counted, SHARDS), rtol=1e-4, atol=0)


def test_a_spread_gain_is_said_not_to_be_exact_and_goes_with_copies(dense):
    made = upcycle.plan(str(dense()), top_k=SHARDS, spread_gain=True, check="none", **PER_COPY)
    assert any("`spread_gain=True` multiplies gate_proj, too" in note for note in made.warnings)
    with pytest.raises(UpcycleError, match="`spread_gain=True` goes with copies"):
        upcycle.plan(str(dense()), experts=8, top_k=2, spread_gain=True)


@pytest.mark.parametrize("settings", [{"top_k": SHARDS, "spread_gain": True}, {"top_k": 3}])
def test_the_check_asks_no_exactness_of_what_is_not_exact(dense, tmp_path, settings):
    wanted = PER_COPY | {"calibration": "builtin", "seq_len": 32} | settings
    done = upcycle.convert(str(dense()), tmp_path / "out", **wanted)
    assert done.check.exact_error is None


def test_the_check_measures_whole_copies(dense, tmp_path):
    wanted = PER_COPY | {"calibration": "builtin", "seq_len": 32, "top_k": SHARDS}
    done = upcycle.convert(str(dense()), tmp_path / "out", **wanted)
    assert done.check.exact_error < 1e-5


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe"])
def test_one_copy_per_token_trains_its_router_without_a_balancing_loss(
    dense, moe, text, tmp_path, target
):
    """By how it weights the copy's shards, whose weights are all the same at first."""
    folder = moe(dense(), target=target, top_k=SHARDS, **PER_COPY)
    settings = {"steps": 2, "seq_len": 32, "batch_size": 2, "validation_tokens": 32, "lr": 1e-3}
    quiet = {"balance": 0, "z_loss": 0, "keep_best": False, "warmup": 0}
    done = finetune(
        str(folder), tmp_path / "out", preset="specialise", data=str(text), **settings, **quiet
    )
    before, after = (routers(load(f)) for f in (folder, done.out))
    for one, other in zip(before, after, strict=True):
        moved_EG = (other.weight - one.weight).detach().view(COPIES, SHARDS, -1)
        assert (moved_EG != moved_EG[:, :1]).any()
