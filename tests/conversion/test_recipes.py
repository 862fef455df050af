"""The shipped recipes, and how a recipe is read."""

import pytest
import yaml

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.conversion.recipe import Recipe, load_recipe
from upcycle.conversion.ways import WAYS, Room
from upcycle.core.settings import Choice, shipped_recipes
from upcycle.core.types import Geometry

WIDE = {"intermediate_size": 1024, "num_hidden_layers": 1}
"""Wide enough for 64 experts of 8 neurons beside those that are always on."""
SHIPPED = sorted(shipped_recipes())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert recipe.paper == "" or recipe.paper.startswith("arXiv:")
    assert "\n" not in recipe.summary


@pytest.mark.parametrize("name", [name for name in SHIPPED if load_recipe(name).paper])
def test_departures_say_what_the_paper_or_its_code_does(name):
    departures = load_recipe(name).departures
    assert departures
    for departure in departures:
        assert "paper" in departure or "released" in departure
        assert not departure.endswith(".")


def test_default_recipe_is_shipped_and_these_are_its_settings():
    written, library = load_recipe().settings(), Recipe().settings()
    assert written.keys() == library.keys()
    assert {key: value for key, value in written.items() if value != library[key]} == {
        "name": "default",
        "summary": written["summary"],
        "measured": written["measured"],
        "split": {"name": "predictability"},
        "router": {"name": "ridge"},
        "compensate": {"name": "least_squares"},
        "sequential": True,
        "keep_dense": "auto",
    }


def test_what_no_recipe_says_is_left_to_the_plan_and_changes_no_weights():
    library = Recipe()
    assert library.experts is library.top_k is library.active is library.shared is None
    assert (library.compensate.name, library.sequential) == ("none", False)
    assert library.keep_dense == ()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_plans_on_most_families(dense, name, family):
    shares = load_recipe(name).shared and family == "olmo2"
    no_shared_expert = {"shared": 0, "experts": 16} if shares else {}
    plan = upcycle.plan(str(dense(family, **WIDE)), recipe=name, **no_shared_expert)
    assert plan.recipe.name == name
    assert plan.target


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_converts_and_passes_its_check(dense, tmp_path, monkeypatch, name):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)
    tokens = {"calibration_tokens": 128, "seq_len": 64}
    done = upcycle.convert(str(dense(**WIDE)), tmp_path / "out", recipe=name, **tokens)
    changed_on_purpose = done.plan.recipe.method.name not in ("split", "prune", "copy")
    assert (done.check.exact_error is None) == changed_on_purpose


# --- reading one -----------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """Writes a recipe file."""

    def write(text: str | bytes, name: str = "mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_recipe_file_is_named_after_itself(written):
    recipe = load_recipe(written("experts: 4\nsplit: {name: random}\n"))
    assert (recipe.name, recipe.experts, recipe.split.name) == ("mine", 4, "random")
    assert recipe.top_k == Recipe().top_k


def test_empty_recipe_is_the_defaults(written):
    assert load_recipe(written("")).settings() == Recipe(name="mine").settings()


def test_settings_make_the_same_recipe_again(written):
    recipe = load_recipe("moefication", {"keep_dense": "0,2", "max_shard_size": "1.5GB"})
    again = load_recipe(written(yaml.safe_dump(recipe.settings())))
    assert again == recipe


def test_overrides_replace_what_the_recipe_says(written):
    path = written("method: {name: drop, ratio: 0.25}\nexperts: 4\n")
    assert load_recipe(path, {"experts": 6}).experts == 6
    assert load_recipe(path, {"method.ratio": 0.5}).method.params == {"ratio": 0.5}
    assert load_recipe(path, {"method": "drop"}).method.params == {}


def test_another_method_takes_nothing_over_that_a_recipe_says_of_a_split():
    said = load_recipe("default", {"method": "drop", "keep_dense": [0], "seed": 3})
    assert said == Recipe(
        name="default", summary=said.summary, method="drop", keep_dense=[0], seed=3
    )
    assert load_recipe("cmoe", {"method": "copy"}).experts is None
    assert load_recipe("cmoe", {"method": "copy", "experts": 4}).experts == 4
    assert load_recipe("cmoe", {"method": "split"}) == load_recipe("cmoe")


@pytest.mark.parametrize(
    ("recipe", "method", "holds"),
    [
        ("pruned-copies", "copy", {}),
        ("granular-upcycling", "split", {}),
        ("sparse-upcycling", "prune", {}),
        (
            "pruned-copies",
            "split",
            {"compensate": "least_squares", "sequential": True, "keep_dense": "auto"},
        ),
    ],
)
def test_another_kind_of_method_takes_nothing_over_of_prune_and_copies(recipe, method, holds):
    said = load_recipe(recipe, {"method": method})
    assert said == Recipe(name=recipe, method=method, **holds)


@pytest.mark.parametrize("method", [{"name": "split"}, Choice(name="split")])
def test_split_by_another_spelling_is_a_split(method):
    assert load_recipe("default", {"method": method}) == load_recipe("default")


@pytest.mark.parametrize("recipe", ["drop-upcycling", "granular-upcycling"])
@pytest.mark.parametrize("method", ["drop", "noise", {"name": "drop", "ratio": 0.25}])
def test_what_a_recipe_says_of_copies_holds_for_other_copies(recipe, method):
    said, kept = load_recipe(recipe, {"method": method}), load_recipe(recipe)
    assert (said.experts, said.top_k, said.router) == (kept.experts, kept.top_k, kept.router)


@pytest.mark.parametrize("overrides", [["method", "method.ratio"], ["method.ratio", "method"]])
def test_parameter_belongs_to_the_method_given_with_it(overrides):
    values = {"method": "drop", "method.ratio": 0.5}
    method = load_recipe("default", {key: values[key] for key in overrides}).method
    assert (method.name, method.params) == ("drop", {"ratio": 0.5})


@pytest.mark.parametrize(
    ("written_size", "num_bytes"),
    [("5GB", 5e9), ("1.5 kB", 1500), ("7", 7), ("2m", 2e6), (10**6, 1e6), ("1TB", 1e12)],
)
def test_sizes(written_size, num_bytes):
    assert Recipe(max_shard_size=written_size).max_shard_size == num_bytes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expert: 4", "has an unknown setting 'expert', did you mean 'experts'?"),
        ("1: 4", "has an unknown setting 1"),
        ("experts: many", "experts='many': input should be a valid integer"),
        ("experts: 0", "experts=0: input should be greater than 0"),
        ("check: maybe", "check='maybe': input should be 'fast', 'full' or 'none'"),
        ("split: 3", "split=3: give a method's name"),
        ("method: [drop]", "method=['drop']: give a method's name"),
        ("split: {rows: up}", "split.name is missing"),
        ("keep_dense: [0, x]", "keep_dense=[0, 'x']: give layers such as 0,1,29, auto or none"),
        ("[experts, 4]", "is not a mapping of settings to values"),
        ("experts 4", "is not a mapping of settings to values"),
        ("experts: [4", "is not YAML"),
        ("experts: 4\nexperts: 8", "is not YAML: experts is given twice"),
        ("summary: 2024-13-45", "is not YAML"),
        (b"\xff\xfe\xff", "is not YAML"),
        ("a: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_recipe_that_is_wrong(written, text, words):
    path = written(text)
    with pytest.raises(UpcycleError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


SHARED_EXPERTS = (
    "`shared_experts` counted parts of the FFN; now `shared` is the share of it that is always on "
    "and `experts` counts the routed experts alone: 2 of 16 are `experts=14` with `shared=0.125`"
)


@pytest.mark.parametrize("count", [0, 2])
def test_a_number_of_shared_experts_is_told_the_new_spelling(dense, written, count):
    requests = (
        lambda: load_recipe(written(f"experts: 16\nshared_experts: {count}\n")),
        lambda: load_recipe("cmoe", {"shared_experts": count}),
        lambda: upcycle.plan(str(dense()), experts=16, shared_experts=count),
        lambda: upcycle.convert(str(dense()), "out", shared_experts=count),
    )
    for request in requests:
        with pytest.raises(UpcycleError) as caught:
            request()
        assert str(caught.value) == SHARED_EXPERTS


def test_what_that_sentence_calls_the_same_is_the_layer_of_before():
    """16 parts of 1024 neurons are 64 each, and two of them are 128."""
    asked = load_recipe("default", {"experts": 14, "shared": 0.125, "top_k": 6})
    made = WAYS["split"].geometry(asked, Room(1024, 1, shared_width="any"))
    assert made == Geometry(1024, 14, 6, expert_size=64, shared_size=128)


# What a recipe of a paper says of parts, here of 512 neurons: routed, on, neurons each, shared.
PAPERS = {
    "cmoe": (14, 6, 32, 64),
    "dot-moe": (16, 4, 32, 0),
    "emoe": (64, 32, 8, 0),
    "factorllm": (4, 2, 128, 0),
    "ladimo": (16, 8, 32, 0),
    "llama-moe": (16, 4, 32, 0),
    "llama-moe-sharing-inner": (8, 2, 64, 0),
    "llama-moe-sharing-inter": (7, 1, 64, 64),
    "llama-moe-v2": (7, 1, 64, 64),
    "moebert": (4, 1, 128, 0),
    "moefication": (16, 8, 32, 0),
    "secret-mixtures": (48, 16, 8, 128),
}


@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
@pytest.mark.parametrize("name", PAPERS)
def test_a_recipes_layer_is_its_papers(dense, name, target):
    plan = upcycle.plan(str(dense(**WIDE | {"intermediate_size": 512})), recipe=name, target=target)
    assert plan.design.geometry == Geometry(512, *PAPERS[name])
    assert not any(each.startswith("`shared=") for each in plan.warnings)


def test_recipe_file_that_does_not_exist(tmp_path):
    with pytest.raises(UpcycleError, match=r"recipe file .*none\.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_recipe_name_that_does_not_exist():
    with pytest.raises(UpcycleError, match="'moefikation', did you mean 'moefication'"):
        load_recipe("moefikation")
