"""How many granules there are, and how many a token gets, from what was asked for."""

from math import isclose

import pytest
from models import SIZES

import upcycle
from upcycle import UpcycleError
from upcycle.budget import default_granules, geometry_of, legal_granules, moe_share
from upcycle.recipe import Recipe, load_recipe
from upcycle.types import Geometry

F, LAYERS = 16384, 4
TINY_LAYERS = SIZES["num_hidden_layers"]
WITH_SHARED = ("qwen2_moe", "glm4_moe", "granitemoeshared")
WITHOUT_SHARED = ("qwen3_moe", "mixtral")
SPLIT = {"split": "random", "router": "normal", "compensate": "none", "sequential": False}


def counts(*, num_neurons=F, num_dense=0, min_routed=1, **asked) -> tuple[int, int, int]:
    """Granules, shared ones and top_k; by default for a target with shared experts."""
    made = geometry_of(Recipe(**asked), num_neurons, LAYERS, num_dense, min_routed=min_routed)
    return made.num_experts, made.shared_experts, made.top_k


def planned(dense, **asked):
    family = "qwen3" if asked.get("target") == "qwen3_moe" else "llama"
    return upcycle.plan(str(dense(family)), **SPLIT | {"keep_dense": "none"} | asked)


def refusal(act, *arguments, **settings) -> str:
    with pytest.raises(UpcycleError) as caught:
        act(*arguments, **settings)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert ". " not in sentence
    return sentence


# --- granules --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_neurons", "granules"),
    [
        (8, 1),
        (192, 24),
        (512, 32),
        (1536, 32),  # of 48 neurons: a small model gets fine granules all the same
        (4864, 32),
        (8192, 32),
        (8960, 35),
        (11008, 43),
        (14336, 56),
        (18944, 64),
        (8 * 106, 53),  # 53 or 2
    ],
)
def test_default_granules(num_neurons, granules):
    assert default_granules(num_neurons) == granules


def test_experts_that_are_not_named_are_the_default_granules():
    assert counts(num_neurons=4864, active=0.5) == (32, 8, 8)
    assert counts(num_neurons=4864, top_k=3)[0] == 32


@pytest.mark.parametrize("num_neurons", [8 * n for n in (1, 6, 19, 53, 97, 344, 720, 1331, 2048)])
def test_default_granules_are_legal_and_nearest_to_what_is_wanted_as_a_ratio(num_neurons):
    legal = [n for n in range(1, num_neurons + 1) if num_neurons % n == num_neurons // n % 8 == 0]
    assert legal_granules(num_neurons) == legal
    chosen = default_granules(num_neurons)
    assert chosen in legal
    wanted = min(max(num_neurons // 256, 32), 64)
    assert all(max(chosen / wanted, wanted / chosen) <= max(n / wanted, wanted / n) for n in legal)


def test_width_that_nothing_cuts_is_refused():
    assert legal_granules(12) == []
    assert refusal(counts, num_neurons=12, active=0.5).endswith("nearest: none")


def test_explicit_experts_are_kept():
    assert counts(experts=16, active=0.5) == (16, 4, 4)


# --- active ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (64, 16, 16)),  # half, if nothing is said
        ({"active": 0.5}, (64, 16, 16)),
        ({"active": 0.25}, (64, 8, 8)),  # half of them shared
        ({"active": 0.75}, (64, 16, 32)),  # but no more than a quarter of all
        ({"active": 0.3}, (64, 9, 10)),  # 19.2 granules
        ({"active": 0.9999}, (64, 16, 47)),
        ({"active": 1 / 64}, (64, 0, 1)),
        ({"active": 2 / 64}, (64, 1, 1)),
        ({"active": 0.5, "experts": 2}, (2, 0, 1)),
        ({"active": 0.75, "experts": 4}, (4, 1, 2)),
        ({"active": 0.74, "experts": 4}, (4, 1, 1)),
    ],
)
def test_active_gives_shared_experts_and_top_k(asked, expected):
    assert counts(**asked) == expected


@pytest.mark.parametrize("active", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_a_share_that_is_whole_granules_is_not_cut_by_rounding(active):
    """0.29 * 100 is 28.999… in floating point."""
    _, shared, top_k = counts(num_neurons=800, experts=100, active=active)
    assert shared + top_k == round(100 * active)


@pytest.mark.parametrize(
    ("num_dense", "asked", "expected"),
    [
        (1, {"active": 0.5}, (64, 10, 11)),  # a third of the other three: 21.3
        (1, {"active": 0.25 + 2 * 3 / 64 / 4}, (64, 1, 1)),
        (2, {"active": 0.75}, (64, 16, 16)),  # half of the other two
        (3, {"active": 0.8}, (64, 6, 6)),  # a fifth of the last one: 12.8
    ],
)
def test_dense_layers_count_as_one(num_dense, asked, expected):
    assert counts(num_dense=num_dense, **asked) == expected


@pytest.mark.parametrize(("active", "num_dense"), [(0.5, 0), (0.5, 1), (0.7, 2), (0.99, 3)])
def test_moe_share_and_the_dense_layers_make_up_the_active_share(active, num_dense):
    share = moe_share(active, LAYERS, num_dense)
    assert isclose((num_dense + (LAYERS - num_dense) * share) / LAYERS, active)


@pytest.mark.parametrize("active", [0.1, 0.25, 0.5, 0.75])
def test_without_shared_experts_all_that_is_on_is_routed(active):
    assert counts(active=active, min_routed=None) == (64, 0, int(64 * active))


@pytest.mark.parametrize("shared", [0, 1, 3, 16, 31])
def test_explicit_shared_experts_are_kept(shared):
    assert counts(active=0.5, shared_experts=shared) == (64, shared, 32 - shared)
    assert counts(active=0.5, shared_experts=shared, min_routed=None)[1] == shared


@pytest.mark.parametrize("active", [0.2, 0.5, 0.875])
def test_a_target_gets_the_experts_that_it_needs(active):
    assert counts(experts=8, active=active, min_routed=7)[1] <= 1


# --- top_k -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"top_k": 5}, (64, 8, 5)),  # an eighth
        ({"top_k": 60}, (64, 4, 60)),
        ({"top_k": 64}, (64, 0, 64)),
        ({"top_k": 2, "experts": 4}, (4, 1, 2)),
        ({"top_k": 5, "shared_experts": 0}, (64, 0, 5)),
        ({"top_k": 5, "shared_experts": 20}, (64, 20, 5)),
        ({"top_k": 5, "min_routed": None}, (64, 0, 5)),
        ({"top_k": 1, "experts": 2, "min_routed": 2}, (2, 0, 1)),
    ],
)
@pytest.mark.parametrize("active", [None, 0.9])
@pytest.mark.parametrize("num_dense", [0, 2])
def test_explicit_top_k_wins(asked, expected, active, num_dense):
    assert counts(**asked, active=active, num_dense=num_dense) == expected


def test_active_takes_the_place_of_a_recipes_top_k():
    assert load_recipe("cmoe").top_k == 6
    asked = load_recipe("cmoe", {"active": 0.75})
    assert geometry_of(asked, F, LAYERS, 0, min_routed=1) == Geometry(16, 10, 2)


def test_active_and_top_k_together_are_refused():
    sentence = refusal(load_recipe, "default", {"active": 0.5, "top_k": 2})
    assert sentence == "--active chooses --top-k: give one of them"


def test_copies_take_no_shared_experts_and_no_default_of_a_split():
    assert geometry_of(Recipe(method="copy"), F, LAYERS, 0) == Geometry(8, 2, copies=True)
    asked = Recipe(method="copy", granularity=4, experts=3)
    assert geometry_of(asked, F, LAYERS, 0) == Geometry(3, 8, granularity=4, copies=True)


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"active": 0.01}, "--active 0.01 leaves 0 of 64 parts to a token"),
        ({"active": 0.2, "experts": 4}, "--active 0.2 leaves 0 of 4 parts"),
        (
            {"active": 0.25, "shared_experts": 16},
            "--active 0.25 leaves 16 of 64 parts to a token, 16 of them shared, so none to route",
        ),
        (
            {"active": 0.5, "num_dense": 2},
            "--active 0.5, with 2 of 4 layers dense, leaves 0 of 64 parts to a token",
        ),
        (
            {"active": 0.3, "num_dense": 3},
            "--active 0.3, with 3 of 4 layers dense, leaves 0 of 64 parts to a token",
        ),
        ({"active": 0.5, "experts": 48}, "--experts 48 does not cut 16384 neurons"),
        ({"top_k": 65}, "--top-k 65 is more than the 64 routed experts"),
        ({"top_k": 50, "shared_experts": 20}, "more than the 44 routed experts (64 less 20 shared"),
        ({"top_k": 1, "shared_experts": 64}, "give at most 63"),
    ],
)
def test_errors_are_one_sentence_with_the_numbers(asked, words):
    assert words in refusal(counts, **{"min_routed": None} | asked)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"active": 0.01}, "raise --active"),
        ({"active": 0.5, "keep_dense": [0, 1]}, "--active 0.5, with 2 of 3 layers dense, leaves 0"),
        ({"active": 0.5, "shared_experts": 12}, "leaves 12 of 24 parts to a token, 12 of them"),
        ({"active": 1.0}, "active=1.0"),
        ({"active": 0}, "active=0"),
        ({"active": 0.5, "top_k": 3}, "give one of them"),
    ],
)
def test_the_plan_raises_them(dense, asked, words):
    assert words in refusal(planned, dense, **asked)


# --- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*WITH_SHARED, *WITHOUT_SHARED])
def test_a_quarter_of_the_granules_is_shared_where_the_target_can(dense, target):
    geometry = planned(dense, active=0.5, target=target).geometry
    shared = 6 if target in WITH_SHARED else 0
    assert (geometry.shared_experts, geometry.top_k) == (shared, 12 - shared)


@pytest.mark.parametrize("active", [0.03, 0.3, 1 / 3, 0.5, 0.58, 2 / 3, 0.75, 0.96])
@pytest.mark.parametrize("experts", [None, 8])
@pytest.mark.parametrize(
    ("keep_dense", "target"),
    [
        ("none", "mixtral"),
        ("none", "granitemoeshared"),
        ([0], "glm4_moe"),
        ([1], "qwen3_moe"),
        ([0, 2], "qwen2_moe"),
    ],
)
def test_no_plan_is_above_the_asked_share_or_a_granule_below(
    dense, active, experts, keep_dense, target
):
    asked = {"experts": experts, "keep_dense": keep_dense, "target": target}
    converted = TINY_LAYERS - (0 if keep_dense == "none" else len(keep_dense))
    granule = converted / (experts or 24) / TINY_LAYERS
    if active < (TINY_LAYERS - converted) / TINY_LAYERS + granule - 1e-9:
        sentence = refusal(planned, dense, active=active, **asked)
        assert "none to route: raise --active" in sentence
        return
    plan = planned(dense, active=active, **asked)
    assert plan.active_ffn_ratio <= active + 1e-9
    assert plan.active_ffn_ratio + granule > active
    assert plan.geometry.top_k >= 1


@pytest.mark.parametrize("shared", [0, 1, 5])
def test_a_plan_keeps_explicit_shared_experts(dense, shared):
    plan = planned(dense, active=0.5, shared_experts=shared)
    assert (plan.geometry.shared_experts, plan.geometry.top_k) == (shared, 12 - shared)
    assert plan.recipe.shared_experts == shared


def test_nothing_to_route_is_said_with_what_helps(dense):
    model = str(dense())
    words = "--shared-experts 8 of 8 leaves none to route: give at most 7"
    assert refusal(upcycle.plan, model, experts=8, shared_experts=8) == words
    sentence = refusal(upcycle.plan, model, experts=8, shared_experts=6)
    assert sentence.endswith("so none to route: raise --active or lower --shared-experts")


def test_an_explicit_top_k_keeps_no_layers_dense_unless_asked():
    assert load_recipe("default", {"top_k": 2}).keep_dense == ()
    assert load_recipe("default", {"top_k": 2, "keep_dense": "auto"}).keep_dense == "auto"
    assert load_recipe("default", {"active": 0.3}).keep_dense == "auto"


def test_a_share_of_none_is_not_given():
    assert load_recipe("cmoe", {"active": None}).top_k == load_recipe("cmoe").top_k
