"""How many experts there are, how wide, how many a token gets and what all tokens share."""

from fractions import Fraction
from math import isclose

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import SIZES

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.geometry import (
    default_parts,
    default_width,
    legal_parts,
    moe_share,
)
from upcycle.conversion.recipe import Recipe, load_recipe
from upcycle.conversion.ways import WAYS, Room
from upcycle.core.types import Geometry

F, LAYERS = 16384, 4
"""64 parts of 256 neurons."""
SMOLLM2 = 1536
WIDTHS = (8, 64, 192, 512, 1000, SMOLLM2, 4864, 5632, 8192, 8960, 11008, 14336, 18944)
TINY_LAYERS = SIZES["num_hidden_layers"]
WITH_SHARED = ("qwen2_moe", "glm4_moe", "granitemoeshared")
WITHOUT_SHARED = ("qwen3_moe", "mixtral")
SPLIT = {"split": "random", "router": "normal", "compensate": "none", "sequential": False}


def geometry(num_neurons=F, *, num_dense=0, host="any", min_experts=1, **asked) -> Geometry:
    """By default for a host whose shared expert may have any width."""
    recipe = Recipe(**asked)
    room = Room(num_neurons, LAYERS, num_dense, shared_width=host, min_experts=min_experts)
    return WAYS[recipe.method.name].geometry(recipe, room)


def counts(*arguments, **asked) -> tuple[int, int, int, int]:
    """Experts, those on, neurons of each, shared neurons."""
    made = geometry(*arguments, **asked)
    return made.num_experts, made.top_k, made.expert_size, made.shared_size


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


# --- widths that nobody asked for ------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_neurons", "width", "parts"),
    [
        (192, 8, 24),
        (512, 16, 32),
        (SMOLLM2, 48, 32),  # a small model gets fine experts all the same
        (4864, 128, 38),  # 152 would be an expert of 1/32
        (5632, 192, 32),  # 176; in equal parts no multiple of 64 is near it
        (8192, 256, 32),
        (8960, 256, 35),
        (11008, 256, 43),
        (14336, 256, 56),
        (18944, 320, 74),  # 296; in equal parts 256
        (8 * 106, 32, 53),  # 26.5; 53 parts or 2
    ],
)
def test_default_widths(num_neurons, width, parts):
    assert default_width(num_neurons) == width
    assert default_parts(num_neurons) == parts


@pytest.mark.parametrize("num_neurons", WIDTHS)
def test_default_widths_are_in_the_best_step_that_comes_near(num_neurons):
    wanted = num_neurons / min(max(num_neurons // 256, 32), 64)

    def off(width):
        return max(width / wanted, wanted / width)

    widths = range(8, num_neurons + 1, 8)
    for chosen, possible in (
        (default_width(num_neurons), widths),
        (num_neurons // default_parts(num_neurons), [w for w in widths if num_neurons % w == 0]),
    ):
        assert chosen in possible
        near = [width for width in possible if off(width) <= 1.25]
        step = max((s for s in (16, 64) if any(width % s == 0 for width in near)), default=8)
        assert off(chosen) == min(off(width) for width in possible if width % step == 0)


@pytest.mark.parametrize("num_neurons", [8 * n for n in (1, 6, 19, 53, 97, 344, 720, 1331, 2048)])
def test_legal_parts_are_equal_and_of_whole_steps(num_neurons):
    for step in (8, 16, 64):
        legal = [
            n
            for n in range(1, num_neurons + 1)
            if num_neurons % n == 0 and num_neurons // n % step == 0
        ]
        assert legal_parts(num_neurons, step) == legal


def test_width_that_nothing_cuts_is_refused_but_beside_a_shared_expert():
    assert legal_parts(12) == []
    for host in ("multiple", "none"):
        for asked in ({"active": 0.5}, {"top_k": 1}, {"top_k": 1, "experts": 1}):
            assert refusal(geometry, 12, host=host, **asked).endswith("nearest: none")
    assert counts(12, top_k=1) == (1, 1, 8, 4)


# --- widths by the experts that are asked for ------------------------------------------------


@pytest.mark.parametrize(
    ("num_neurons", "size", "shared"),
    [
        (SMOLLM2, 144, 384),  # exactly, and a multiple of 16; 128 cuts off a ninth
        (4864, 448, 1280),  # 456
        (5632, 512, 1536),  # 528
        (8192, 768, 2048),
        (11008, 1024, 2816),  # 1032
        (14336, 1344, 3584),
        (18944, 1728, 5120),  # 1776
        (512, 48, 128),
        (480, 40, 160),  # 45; 32 cuts off more than a sixteenth
        (192, 16, 64),  # 18
    ],
)
def test_eight_experts_of_which_two_are_on(num_neurons, size, shared):
    assert counts(num_neurons, experts=8, top_k=2) == (8, 2, size, shared)


def test_smollm2_by_eight_experts():
    assert geometry(SMOLLM2, experts=8, top_k=2).active_ratio == 0.4375
    assert geometry(SMOLLM2, experts=8).active_ratio == 0.4375  # three would be 0.53
    assert counts(SMOLLM2, experts=8, active=0.25) == (8, 2, 192, 0)


@pytest.mark.parametrize(
    ("num_neurons", "experts", "shared", "expected"),
    [
        (5632, 8, 0.25, (528, 1408)),  # named, so no multiple of 64
        (SMOLLM2, 14, 0.125, (96, 192)),
        (SMOLLM2, 148, 44 / 192, (8, 352)),
        (SMOLLM2, 7, 1 / 8, (192, 192)),
        (SMOLLM2, 4, 1 / 3, (256, 512)),
        (SMOLLM2, 8, 0.3, (128, 512)),  # 134.4
        (SMOLLM2, 9, 0.0001, (160, 96)),  # 170.6
        (SMOLLM2, 10, 0.05, (144, 96)),  # 145.9
        (18944, 8, 0.1, (2112, 2048)),  # 2131.2
        (1000, 7, 0.5, (64, 552)),  # 71.4; 64 cuts off a tenth, but 16 and 8 give no more
    ],
)
def test_experts_and_a_share(num_neurons, experts, shared, expected):
    assert counts(num_neurons, experts=experts, shared=shared, top_k=1)[2:] == expected


@pytest.mark.parametrize(
    ("num_neurons", "experts", "shared", "expected"),
    [
        (SMOLLM2, 8, None, (128, 512)),  # four parts of twelve
        (8192, 8, None, (1024, 0)),  # eight of sixteen are as far from a quarter
        (14336, 8, None, (1024, 6144)),
        (SMOLLM2, 24, None, (48, 384)),
        (SMOLLM2, 5, 0.3, (192, 576)),
        (SMOLLM2, 5, 0.2, (256, 256)),
        (SMOLLM2, 14, 0.125, (96, 192)),
        (SMOLLM2, 8, 0.99, (8, 1472)),
        (SMOLLM2, 192, 0.3, (8, 0)),
        (SMOLLM2, 8, 0, (192, 0)),
    ],
)
def test_experts_and_a_share_of_whole_experts(num_neurons, experts, shared, expected):
    made = geometry(num_neurons, host="multiple", experts=experts, shared=shared, top_k=1)
    assert (made.expert_size, made.shared_size) == expected
    off = abs(made.shared_ratio - (0.25 if shared is None else shared))
    for parts in range(experts, num_neurons // 8 + 1):
        if num_neurons % (8 * parts) == 0 and shared != 0:
            assert off <= abs((parts - experts) / parts - (0.25 if shared is None else shared))


@pytest.mark.parametrize("experts", [2, 3, 8, 24, 64, 192])
@pytest.mark.parametrize(("host", "shared"), [("none", None), ("any", 0), ("multiple", 0)])
def test_nothing_shared_is_an_equal_partition(experts, host, shared):
    made = counts(SMOLLM2, host=host, experts=experts, shared=shared, top_k=1)
    assert made == (experts, 1, SMOLLM2 // experts, 0)


@pytest.mark.parametrize(
    ("experts", "nearest"), [(5, "4 or 6"), (7, "6 or 8"), (100, "96 or 192"), (193, "192")]
)
@pytest.mark.parametrize(("host", "shared"), [("none", None), ("any", 0), ("multiple", 0)])
def test_no_equal_partition_names_the_nearest(experts, nearest, host, shared):
    sentence = refusal(geometry, SMOLLM2, host=host, experts=experts, shared=shared, top_k=1)
    assert sentence == (
        f"`experts={experts}` does not cut 1536 neurons into equal parts that are a multiple of 8, "
        f"which grouped matrix products need; nearest: {nearest}"
    )


# --- active ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (48, 16, 256, 4096)),  # half, if nothing is said
        ({"active": 0.5}, (48, 16, 256, 4096)),
        ({"active": 0.25}, (56, 8, 256, 2048)),  # half of them shared
        ({"active": 0.75}, (48, 32, 256, 4096)),  # but no more than a quarter of all
        ({"active": 0.3}, (55, 10, 256, 9 * 256)),  # 19.2 parts
        ({"active": 0.9999}, (48, 47, 256, 4096)),
        ({"active": 1 / 64}, (64, 1, 256, 0)),
        ({"active": 2 / 64}, (63, 1, 256, 256)),
        ({"active": 0.5, "experts": 16}, (16, 5, 768, 4096)),
        ({"active": 0.75, "experts": 4}, (4, 2, 3072, 4096)),
        ({"active": 0.5, "experts": 2}, (2, 1, 8192, 0)),  # a quarter shared leaves none to route
        ({"active": 0.25, "experts": 8}, (8, 1, 1792, 2048)),
        ({"active": 0.2, "experts": 8}, (8, 1, 2048, 0)),
        ({"active": 0.26, "experts": 6}, (6, 1, 2688, 256)),  # nearly nothing shared
    ],
)
def test_active_gives_shared_neurons_and_top_k(asked, expected):
    assert counts(**asked) == expected


@pytest.mark.parametrize("host", ["none", "any", "multiple"])
@pytest.mark.parametrize("active", [0.07, 0.14, 0.28, 0.29, 0.55, 0.56, 0.57, 0.58])
def test_a_share_that_is_whole_experts_is_not_cut_by_rounding(active, host):
    """0.29 * 100 is 28.999… in floating point."""
    made = geometry(800, host=host, experts=100, active=active, shared=0)
    assert made.top_k == round(100 * active)


@pytest.mark.parametrize(
    ("num_dense", "asked", "expected"),
    [
        (1, {"active": 0.5}, (54, 11, 256, 10 * 256)),  # a third of the other three: 21.3 parts
        (1, {"active": 0.25 + 2 * 3 / 64 / 4}, (63, 1, 256, 256)),
        (2, {"active": 0.75}, (48, 16, 256, 4096)),  # half of the other two
        (3, {"active": 0.8}, (58, 6, 256, 6 * 256)),  # a fifth of the last one: 12.8 parts
        (2, {"active": 0.6, "experts": 8}, (8, 1, 2048, 0)),
    ],
)
def test_dense_layers_count_as_one(num_dense, asked, expected):
    assert counts(num_dense=num_dense, **asked) == expected


@pytest.mark.parametrize(("active", "num_dense"), [(0.5, 0), (0.5, 1), (0.7, 2), (0.99, 3)])
def test_moe_share_and_the_dense_layers_make_up_the_active_share(active, num_dense):
    share = moe_share(active, LAYERS, num_dense)
    assert isclose((num_dense + (LAYERS - num_dense) * share) / LAYERS, active)


@pytest.mark.parametrize("active", [0.1, 0.25, 0.5, 0.75])
def test_without_a_shared_expert_all_that_is_on_is_routed(active):
    assert counts(active=active, host="none") == (64, int(64 * active), 256, 0)


@pytest.mark.parametrize("host", ["any", "multiple"])
@pytest.mark.parametrize("parts", [0, 1, 3, 16, 31])
def test_an_explicit_share_is_kept(parts, host):
    expected = (64 - parts, 32 - parts, 256, parts * 256)
    assert counts(active=0.5, shared=parts / 64, host=host) == expected


@pytest.mark.parametrize("active", [0.2, 0.5, 0.875])
@pytest.mark.parametrize("host", ["any", "multiple"])
def test_a_target_gets_the_experts_that_it_needs(active, host):
    assert geometry(64, host=host, active=active, min_experts=7).num_experts >= 7


@pytest.mark.parametrize("asked", [{"active": 0.5}, {"active": 0.3, "experts": 8}, {"top_k": 2}])
@pytest.mark.parametrize("host", ["any", "multiple", "none"])
def test_geometries_are_those_of_more_and_more_dense_layers(asked, host):
    made = WAYS["split"].geometries(Recipe(**asked), Room(SMOLLM2, LAYERS, shared_width=host))
    expected = [geometry(SMOLLM2, host=host, num_dense=n, **asked) for n in range(len(made))]
    assert made == expected
    if "top_k" in asked:
        assert len(made) == LAYERS
    else:
        words = f"with {len(made)} of 4 layers dense, leaves "
        assert words in refusal(geometry, SMOLLM2, host=host, num_dense=len(made), **asked)


# --- top_k -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"top_k": 5}, (48, 5, 256, 4096)),  # a quarter is shared
        ({"top_k": 48}, (48, 48, 256, 4096)),
        ({"top_k": 2, "experts": 4}, (4, 2, 3072, 4096)),
        ({"top_k": 5, "shared": 0}, (64, 5, 256, 0)),
        ({"top_k": 5, "shared": 20 / 64}, (44, 5, 256, 20 * 256)),
        ({"top_k": 5, "host": "none"}, (64, 5, 256, 0)),
        ({"top_k": 1, "experts": 2, "min_experts": 2}, (2, 1, 6144, 4096)),
        ({"top_k": 1, "experts": 2, "host": "multiple"}, (2, 1, 8192, 0)),
    ],
)
@pytest.mark.parametrize("active", [None, 0.9])
@pytest.mark.parametrize("num_dense", [0, 2])
def test_explicit_top_k_wins(asked, expected, active, num_dense):
    assert counts(**asked, active=active, num_dense=num_dense) == expected


def test_active_takes_the_place_of_a_recipes_top_k():
    assert load_recipe("cmoe").top_k == 6
    asked = load_recipe("cmoe", {"active": 0.75})
    made = WAYS["split"].geometry(asked, Room(F, LAYERS, shared_width="any"))
    assert made == Geometry(F, 14, 10, expert_size=1024, shared_size=2048)


def test_active_and_top_k_together_are_refused():
    sentence = refusal(load_recipe, "default", {"active": 0.5, "top_k": 2})
    assert sentence == "`active` chooses `top_k`: give one of them"


@pytest.mark.parametrize("host", ["any", "multiple", "none"])
def test_copies_take_no_shared_neurons_and_no_default_of_a_split(host):
    made = geometry(method="copy", host=host)
    assert made == Geometry(F, 8, 2, expert_size=F)
    assert (made.copies, made.active_ratio) == (8, 2)
    made = geometry(method="copy", granularity=4, experts=3, host=host)
    assert made == Geometry(F, 12, 8, expert_size=F // 4, granularity=4)
    assert (made.copies, made.active_ratio) == (3, 2)


# --- any request -----------------------------------------------------------------------------


def geometry_or_refusal(**asked) -> Geometry | str:
    try:
        return geometry(**asked)
    except UpcycleError as error:
        return str(error)


def expected_width(num_neurons, experts, shared):
    """Of experts beside a shared one of any width, by exact arithmetic."""
    wanted = (1 - Fraction(shared).limit_denominator(10**6)) * num_neurons / experts
    if wanted % 8 == 0:
        return int(wanted)
    below = {step: wanted // step * step for step in (64, 16, 8)}
    near = [below[step] for step in (64, 16) if 16 * (wanted - below[step]) <= wanted]
    return int([*near, below[8]][0])


requests = st.fixed_dictionaries(
    {"num_neurons": st.sampled_from(WIDTHS) | st.integers(8, 4000)},
    optional={
        "experts": st.integers(1, 70),
        "shared": st.sampled_from([0.0, 1 / 8, 1 / 4, 1 / 3, 0.9]) | st.floats(0, 0.99),
        "top_k": st.integers(1, 12),
        "active": st.sampled_from([1 / 8, 1 / 4, 1 / 2, 3 / 4]) | st.floats(0.01, 0.99),
        "num_dense": st.integers(0, LAYERS - 1),
    },
)
hosts = st.sampled_from(["any", "multiple", "none"])


@given(request=requests, host=hosts)
@example(request={"num_neurons": SMOLLM2, "experts": 8, "top_k": 2}, host="any")
def test_a_geometry_is_a_partition_within_what_is_asked(request, host):
    made = geometry_or_refusal(host=host, **request)
    if isinstance(made, str):
        assert made.startswith("`")
        assert "\n" not in made
        return
    neurons = request["num_neurons"]
    assert made.shared_size + made.num_experts * made.expert_size == neurons
    assert made.expert_size > 0 == made.expert_size % 8
    assert made.shared_size >= 0
    assert 1 <= made.top_k <= made.num_experts == request.get("experts", made.num_experts)
    if host == "none" or request.get("shared") == 0:
        assert made.shared_size == 0
    if host == "multiple":
        assert made.shared_size % made.expert_size == 0
    if "top_k" in request:
        assert made.top_k == request["top_k"]
        return
    share = moe_share(request.get("active", 0.5), LAYERS, request.get("num_dense", 0))
    assert made.active_ratio <= share + 1e-9
    assert made.active_ratio + made.expert_size / neurons > share - 1e-9


@given(
    num_neurons=st.sampled_from(WIDTHS[3:]) | st.integers(500, 4000),
    experts=st.integers(1, 40),
    shared=st.integers(1, 60).map(lambda n: n / 64),
)
def test_beside_a_shared_expert_of_any_width_experts_lose_little(num_neurons, experts, shared):
    asked = {"experts": experts, "shared": shared, "top_k": 1}
    expected = expected_width(num_neurons, experts, shared)
    if expected == 0:
        assert "leaves less than 8 of" in refusal(geometry, num_neurons, **asked)
        return
    made = geometry(num_neurons, **asked)
    assert made.expert_size == expected
    assert made.shared_ratio >= shared - 1e-9


@given(
    num_neurons=st.sampled_from(WIDTHS[2:]),
    shared=st.integers(0, 60).map(lambda n: n / 64),
    host=st.sampled_from(["any", "multiple"]),
)
def test_of_a_share_alone_the_nearest_that_whole_experts_leave_is_taken(num_neurons, shared, host):
    made = geometry(num_neurons, host=host, shared=shared, top_k=1)
    if host == "any" and shared:
        assert made.expert_size == default_width(num_neurons)
        assert shared * num_neurons - made.expert_size < made.shared_size
        assert made.shared_size <= max(shared * num_neurons, num_neurons % made.expert_size) + 1e-6
    else:
        assert made.expert_size * default_parts(num_neurons) == num_neurons
        assert abs(made.shared_size - shared * num_neurons) <= made.expert_size / 2


@given(request=requests, host=hosts)
def test_a_geometry_is_made_again_from_what_it_says(request, host):
    """As by the recipe in upcycle.json."""
    made = geometry_or_refusal(host=host, **request)
    if isinstance(made, str):
        return
    said = {"experts": made.num_experts, "top_k": made.top_k, "shared": made.shared_ratio}
    assert geometry(request["num_neurons"], host=host, **said) == made


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"active": 0.01},
            "`active=0.01` leaves 163 of 16384 neurons to a token, so none of the experts of 256: "
            "raise `active`",
        ),
        (
            {"active": 0.2, "experts": 4},
            "`active=0.2` leaves 3276 of 16384 neurons to a token, so none of the experts of 4096: "
            "raise `active`",
        ),
        (
            {"active": 0.9, "experts": 1},
            "`active=0.9` leaves 14745 of 16384 neurons to a token, so none of the experts of "
            "16384: give more `experts`",
        ),
        (
            {"active": 0.25, "shared": 0.25},
            "`active=0.25` leaves 4096 of 16384 neurons to a token, 4096 of them shared, so none "
            "of the experts of 256: raise `active` or lower `shared`",
        ),
        (
            {"active": 0.5, "num_dense": 2},
            "`active=0.5`, with 2 of 4 layers dense, leaves 0 of 16384 neurons to a token, so none "
            "of the experts of 256: raise `active`",
        ),
        (
            {"active": 0.3, "num_dense": 3, "host": "none"},
            "`active=0.3`, with 3 of 4 layers dense, leaves 0 of 16384 neurons to a token, so none "
            "of the experts of 256: raise `active`",
        ),
        (
            {"active": 0.5, "experts": 48, "host": "none"},
            "`experts=48` does not cut 16384 neurons into equal parts that are a multiple of 8, "
            "which grouped matrix products need; nearest: 32 or 64",
        ),
        ({"top_k": 49}, "`top_k=49` is more than the 48 experts"),
        ({"top_k": 65, "host": "none"}, "`top_k=65` is more than the 64 experts"),
        ({"top_k": 50, "shared": 20 / 64}, "`top_k=50` is more than the 44 experts"),
        (
            {"experts": 2000},
            "`experts=2000` leaves less than 8 of 16384 neurons to an expert, which grouped matrix "
            "products need: give at most 1536",
        ),
    ],
)
def test_errors_are_one_sentence_with_the_numbers(asked, sentence):
    assert refusal(geometry, **asked) == sentence


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"active": 0.01}, "raise `active`"),
        ({"active": 0.5, "keep_dense": [0, 1]}, "`active=0.5`, with 2 of 3 layers dense, leaves 0"),
        ({"active": 0.5, "shared": 0.5}, "leaves 96 of 192 neurons to a token, 96 of them shared"),
        ({"active": 1.0}, "active=1.0"),
        ({"active": 0}, "active=0"),
        ({"active": 0.5, "top_k": 3}, "give one of them"),
    ],
)
def test_the_plan_raises_them(dense, asked, words):
    assert words in refusal(planned, dense, **asked)


# --- plans -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [*WITH_SHARED, *WITHOUT_SHARED])
def test_a_quarter_of_the_neurons_is_shared_where_the_target_can(dense, target):
    made = planned(dense, active=0.5, target=target).design.geometry
    shared = 6 if target in WITH_SHARED else 0
    assert (made.expert_size, made.shared_size) == (8, 8 * shared)
    assert (made.num_experts, made.top_k) == (24 - shared, 12 - shared)


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
def test_no_plan_is_above_the_asked_share_or_an_expert_below(
    dense, active, experts, keep_dense, target
):
    asked = {"experts": experts, "keep_dense": keep_dense, "target": target}
    converted = TINY_LAYERS - (0 if keep_dense == "none" else len(keep_dense))
    least = converted / (experts or 24) / TINY_LAYERS
    if active < (TINY_LAYERS - converted) / TINY_LAYERS + least - 1e-9:
        sentence = refusal(planned, dense, active=active, **asked)
        assert sentence.endswith(": raise `active`")
        return
    plan = planned(dense, active=active, **asked)
    expert = plan.design.geometry.expert_size / SIZES["intermediate_size"] * converted / TINY_LAYERS
    assert plan.active_ffn_ratio <= active + 1e-9
    assert plan.active_ffn_ratio + expert > active
    assert plan.design.geometry.num_experts == (experts or plan.design.geometry.num_experts)
    assert plan.design.geometry.top_k >= 1


@pytest.mark.parametrize("parts", [0, 1, 5])
def test_a_plan_keeps_an_explicit_share(dense, parts):
    plan = planned(dense, active=0.5, shared=parts / 24)
    assert (plan.design.geometry.shared_size, plan.design.geometry.top_k) == (8 * parts, 12 - parts)
    assert plan.recipe.shared == parts / 24


@pytest.mark.parametrize("asked", [{"top_k": 2}, {"active": 0.3}, {"experts": 8, "top_k": 2}])
def test_layers_to_keep_dense_are_measured_whatever_the_share(dense, asked):
    assert load_recipe("default", asked).keep_dense == "auto"
    assert load_recipe("default", asked | {"keep_dense": "none"}).keep_dense == ()
    assert planned(dense, keep_dense="auto", **asked).undecided


def test_a_share_of_none_is_not_given():
    assert load_recipe("cmoe", {"active": None}).top_k == load_recipe("cmoe").top_k
