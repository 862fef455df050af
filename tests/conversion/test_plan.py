"""The plan: it foresees every error, writes nothing, and what it promises is what is written."""

import itertools
import json
import random
import re
import shutil
import sys
from math import isclose
from typing import get_args

import pytest
import torch
from reference import load, weights
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import PLAIN_SPLIT
from torch.nn import functional

import upcycle
from upcycle import UpcycleError
from upcycle.conversion import dense_layers
from upcycle.conversion import plan as planning
from upcycle.core.clustering import balanced_kmeans
from upcycle.evaluation.inspection import is_routed
from upcycle.models.record import Trial
from upcycle.models.source import DTYPES, DenseSource
from upcycle.models.targets import TARGETS, Runtime
from upcycle.models.text import KINDS
from upcycle.models.writer import Workspace, partial_folder
from upcycle.router_init import kmeans

QUICK = {"calibration_tokens": 64, "seq_len": 64, "check": "none"}


def refusal(dense, family="llama", out=None, *, fields=None, **settings) -> str:
    """The sentence with which the plan refuses the settings."""
    with pytest.raises(UpcycleError) as caught:
        upcycle.plan(str(dense(family, **(fields or {}))), out, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"experts": 6, "top_k": 4, "shared": 0.25}, 0.5),
        ({"experts": 8, "top_k": 2, "shared": 0, "keep_dense": [1]}, 0.5),
        ({"experts": 8, "top_k": 2, "shared": 0}, 0.25),
        ({"experts": 8, "top_k": 2, "shared": 0, "compensate.feedback": 0.9}, 0.9),
        ({"method": "prune", "active": 0.25}, 0),
        ({"compensate": "none"}, 0),
        ({"sequential": False}, 0),
    ],
)
def test_feedback_is_half_or_the_active_share(dense, settings, expected):
    settings = {"keep_dense": "none"} | settings
    assert upcycle.plan(str(dense()), **settings).design.feedback == pytest.approx(expected)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("olmo2", {}, "olmo2 has a norm between its FFN and the hidden states, so give 0"),
        ("llama", {"method": "prune"}, "pruned copies are fitted to the dense FFN's output"),
        ("llama", {"sequential": False}, "`sequential=False` fits layers on the dense model's"),
    ],
)
def test_feedback_that_would_have_no_effect(dense, family, settings, why):
    sentence = refusal(dense, family, **settings, **{"compensate.feedback": 0.4})
    assert "compensate.feedback=0.4 has no effect" in sentence
    assert why in sentence
    assert upcycle.plan(str(dense(family)), **settings, **{"compensate.feedback": 0})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, planning.SPREAD),
        ({"method": "prune"}, planning.SPREAD),
        ({"method": "prune", "compensate": "none"}, planning.UNFITTED_SPREAD),
        ({"compensate": "none"}, planning.UNFITTED_SPREAD),
        ({"router_spread": 0.3}, 0.3),
        ({"compensate": "none", "router_spread": 0.3}, 0.3),
        ({"method": "copy", "top_k": 1}, planning.EXACT_SPREAD),
        ({"method": "copy", "top_k": 1, "router_spread": 0.3}, planning.EXACT_SPREAD),
    ],
)
def test_router_spreads_as_a_refit_knows_of_uneven_weights(dense, settings, expected):
    assert upcycle.plan(str(dense()), **settings).design.router_spread == expected


@pytest.mark.parametrize("spread", [0, 1e-5, 1.5])
def test_spread_that_no_router_can_have(dense, spread):
    assert f"router_spread={spread}: input should be" in refusal(dense, router_spread=spread)


@pytest.mark.parametrize(
    ("check", "seq_len", "windows"),
    [
        ("fast", 512, 2),
        ("fast", 1024, 2),  # built-in probes are short, so windows are of 512 at most
        ("fast", 64, 16),
        ("fast", 1000, 2),
        ("fast", 300, 4),  # rounded up
        ("full", 512, 8),
        ("none", 512, 0),
    ],
)
def test_windows_of_each_kind_that_the_check_reads(dense, check, seq_len, windows):
    plan = upcycle.plan(str(dense()), check=check, seq_len=seq_len, calibration="builtin")
    assert plan.check_windows == windows
    kinds = len(KINDS) + 1
    assert plan.held_tokens == kinds * windows * min(512, seq_len)


# --- numbers that do not fit -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "flag", "nearest"),
    [
        ({"experts": 5, "shared": 0}, "`experts=5`", "4 or 6"),  # 5 does not divide 192
        ({"experts": 5, "target": "mixtral"}, "`experts=5`", "4 or 6"),
        ({"experts": 16, "shared": 0}, "`experts=16`", "12 or 24"),  # 12 neurons, no multiple of 8
        ({"experts": 16, "shared": 0, "target": "glm4_moe"}, "`experts=16`", "12 or 24"),
        ({"experts": 25, "target": "glm4_moe"}, "`experts=25`", "24"),
        ({"experts": 10**9, "target": "mixtral"}, f"`experts={10**9}`", "24"),
        ({"method": "copy", "granularity": 5, "top_k": 5}, "`granularity=5`", "4 or 6"),
        ({"method": "copy", "granularity": 96, "top_k": 96}, "`granularity=96`", "24"),
    ],
)
def test_parts_that_do_not_fit_name_the_nearest_that_do(dense, settings, flag, nearest):
    assert refusal(dense, **settings) == (
        f"{flag} does not cut 192 neurons into equal parts that are a multiple of 8, which "
        f"grouped matrix products need; nearest: {nearest}"
    )


@pytest.mark.parametrize(
    ("settings", "words", "end"),
    [
        ({"experts": 19}, "`experts=19` leaves less than 8 of 192 neurons", "give at most 18"),
        ({"experts": 10**9}, f"`experts={10**9}` leaves less than 8", "give at most 18"),
        ({"experts": 13, "shared": 0.5}, "`experts=13` leaves less", "give at most 12"),
        ({"experts": 1, "shared": 0.99}, "`experts=1` leaves less", "lower `shared`"),
    ],
)
def test_experts_too_narrow_beside_the_shared_one(dense, settings, words, end):
    sentence = refusal(dense, top_k=1, **settings)
    assert sentence.startswith(words)
    assert sentence.endswith(f"to an expert, which grouped matrix products need: {end}")


def test_width_that_no_number_of_experts_cuts(dense):
    fields = {"intermediate_size": 12}
    sentence = refusal(dense, fields=fields, experts=3, top_k=1, target="mixtral")
    assert sentence.endswith("nearest: none")


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe", "qwen2_moe"])
def test_number_of_experts_that_a_refusal_names_is_legal(dense, target):
    """And it is the nearest one: none between it and the number asked for is."""
    settings = {"target": target, "top_k": 1, "check": "none"}
    legal, named = [], {}
    for experts in range(2, 30):
        try:
            made = upcycle.plan(str(dense()), experts=experts, **settings)
            assert made.design.geometry.num_experts == experts
            legal.append(experts)
        except UpcycleError as error:
            said = re.split("nearest: |at most ", str(error))[1]
            named[experts] = [int(fitting) for fitting in said.split(" or ")]
    assert len(named) >= 5
    for experts, fitting in named.items():
        below, above = [n for n in legal if n < experts], [n for n in legal if n > experts]
        assert fitting == below[-1:] + above[:1]


def test_copies_of_any_width_need_no_divisor(dense):
    model = str(dense(intermediate_size=190))
    assert upcycle.plan(model, method="copy", experts=5).design.geometry.expert_size == 190


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"experts": 8, "top_k": 9},
            "`top_k=9` is more than the 8 experts",
        ),
        (
            {"experts": 6, "top_k": 7, "shared": 0.25},
            "`top_k=7` is more than the 6 experts",
        ),
        (
            {"method": "copy", "experts": 4, "granularity": 2, "top_k": 10},
            "`top_k=10` is more than the 8 experts",
        ),
        (
            {"experts": 8, "shared": 1, "top_k": 2},
            "`shared=1` leaves nothing to route: give less",
        ),
        (
            {"experts": 8, "shared": -0.5, "top_k": 2},
            "the request: shared=-0.5: input should be greater than or equal to 0",
        ),
        (
            {"method": "drop", "shared": 0.125},
            "`shared=0.125` goes with a split: copies have none",
        ),
        (
            {"granularity": 2},
            "`granularity=2` goes with copies: for a split, raise `experts`",
        ),
    ],
)
def test_counts_that_contradict_each_other(dense, settings, sentence):
    assert refusal(dense, **settings) == sentence


def test_one_copy_per_token_where_the_router_would_learn_nothing(dense):
    assert refusal(dense, method="copy", top_k=1, target="mixtral") == (
        "`top_k=1` gives each token one expert, and mixtral always renormalises its weight, so the "
        "router would get no gradient: raise `top_k`, choose `target=glm4_moe or qwen2_moe`, or "
        "pass `allow_frozen_router=True`"
    )


def test_one_shard_per_token_is_the_same(dense):
    sentence = refusal(dense, method="copy", granularity=4, top_k=1, target="mixtral")
    assert sentence.startswith("`top_k=1` gives each token one expert")


def test_one_copy_of_several_shards_has_weights_to_learn(dense):
    made = upcycle.plan(str(dense()), method="copy", granularity=4, top_k=4)
    assert (made.design.combine, made.target) == ("mean", "mixtral")


def test_one_copy_per_token_names_only_targets_that_host_the_model(dense):
    sentence = refusal(dense, "granite", method="copy", top_k=1)
    assert sentence.endswith("raise `top_k`, or pass `allow_frozen_router=True`")


def test_one_copy_per_token_is_fine_where_weights_stay_plain_or_it_is_asked_for(dense):
    model = str(dense())
    plain = upcycle.plan(model, method="copy", top_k=1)
    assert (plain.design.combine, plain.target) == ("sum", "qwen2_moe")
    assert plain.config["norm_topk_prob"] is False
    frozen = upcycle.plan(model, method="copy", top_k=1, allow_frozen_router=True)
    assert (frozen.design.combine, frozen.target) == ("mean", "mixtral")


# --- layers, targets, names ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("3", "`keep_dense` names layer 3, but {model} has layers 0 to 2"),
        ("0,1,2", "`keep_dense` names every layer, which leaves nothing to convert"),
        ("-1", "keep_dense='-1': give layers such as 0,1,29, auto or none"),
        ("all", "keep_dense='all': give layers such as 0,1,29, auto or none"),
        (1.5, "keep_dense=1.5: give layers such as 0,1,29, auto or none"),
        ([0, "x"], "keep_dense=[0, 'x']: give layers such as 0,1,29, auto or none"),
    ],
)
def test_layers_that_can_not_stay_dense(dense, layers, words):
    assert words.format(model=dense()) in refusal(dense, keep_dense=layers)


@pytest.mark.parametrize(
    ("target", "layers", "words"),
    [
        ("mixtral", "0", "mixtral can't keep layers dense (`keep_dense`)"),
        ("granitemoeshared", "0", "granitemoeshared can't keep layers dense (`keep_dense`)"),
        ("glm4_moe", "1", "glm4_moe can keep only the first layers dense (`keep_dense=0,1,…`)"),
    ],
)
def test_dense_layers_that_the_target_can_not_express(dense, target, layers, words):
    sentence = refusal(dense, keep_dense=layers, target=target)
    assert sentence.startswith(f"`target={target}`: {words} (reachable: ")
    assert "qwen2_moe" in sentence


@pytest.mark.parametrize(
    ("written", "layers"),
    [
        *((nothing, ()) for nothing in ("none", "", None, [])),
        ("1", (1,)),
        (1, (1,)),
        ("1, 0", (0, 1)),
        ([1, 0, 1], (0, 1)),
    ],
)
def test_ways_to_write_the_dense_layers(dense, written, layers):
    settings = PLAIN_SPLIT | {"keep_dense": written}
    assert upcycle.plan(str(dense()), **settings).spec.dense_layers == layers


def test_trait_that_the_target_has_no_place_for(dense):
    assert refusal(dense, "qwen3", target="mixtral") == (
        "`target=mixtral`: the source has a norm per head on q and k (qwen3 always has it), which "
        "mixtral has no place for (reachable: glm4_moe, laguna, qwen3_moe)"
    )


def test_model_that_no_target_hosts(dense):
    sentence = refusal(dense, fields={"mlp_bias": True})
    assert sentence == (
        "no native MoE architecture hosts this model: the source has biases in the FFN "
        "(mlp_bias=true), which none has a place for"
    )


def test_of_a_kind_that_has_a_target_the_sentence_says_what_that_lacks(dense):
    sentence = refusal(dense, "olmo2", keep_dense=[0])
    assert sentence.startswith("no native MoE architecture hosts this model: ")
    assert sentence.endswith(": flex_olmo: flex_olmo can't keep layers dense (`keep_dense`)")


def test_shared_neurons_where_the_target_has_no_place_for_them(dense):
    sentence = refusal(dense, target="mixtral", shared=0.25)
    assert "mixtral has no shared expert (`shared=0.25`)" in sentence
    assert "glm4_moe" in sentence.split("reachable: ")[1]
    assert upcycle.plan(str(dense()), target="mixtral", shared=0).design.geometry.shared_size == 0


def test_auto_chooses_a_target_that_can_share_what_is_asked(dense):
    assert upcycle.plan(str(dense("qwen3"))).target == "qwen3_moe"
    assert upcycle.plan(str(dense("qwen3")), shared=0.25).target == "glm4_moe"
    assert "flex_olmo has no shared expert" in refusal(dense, "olmo2", shared=0.25)


def test_target_that_needs_more_experts_than_are_asked_for(dense):
    words = "`target=glm4_moe`: glm4_moe needs at least 2 experts (reachable: "
    assert refusal(dense, target="glm4_moe", experts=1, top_k=1).startswith(words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "splt"}, "unknown method 'splt', did you mean 'split'? known: copy, drop"),
        ({"split": "randm"}, "unknown split 'randm', did you mean 'random'?"),
        ({"router": "ridg"}, "unknown router 'ridg', did you mean 'ridge'?"),
        ({"shared_by": "energi"}, "did you mean 'energy'?"),
        ({"target": "mixtrl"}, "unknown target 'mixtrl', did you mean 'mixtral'? known: "),
        ({"expert": 4}, "unknown setting 'expert', did you mean 'experts'?"),
        (
            {"method": {"name": "drop", "rato": 0.2}},
            "method 'drop' has no parameter 'rato', did you mean 'ratio'? known: ratio",
        ),
        ({"method.ratio": 2, "method": "drop"}, "method 'drop': ratio=2: input should be less"),
        ({"split": "random", "split.x": 1}, "split 'random' has no parameter 'x'; it has none"),
        ({"splt.rows": "up"}, "'splt' has no parameters, did you mean 'split'?"),
        ({"experts.x": 1}, "'experts' has no parameters"),
        ({"method": "copy", "router.x": 1}, "name the router itself first"),
        ({"split": 5}, "split=5: give a method's name"),
        ({"split": {"rows": "up"}}, "split.name="),
        ({"dtype": "int8"}, "dtype='int8': input should be 'auto', 'float32', 'float16' or"),
        ({"check": "yes"}, "check='yes': input should be 'fast', 'full' or 'none'"),
        ({"experts": 0}, "experts=0: input should be greater than 0"),
        ({"experts": 1.5}, "experts=1.5: input should be a valid integer"),
        ({"seq_len": 7}, "seq_len=7: input should be greater than or equal to 8"),
        ({"seed": -1}, "seed=-1: "),
        ({"seed": 2**63}, f"seed={2**63}: "),
        ({"max_shard_size": "5XB"}, "max_shard_size='5XB': give a size such as 5GB"),
        ({"max_shard_size": "0GB"}, "max_shard_size=0: input should be greater than 0"),
    ],
)
def test_unknown_names_and_bad_values(dense, settings, words):
    assert words in refusal(dense, **settings)


@pytest.mark.parametrize("device", ["tpu9", "meta", ""])
def test_device_that_is_none(dense, device):
    sentence = refusal(dense, device=device)
    assert sentence.startswith(f"`device={device!r}` is not ")
    assert sentence.endswith("give auto, cpu or cuda")


@pytest.mark.parametrize(("device", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_cuda_device_that_is_not_there(dense, monkeypatch, device, count):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert (
        refusal(dense, device=device) == f"`device={device}`: torch sees {count} CUDA devices here"
    )


# --- text ------------------------------------------------------------------------------------


def test_no_text_for_a_split(dense):
    assert refusal(dense, calibration="none") == (
        "`calibration=none`: this conversion needs text for its router (ridge, split)"
    )


def test_no_text_for_the_check_of_copies(dense):
    assert refusal(dense, calibration="none", method="copy") == (
        "`calibration=none` leaves no text for the check: add `check=none`"
    )


def test_sequences_longer_than_the_model_reads(dense):
    assert refusal(dense, fields={"max_position_embeddings": 64}, seq_len=128) == (
        "`seq_len=128` is more than the model's 64 positions (max_position_embeddings): "
        "give `seq_len=64`"
    )


def test_unchecked_copies_need_no_text(dense):
    assert not upcycle.plan(str(dense()), calibration="none", method="copy", check="none").streams


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "nowhere.txt",
            "`calibration='nowhere.txt'` is not a file: give mixed, builtin, self, none",
        ),
        ("probes", "`calibration='probes'` is for `text` alone: nothing is ever fitted on"),
        ("builtin+probe:code", "`calibration='probe:code'` is for `text` alone"),
        ("hf:", "`calibration='hf:'` names no dataset"),
        (__file__, "ends in '.py': known are .txt"),
    ],
)
def test_calibration_text_that_is_none(dense, text, words):
    assert words in refusal(dense, calibration=text)


# --- the place of the result -----------------------------------------------------------------


def test_disk_that_is_too_small(dense, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(9 * 10**6, 7 * 10**6, 2 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "below" / "out"
    sentence = f"`out={out}` needs 0.1 GB, but {tmp_path} has 0.0 GB free"
    assert refusal(dense, out=out) == sentence
    with pytest.raises(UpcycleError, match=r"needs 0\.1 GB"):
        upcycle.convert(str(dense()), out, resume=True)


def test_room_that_an_interrupted_run_takes_counts_as_free(dense, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plan = upcycle.plan(str(dense()))
    needed = plan.bytes + plan.aside_bytes() + 64 * 2**20
    usage = shutil._ntuple_diskusage(2 * needed, needed + 1, needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "free" in refusal(dense, out=out)
    (partial_folder(out) / "aside").mkdir(parents=True)
    (partial_folder(out) / "aside" / "layer 0.safetensors").write_bytes(b"x")
    (partial_folder(out) / "journal.jsonl").write_text('{"fingerprint": "a", "threads": 1}\n')
    assert upcycle.plan(str(dense()), out).out == out


ASIDE = {
    "neither": {},
    "sequential": {"sequential": True},
    "refit": {"compensate": "least_squares"},
    "both": {"sequential": True, "compensate": "least_squares", "keep_dense": [1]},
    "all matrices refit": {"compensate": "descent"},
    "all matrices learned": {"fit": "distillation", "compensate": "least_squares"},
    "repeated neurons": {"split": "sharing_inner"},
    "gradients": {"shared_by": "taylor"},
    "both in bfloat16": {
        "sequential": True, "compensate": "least_squares", "dtype": "bfloat16",
    },
    "copies": {"method": "copy", "sequential": True},
    "pruned copies": {
        "method": "prune", "router": "membership", "top_k": 1, "compensate": "least_squares",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [*ASIDE.values(), {"sequential": True, "dtype": "bfloat16"}],
    ids=[*ASIDE, "sequential in bfloat16"],
)
def test_room_for_what_is_put_aside_is_counted(dense, tmp_path, monkeypatch, settings):
    put_aside = []

    def look(workspace, **_):
        for path in (workspace.folder / "aside").glob("*"):
            put_aside.extend(load_file(path).values())

    monkeypatch.setattr(Workspace, "publish", look)
    settings = PLAIN_SPLIT | QUICK | settings
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.aside_bytes() == sum(tensor.nbytes for tensor in put_aside)


def test_place_that_holds_something(dense, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    assert refusal(dense, out=tmp_path) == (
        f"`out={tmp_path}` exists and is not empty: choose another, or `overwrite`"
    )
    assert refusal(dense, out=tmp_path, overwrite=True) == (
        f"`out={tmp_path}` was not written by upcycle, so `overwrite` leaves it alone"
    )


def test_place_that_is_a_file(dense, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert refusal(dense, out=file) == f"`out={file}` is a file: give a folder"
    below = file / "out"
    assert refusal(dense, out=below) == f"`out={below}`: {file} is a file: give another folder"


def test_place_that_holds_the_source(dense):
    model = dense()
    for out in (model, model.parent, model / ".." / model.name):
        sentence = refusal(dense, out=out, overwrite=True)
        assert sentence == f"`out={out.resolve()}` holds the source: give another folder"


def test_place_that_is_the_working_directory(dense, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert upcycle.plan(str(dense()), ".").out == tmp_path / "out"


# --- what the plan does not do, and what it promises -----------------------------------------


def test_plan_reads_no_weights_and_writes_nothing(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(DenseSource, "read", lambda *_: pytest.fail("weights were read"))
    upcycle.plan(str(dense()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "split_target", "copy_target"),
    [
        ("llama", "qwen2_moe", "mixtral"),
        ("mistral", "qwen2_moe", "mixtral"),
        ("qwen2", "qwen2_moe", "qwen2_moe"),
        ("qwen3", "qwen3_moe", "qwen3_moe"),
        ("phi3", "qwen2_moe", "mixtral"),
        ("gemma", "granitemoeshared", "granitemoeshared"),
        ("granite", "granitemoeshared", "granitemoeshared"),
        ("olmo2", "flex_olmo", "flex_olmo"),
        ("ernie4_5", "ernie4_5_moe", "ernie4_5_moe"),
        ("youtu", "deepseek_v3", "deepseek_v3"),
        ("lfm2", "lfm2_moe", "lfm2_moe"),
        ("arcee", "qwen2_moe", "mixtral"),
        ("granitemoehybrid", "granitemoehybrid", "granitemoehybrid"),
        ("nemotron_h", "nemotron_h", "nemotron_h"),
    ],
)
def test_target_that_auto_chooses(dense, family, split_target, copy_target):
    model = str(dense(family))
    assert upcycle.plan(model).target == split_target
    assert upcycle.plan(model, method="copy").target == copy_target


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, "qwen3_moe"),
        ({"keep_dense": "1"}, "qwen3_moe"),
        ({"shared": 0.25}, "glm4_moe"),
        ({"shared": 0.25, "keep_dense": "0"}, "glm4_moe"),
        ({"shared": 0.25, "keep_dense": "1"}, "laguna"),
    ],
)
def test_laguna_is_for_what_no_other_target_does(dense, settings, target):
    assert upcycle.plan(str(dense("qwen3")), experts=6, top_k=2, **settings).target == target


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral", "glm4_moe", "granitemoeshared"])
def test_a_quarter_is_shared_where_the_target_has_a_shared_expert(dense, target):
    geometry = upcycle.plan(str(dense()), target=target, experts=6, top_k=4).design.geometry
    assert (geometry.num_experts, geometry.top_k) == (6, 4)
    expected = (32, 0) if target == "mixtral" else (24, 48)
    assert (geometry.expert_size, geometry.shared_size) == expected


def test_sharing_by_default_leaves_the_target_enough_to_route(dense):
    plan = upcycle.plan(str(dense()), target="glm4_moe", experts=2, top_k=1)
    assert plan.design.geometry.num_experts == 2


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe", "mixtral"])
@pytest.mark.parametrize("settings", [{}, {"experts": 8}, {"experts": 8, "top_k": 2}])
def test_a_plans_own_recipe_makes_the_same_plan(dense, target, settings):
    model = str(dense(intermediate_size=512))
    made = upcycle.plan(model, target=target, keep_dense="none", **settings)
    asked = ("experts", "top_k", "shared", "target")
    again = {name: getattr(made.recipe, name) for name in asked}
    assert upcycle.plan(model, keep_dense="none", **again).design.geometry == made.design.geometry
    assert again["experts"] == made.design.geometry.num_experts


# --- what it says in words -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"experts": 8, "top_k": 2, "shared": 0},
            "A token uses 25 % of each FFN: 2 of 8 experts, 12.5 % each.",
        ),
        (
            {"experts": 6, "top_k": 2},
            "A token uses 50 % of each FFN: 2 of 6 experts, 12.5 % each and the 25 % that are "
            "always on.",
        ),
        (
            {"active": 0.5, "keep_dense": "none"},
            "A token uses 50 % of each FFN: 6 of 18 experts, 4.2 % each and the 25 % that are "
            "always on.",
        ),
        (
            {"method": "prune", "experts": 4, "keep_dense": "none"},
            "A token uses 50 % of each FFN: 1 of 4 pruned copies.",
        ),
        ({"method": "copy", "experts": 4}, "A token uses 2 of 4 copies of each FFN."),
        (
            {"method": "drop", "experts": 4, "granularity": 4},
            "A token uses 8 of 16 shards, of 4 copies of each FFN.",
        ),
    ],
)
def test_what_a_token_uses_is_one_sentence(dense, settings, sentence):
    made = upcycle.plan(str(dense()), **settings)
    assert made.way.usage(made.design.geometry) == sentence


CHANGED = "`shared={}` became {}, so that all experts have the same width"


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"experts": 5, "shared": 0.375}, None),  # 24 neurons each
        ({"experts": 5, "shared": 0.3}, CHANGED.format(0.3, 0.375)),  # 26.9 down to 24
        ({"experts": 8, "shared": 0.25}, CHANGED.format(0.25, 0.333)),  # 18 down to 16
        ({"experts": 8, "shared": 0.01}, CHANGED.format(0.01, 0.333)),  # 23.8 down to 16
        ({"experts": 8, "shared": 0}, None),
        ({"experts": 8, "shared": 0.25, "target": "glm4_moe"}, CHANGED.format(0.25, 0.333)),
        ({"experts": 5, "shared": 0.5, "target": "glm4_moe"}, CHANGED.format(0.5, 0.583)),
        ({"experts": 8, "shared": 0.333}, None),  # less than one neuron
        ({"shared": 0.1}, CHANGED.format(0.1, 0.0833)),  # 22 of 8 neurons
        ({"experts": 8}, None),
        ({}, None),
    ],
)
def test_a_share_that_is_changed_is_said(dense, settings, note):
    made = upcycle.plan(str(dense()), top_k=1, **settings)
    said = [each for each in made.warnings if each.startswith("`shared=")]
    assert said == ([note] if note else [])


WRITTEN = {
    "split": ("llama", {}),
    "split with dense layers": ("llama", {"keep_dense": "1"}),
    "fused experts": ("granite", {"shared": 0.25}),
    "fused source": ("phi3", {"dtype": "bfloat16"}),
    "sigmoid": ("qwen3", {"target": "glm4_moe", "keep_dense": "0"}),
    "copies": ("llama", {"method": "copy", "experts": 4}),
    "granular copies": ("olmo2", {"method": "drop", "experts": 2, "granularity": 2, "top_k": 4}),
    "tied": ("gemma", {"experts": 4, "top_k": 2}),
    "shards": ("qwen2", {"max_shard_size": "50KB"}),
}


def runtime_refusal(runtime, dense, family="llama", fields=None, **settings):
    """What the plan says of a runtime, nothing if that runs the result."""
    return upcycle.plan(str(dense(family, **(fields or {}))), **settings).runtimes[runtime]


UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
ROUTED = {"experts": 8, "keep_dense": "none"}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
MIXED_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 6,
        "long_factor": [4.0] * 6,
        "original_max_position_embeddings": 64,
    }
}
NONE_SHARED = ROUTED | {"shared": 0, "top_k": 2}
COPIES = {"method": "copy", "experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("runtime", "family", "fields", "settings"),
    [
        ("llama.cpp", "llama", UNTIED, ROUTED),
        ("llama.cpp", "llama", UNTIED, NONE_SHARED),
        ("llama.cpp", "llama", UNTIED, {"target": "granitemoeshared"}),
        ("llama.cpp", "llama", TIED, {"target": "granitemoeshared"}),
        ("llama.cpp", "llama", {}, COPIES),
        ("llama.cpp", "llama", {}, {"method": "prune", "target": "mixtral"}),
        ("llama.cpp", "qwen2", {}, {"target": "granitemoeshared"}),
        ("llama.cpp", "qwen3", {}, ROUTED),
        ("llama.cpp", "granite", {}, {}),
        ("MLX", "llama", TIED, COPIES),
        ("MLX", "llama", UNTIED, ROUTED),
        ("MLX", "llama", UNTIED, {"target": "glm4_moe"}),
        ("MLX", "qwen2", UNTIED, {"target": "glm4_moe"}),
        ("MLX", "qwen3", TIED, {}),
        ("vLLM", "llama", TIED, {}),
        ("vLLM", "llama", UNTIED, {"keep_dense": [1]}),
        ("vLLM", "llama", {}, COPIES),
        ("vLLM", "llama", {}, {"method": "prune"}),
        ("vLLM", "llama", {}, {"target": "granitemoeshared"}),
        ("vLLM", "llama", {"head_dim": 32}, {"target": "glm4_moe"}),
        ("vLLM", "mistral", {}, COPIES),
        ("vLLM", "qwen2", {}, {}),
        ("vLLM", "qwen2", {}, COPIES),
        ("vLLM", "qwen3", {}, {}),
        ("vLLM", "granite", {}, {}),
        ("vLLM", "olmo2", {}, {}),
        ("vLLM", "cwm", {}, {"target": "granitemoe_swa"}),
        ("llama.cpp", "cwm", {"head_dim": 12}, {"target": "granitemoe_swa"}),
        ("transformers 4", "llama", TIED, {"keep_dense": [1]}),
        ("transformers 4", "llama", {"head_dim": 32}, COPIES),
        ("transformers 4", "llama", LONGROPE, {}),
        ("transformers 4", "mistral", {"head_dim": 12}, {"target": "qwen2_moe"}),
        ("transformers 4", "qwen2", {}, {"target": "granitemoeshared"}),
        ("transformers 4", "olmo2", {}, {}),
    ],
)
def test_nothing_is_said_of_a_runtime_that_runs_the_result(
    dense, runtime, family, fields, settings
):
    assert runtime_refusal(runtime, dense, family, fields, **settings) == ""


@pytest.mark.parametrize(
    ("runtime", "family", "fields", "settings", "obstacle"),
    [
        ("llama.cpp", "llama", UNTIED, {}, "every layer must have experts (`keep_dense=none`)"),
        ("llama.cpp", "llama", UNTIED, {"keep_dense": [1]}, "every layer must have experts"),
        ("llama.cpp", "llama", TIED, ROUTED, "embeddings must be tensors of their own"),
        ("llama.cpp", "llama", {}, COPIES | {"target": "qwen2_moe"}, "are not renormalised"),
        ("llama.cpp", "qwen3", {}, COPIES | {"top_k": 1}, "experts are renormalised"),
        ("llama.cpp", "llama", {}, {"target": "glm4_moe"}, "GLM's own tokenizers"),
        ("llama.cpp", "olmo2", {}, {}, "it does not know the architecture"),
        ("llama.cpp", "gemma", {}, {}, "experts compute silu, not gelu"),
        ("llama.cpp", "mistral", {}, COPIES, "attention sees further than 16 tokens"),
        ("MLX", "llama", UNTIED, {}, "every layer must have experts (`keep_dense=none`)"),
        ("MLX", "llama", TIED, ROUTED, "embeddings must be tensors of their own"),
        ("MLX", "llama", TIED, {"target": "glm4_moe"}, "must be tensors of their own"),
        ("MLX", "llama", UNTIED, COPIES | {"target": "glm4_moe"}, "must be a shared expert"),
        ("MLX", "llama", {}, COPIES | {"target": "qwen2_moe"}, "are not renormalised"),
        ("MLX", "llama", {"head_dim": 32}, COPIES, "heads must be of 48 / 4 channels, not 32"),
        ("MLX", "llama", LINEAR, COPIES, "embeddings are not scaled (rope_type linear)"),
        ("MLX", "qwen3", {"attention_bias": True}, {}, "attention has no biases"),
        ("MLX", "mistral", {}, COPIES, "attention sees further than 16 tokens"),
        ("MLX", "granite", {}, {}, "it does not know the architecture"),
        ("transformers 4", "llama", {"head_dim": 32}, {}, "heads must be of 48 / 4 channels"),
        ("transformers 4", "gemma", {}, {}, "heads must be of 48 / 4 channels, not 16"),
        (
            "transformers 4",
            "qwen2",
            MIXED_WINDOW,
            {},
            "all layers must have the same sliding window",
        ),
        ("vLLM", "gemma", {}, {}, "experts compute silu, not gelu_pytorch_tanh"),
        ("vLLM", "qwen2", {}, {"target": "granitemoeshared"}, "attention has no biases"),
        ("vLLM", "qwen3", {"attention_bias": True}, {}, "attention has no bias on its output"),
        ("vLLM", "qwen2", MIXED_WINDOW, {}, "all layers must have the same sliding window"),
        ("vLLM", "llama", {"head_dim": 32}, {}, "heads must be of 48 / 4 channels, not 32"),
        ("vLLM", "llama", {}, COPIES | {"target": "glm4_moe"}, "must be a shared expert"),
        ("vLLM", "ministral3", {}, COPIES, "yarn may not heed mscale and mscale_all_dim"),
        ("llama.cpp", "ministral3", {}, COPIES, "yarn may not heed mscale and mscale_all_dim"),
        ("vLLM", "smollm3", {}, {}, "all layers must have the same rotary embedding"),
        ("vLLM", "smollm3", {"attention_bias": True}, {}, "attention has no biases"),
        ("llama.cpp", "smollm3", {}, {}, "some layer must have a sliding window"),
        ("llama.cpp", "granite_swa", {}, {}, "rotary embeddings must have the same base"),
        ("transformers 4", "smollm3", {}, {}, "it does not know the architecture"),
    ],
)
def test_what_a_runtime_can_not_run_is_said(dense, runtime, family, fields, settings, obstacle):
    assert obstacle in runtime_refusal(runtime, dense, family, fields, **settings)


@pytest.mark.parametrize(
    ("family", "fields", "settings", "lost"),
    [
        ("llama", UNTIED, {}, ["llama.cpp", "MLX"]),
        ("llama", TIED, {}, []),  # they would not run it anyway
        ("qwen3", TIED, {}, ["llama.cpp"]),
        ("olmo2", {}, {"keep_dense": "none"}, []),
        ("llama", UNTIED, {"keep_dense": "none"}, []),
    ],
)
def test_runtimes_that_dense_layers_cost(dense, family, fields, settings, lost):
    model, settings = str(dense(family, **fields)), {"keep_dense": [0]} | settings
    plan = upcycle.plan(model, **settings)
    assert plan.runtimes_lost == lost
    without = upcycle.plan(model, **settings | {"keep_dense": "none", "target": plan.target})
    assert [
        name for name, why in plan.runtimes.items() if why and not without.runtimes[name]
    ] == lost


@pytest.mark.parametrize(
    ("runtime", "family", "fields", "settings", "end"),
    [
        (
            "llama.cpp",
            "llama",
            {},
            {"experts": 8},
            "; it runs `target=granitemoeshared or mixtral`",
        ),
        ("llama.cpp", "llama", {}, {"method": "prune"}, "`target=granitemoeshared or mixtral`"),
        (
            "llama.cpp",
            "llama",
            {},
            {"keep_dense": [1]},
            "it runs `target=granitemoeshared or mixtral`",
        ),
        ("llama.cpp", "llama", {}, {"shared": 0.25}, "; it runs `target=granitemoeshared`"),
        ("llama.cpp", "gemma", {}, {}, "not gelu_pytorch_tanh"),
        ("vLLM", "llama", {"head_dim": 32}, {}, "not 32; it runs `target=glm4_moe or mixtral`"),
        ("vLLM", "llama", {"head_dim": 32}, {"keep_dense": [1]}, "32; it runs `target=mixtral`"),
        ("vLLM", "llama", {"head_dim": 32}, {"keep_dense": [1], "shared": 0.125}, "not 32"),
        ("MLX", "llama", TIED, {}, "of their own; it runs `target=mixtral`"),
        ("MLX", "llama", TIED, {"shared": 0.25}, "of their own"),
        ("MLX", "llama", UNTIED, {}, "; it runs `target=glm4_moe or mixtral`"),
        ("MLX", "llama", UNTIED, {"shared": 0.25}, "; it runs `target=glm4_moe`"),
        ("vLLM", "gemma", {}, {}, "channels, not 16"),
    ],
)
def test_targets_that_a_runtime_runs_are_named(dense, runtime, family, fields, settings, end):
    assert runtime_refusal(runtime, dense, family, fields, **settings).endswith(end)


def test_every_target_says_what_each_runtime_can_not_run():
    assert {tuple(target.runtimes) for target in TARGETS.values()} == {get_args(Runtime)}


def test_a_split_counts_to_one_whether_or_not_a_runtime_renormalises_of_itself(dense):
    made = upcycle.plan(str(dense("qwen3")), experts=8, top_k=2)
    assert made.config["norm_topk_prob"] is True
    assert made.design.gains.routed == 2


@pytest.fixture(scope="module", params=WRITTEN)
def written(request, dense, tmp_path_factory):
    """A plan, and the folder that its conversion wrote."""
    family, settings = WRITTEN[request.param]
    out = tmp_path_factory.mktemp("out")
    conversion = upcycle.convert(str(dense(family)), out, **QUICK, split="contiguous", **settings)
    return conversion.plan, out


def test_written_headers_are_the_planned_ones(written):
    plan, out = written
    headers = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                headers[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])
    assert headers == {spec.name: (spec.shape, spec.dtype) for spec in plan.specs}
    assert sum(tensor.nbytes for tensor in weights(out).values()) == plan.bytes


def test_parameters_are_those_of_the_loaded_model(written):
    plan, out = written
    model, dense = load(out, plan.design.dtype), load(plan.source.folder)
    bias = [b for name, b in model.named_buffers() if "e_score_correction_bias" in name]
    total = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in bias)
    assert plan.params_total == total
    assert plan.params_dense == sum(p.numel() for p in dense.parameters())
    routed = sum(t.numel() for name, t in weights(out).items() if is_routed(name))
    idle = routed * (1 - plan.design.geometry.top_k / plan.design.geometry.num_experts)
    assert plan.params_active == total - round(idle)


def test_active_ratio_is_that_of_the_loaded_model(written):
    plan, out = written
    ffn = 3 * plan.source.arch.hidden_size * plan.source.arch.intermediate_size
    outside = plan.params_dense - ffn * plan.source.arch.num_layers
    tensors = weights(out)
    beside = ("router", "gate.weight", "e_score", "proj.bias")
    others = sum(t.numel() for n, t in tensors.items() if any(part in n for part in beside))
    source = sum(t.numel() for n, t in weights(plan.source.folder).items() if "proj.bias" in n)
    active = (plan.params_active - outside - others + source) / (ffn * plan.source.arch.num_layers)
    assert isclose(active, plan.active_ffn_ratio)


# --- convert never fails after plan succeeded ------------------------------------------------

CHOICES = {
    "method": ["split", "prune", "prune", "copy", "drop", "noise"],
    "experts": [None, 1, 2, 3, 4, 5, 8],
    "top_k": [None, None, 1, 2, 3, 4, 8],
    "active": [None, None, 0.3, 0.5, 0.8],
    "shared": [None, None, 0, 0.125, 0.3, 0.5],
    "granularity": [1, 1, 1, 2, 4],
    "target": ["auto", "auto", "qwen2_moe", "mixtral", "glm4_moe", "granitemoeshared"],
    "router": [None, None, "ridge", "centroid", "representative", "kmeans", "membership", "normal"],
    "split": ["coactivation", "random", "contiguous", "parameter_clustering", "sharing_inner"],
    "shared_by": ["energy", "rate", "consensus"],
    "compensate": ["none", "none", "least_squares"],
    "sequential": [False, True],
    "keep_dense": ["none"],
    "dtype": ["auto", "float32", "float16"],
    "calibration": ["builtin", "builtin", "builtin", "none"],
    "check": ["none", "fast"],
}


def random_requests(count: int) -> list[dict]:
    rng = random.Random(0)
    drawn = ({name: rng.choice(of) for name, of in CHOICES.items()} for _ in range(count))
    return [{k: v for k, v in r.items() if k != "active" or v is not None} for r in drawn]


def planned(model: str, settings: dict) -> bool:
    try:
        upcycle.plan(model, **settings)
    except UpcycleError:
        return False
    return True


def test_tensor_that_is_float32_whatever_the_dtype(dense, tmp_path):
    """Selection biases: rounded to bfloat16, small steps of balancing would be lost."""
    upcycle.convert(
        str(dense()), tmp_path / "out", target="glm4_moe", dtype="bfloat16", split="random", **QUICK
    )
    stored = weights(tmp_path / "out")
    wide = {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16}
    assert wide == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(3)}
    for name in wide:
        assert torch.equal(stored[name], torch.zeros(len(stored[name]), dtype=torch.float32))


def test_what_is_planned_is_converted(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(planning.CHECK_TOKENS, "fast", 64)
    model = str(dense(num_hidden_layers=1, dtype=torch.bfloat16))
    tokens = {"calibration_tokens": 128, "seq_len": 64}
    legal = (r | tokens for r in random_requests(4000) if planned(model, r | tokens))
    requests = list(itertools.islice(legal, 40))
    assert len(requests) == 40
    for number, request in enumerate(requests):
        out = tmp_path / str(number)
        plan = upcycle.convert(model, out, **request).plan
        settings = plan.recipe.settings()
        assert json.loads((out / "upcycle.json").read_text())["plan"]["recipe"] == settings


def test_what_is_planned_is_converted_with_the_dense_layers_that_are_measured(dense, tmp_path):
    model = str(dense())
    tokens = {"calibration_tokens": 128, "seq_len": 64, "keep_dense": "auto", "check": "none"}
    legal = (r | tokens for r in random_requests(4000) if planned(model, r | tokens))
    for number, request in enumerate(itertools.islice(legal, 20)):
        plan = upcycle.convert(model, tmp_path / str(number), **request).plan
        assert set(plan.moe_layers) | set(plan.spec.dense_layers) == {0, 1, 2}
        if request["top_k"] is None:
            assert plan.active_ffn_ratio <= request.get("active", 0.5) + 1e-9


def test_what_is_refused_is_refused_by_convert_before_it_writes(dense, tmp_path):
    model = str(dense(num_hidden_layers=1))
    refused = [request for request in random_requests(60) if not planned(model, request)]
    assert len(refused) > 10
    for request in refused:
        with pytest.raises(UpcycleError):
            upcycle.convert(model, tmp_path / "out", **request)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("router", ["ridge", "centroid", "representative"])
def test_router_that_cannot_tell_copies_apart(dense, router):
    words = "has nothing to tell copies apart by: use kmeans or membership or normal"
    with pytest.raises(UpcycleError, match=f"`router={router}` {words}"):
        upcycle.plan(str(dense()), method="copy", experts=4, router=router)


def test_fewer_tokens_than_experts(dense):
    with pytest.raises(UpcycleError, match="`calibration_tokens=8` is too few for 24 experts"):
        upcycle.plan(str(dense()), experts=24, shared=0, calibration_tokens=8, seq_len=8)


SHIFTING = {
    "seq_len": 9, "split": "random", "keep_dense": "auto", "check": "none",
    "calibration": "builtin",
}  # fmt: skip
"""18 experts are routed, and 21 once one of three layers stays dense."""


def test_tokens_that_suffice_until_a_layer_stays_dense(dense, tmp_path, monkeypatch):
    def try_layers(plan, layers, *_):
        return Trial(layers, {"builtin": 1.0 if layers == (0,) else 2.0})

    monkeypatch.setattr(dense_layers, "measure_damage", lambda *_: [9.0, 0.1, 0.1])
    monkeypatch.setattr(dense_layers, "try_layers", try_layers)
    assert upcycle.plan(str(dense()), **SHIFTING).design.geometry.num_experts == 18
    assert refusal(dense, **SHIFTING, calibration_tokens=18) == (
        "`calibration_tokens=18` is too few for 21 experts: give thousands"
    )
    plan = upcycle.convert(str(dense()), tmp_path / "out", **SHIFTING, calibration_tokens=27).plan
    assert (plan.spec.dense_layers, plan.design.geometry.num_experts) == ((0,), 21)


@pytest.mark.parametrize("fixed", [{"shared": 0.25}, {"top_k": 6}])
def test_tokens_that_suffice_because_the_request_fixes_what_is_shared(dense, tmp_path, fixed):
    settings = SHIFTING | {"calibration_tokens": 18} | fixed
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.design.geometry.num_experts == 18


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"split": {"name": "token_clusters", "tokens": 5}},
            "split.tokens=5 looks at 4 of 16 calibration tokens, too few for 8 experts: "
            "give thousands",
        ),
        (
            {"router": {"name": "kmeans", "tokens": 15}, "experts": 12, "top_k": 2},
            "router.tokens=15 looks at 8 of 16 calibration tokens, too few for 12 experts: "
            "give thousands",
        ),
        (
            {"router": {"name": "kmeans", "tokens": 7}, "method": "copy"},
            "router.tokens=7 looks at 6 of 16 calibration tokens, too few for 8 experts: "
            "give thousands",
        ),
    ],
)
def test_sample_of_fewer_tokens_than_experts(dense, settings, words):
    settings = {
        "calibration_tokens": 16,
        "seq_len": 8,
        "experts": 8,
        "shared": 0,
    } | settings
    assert refusal(dense, **settings) == words


@pytest.mark.parametrize(
    "settings",
    [
        {"split": {"name": "token_clusters", "tokens": 8}},
        {"router": {"name": "kmeans", "tokens": 8}},
    ],
)
def test_sample_of_one_token_per_expert_is_enough(dense, tmp_path, settings, monkeypatch):
    """Each expert then is one token's: its neurons are a whole part, its centroid is the token."""
    clustered = []

    def cluster(x_TD, *rest):
        clustered.append(x_TD)
        return balanced_kmeans(x_TD, *rest)

    monkeypatch.setattr(kmeans, "balanced_kmeans", cluster)
    tokens = {"calibration_tokens": 16, "seq_len": 8, "check": "none"}
    plain = PLAIN_SPLIT | {"shared": 0} | tokens
    upcycle.convert(str(dense()), tmp_path / "out", **plain | settings)
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    for layer in record["layers"]:
        assert sorted(layer["permutation"]) == list(range(192))
    assert len(clustered) == (3 if "router" in settings else 0)
    for layer, x_ED in enumerate(clustered):
        router_ED = weights(tmp_path / "out")[f"model.layers.{layer}.mlp.gate.weight"]
        x_ED = x_ED - x_ED.mean(0)  # what all experts have in common chooses none
        alike_EE = functional.cosine_similarity(router_ED[:, None], x_ED[None], dim=-1)
        assert alike_EE.max(0).values.min() > 1 - 1e-5
        assert alike_EE.max(1).values.min() > 1 - 1e-5


def test_split_whose_library_is_not_installed(dense, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    assert refusal(dense, split="coactivation_graph") == (
        "split 'coactivation_graph' needs `pip install upcycle[metis]`"
    )


def test_model_without_a_tokenizer(dense, tmp_path):
    for path in dense().iterdir():
        if not path.name.startswith("token"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UpcycleError, match="holds no tokenizer that transformers reads"):
        upcycle.plan(str(tmp_path))
