"""From a request to its plan: it foresees every error, and reads no weights and writes nothing."""

import itertools
import json
import random
import re
import sys

import pytest
import torch
from refusals import refusal
from tiny import PLAIN_SPLIT

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.models.source import DenseSource

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


def test_widths_that_grouped_matrix_products_do_not_take(dense):
    """What transformers says of such rows: strides should be multiple of 16 bytes."""
    odd = {"intermediate_size": 190}
    assert refusal(dense, fields=odd, method="copy") == (
        "whole FFNs of 190 neurons can't be experts, for grouped matrix products need a multiple "
        "of 8; `method=prune` keeps one that is"
    )
    assert upcycle.plan(str(dense(**odd)), method="prune").design.geometry.expert_size == 88
    narrow = {"hidden_size": 50, "num_attention_heads": 5, "num_key_value_heads": 1}
    assert "has hidden states of 50 channels" in refusal(dense, fields=narrow)


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("copy", "split", "random"),
        ("prune", "shared_by", "rate"),
        ("drop", "router_spread", 0.3),
    ],
)
def test_settings_of_a_split_are_said_to_change_nothing_elsewhere(dense, method, field, value):
    (note,) = upcycle.plan(str(dense()), method=method, **{field: value}).warnings[-1:]
    assert note == (f"`{field}={value}` changes nothing here: `method={method}` has no use for it")
    assert not any(
        "has no use" in note for note in upcycle.plan(str(dense()), method=method).warnings
    )


def test_a_rule_for_shared_neurons_is_said_to_change_nothing_where_none_are(dense):
    rule, note = {"shared_by": "rate"}, "`shared_by=rate` changes nothing here: no neuron is shared"
    assert note in upcycle.plan(str(dense()), **rule, shared=0).warnings
    assert note not in upcycle.plan(str(dense()), **rule, shared=0.25).warnings


def test_one_copy_is_one_per_token(dense):
    geometry = upcycle.plan(str(dense()), method="copy", experts=1, granularity=4).design.geometry
    assert (geometry.num_experts, geometry.top_k) == (4, 4)


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
        (
            {"method": {"name": "split", "ratio": 1}},
            "method 'split' has no parameter 'ratio'; it has none",
        ),
    ],
)
def test_counts_that_contradict_each_other(dense, settings, sentence):
    assert refusal(dense, **settings) == sentence


# --- layers, names, devices ------------------------------------------------------------------


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
        ({"split": {"rows": "up"}}, "split.name is missing"),
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


@pytest.mark.parametrize("router", ["ridge", "centroid", "representative"])
def test_router_that_cannot_tell_copies_apart(dense, router):
    words = "has nothing to tell copies apart by: use kmeans or membership or normal"
    with pytest.raises(UpcycleError, match=f"`router={router}` {words}"):
        upcycle.plan(str(dense()), method="copy", experts=4, router=router)


def test_split_whose_library_is_not_installed(dense, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymetis", None)
    assert refusal(dense, split="coactivation_graph") == (
        "split 'coactivation_graph' needs `pip install upcycle[metis]`"
    )


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


# --- what the plan does not do, and what it promises -----------------------------------------


def test_plan_reads_no_weights_and_writes_nothing(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(DenseSource, "read", lambda *_: pytest.fail("weights were read"))
    upcycle.plan(str(dense()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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
        (
            {"method": "copy", "experts": 1, "granularity": 4},
            "A token uses 4 of 4 shards, of one copy of each FFN.",
        ),
    ],
)
def test_what_a_token_uses_is_one_sentence(dense, settings, sentence):
    made = upcycle.plan(str(dense()), **settings)
    assert made.way.usage(made.design.geometry) == sentence


CHANGED = "`shared={}` became {}: {} experts of {} neurons leave that"


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"experts": 5, "shared": 0.375}, None),  # 24 neurons each
        ({"experts": 5, "shared": 0.3}, CHANGED.format(0.3, 0.375, 5, 24)),  # 26.9 down to 24
        ({"experts": 8, "shared": 0.25}, CHANGED.format(0.25, 0.333, 8, 16)),  # 18 down to 16
        ({"experts": 8, "shared": 0.01}, CHANGED.format(0.01, 0.333, 8, 16)),  # 23.8 down to 16
        ({"experts": 8, "shared": 0}, None),
        ({"experts": 8, "shared": 0.25, "target": "glm4_moe"}, CHANGED.format(0.25, 0.333, 8, 16)),
        ({"experts": 5, "shared": 0.5, "target": "glm4_moe"}, CHANGED.format(0.5, 0.583, 5, 16)),
        ({"experts": 8, "shared": 0.333}, None),  # less than one neuron
        ({"shared": 0.1}, CHANGED.format(0.1, 0.0833, 22, 8)),  # 22 of 8 neurons
        ({"experts": 8}, None),
        ({}, None),
    ],
)
def test_a_share_that_is_changed_is_said(dense, settings, note):
    made = upcycle.plan(str(dense()), top_k=1, **settings)
    said = [each for each in made.warnings if each.startswith("`shared=")]
    assert said == ([note] if note else [])


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


def test_what_is_planned_is_converted(dense, tmp_path, monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)
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
