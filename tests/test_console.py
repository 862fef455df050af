"""What people read after a conversion, on a terminal of 80 columns."""

import itertools
import re
from dataclasses import replace

import pytest
import records
from tiny import PLAIN_SPLIT, once

import upcycle
from upcycle.console.conversion import show_conversion
from upcycle.console.listing import every_method, show_recipes
from upcycle.console.output import out
from upcycle.conversion.catalogue import describe_presets, describe_recipes
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.models.record.conversion import DenseLayers, Trial
from upcycle.models.record.merging import Findings
from upcycle.models.text import PROBES

WIDTH = 80
QUICK = PLAIN_SPLIT | {"split": "random", "calibration_tokens": 256, "seq_len": 64}


@pytest.fixture(scope="module")
def converted(dense, text, tmp_path_factory):
    """Converts a tiny model, once per settings; by default checked on text of its own, too."""

    @once
    def convert(**settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(CHECK_TOKENS, "fast", 128)
            asked = QUICK | {"calibration": f"builtin+{text}"} | settings
            folder = tmp_path_factory.mktemp("console") / "out"
            return upcycle.convert(str(dense()), folder, **asked)

    return convert


@pytest.fixture
def shown(monkeypatch, capsys):
    """What is printed of a conversion, no line of it longer than the terminal."""

    def show(conversion) -> str:
        monkeypatch.setattr(out, "_width", WIDTH)
        show_conversion(conversion)
        page = capsys.readouterr().out
        assert max(map(len, page.splitlines())) <= WIDTH
        return page

    return show


def joined(page) -> str:
    """Its sentences, however they are cut into lines."""
    return " ".join(page.split())


def with_ratios(conversion, usual, **others):
    """The conversion with made-up perplexity ratios, most of them the usual one."""
    kinds = [
        replace(kind, ratio=others.get(kind.kind.removeprefix("probe:"), usual))
        for kind in conversion.check.kinds
    ]
    return replace(conversion, check=replace(conversion.check, kinds=kinds))


def test_every_kind_of_text_has_a_row(converted, shown, text):
    done = converted()
    page = shown(done)
    rows = {
        cells[0]: cells[1:]
        for line in page.splitlines()
        if len(cells := re.findall(r"[^│┃]*[^│┃ ](?= *[│┃])", line)) == 6
        if (cells := [cell.strip() for cell in cells])
    }
    names = [f"{probe.removeprefix('probe:')}, built in" for probe in PROBES]
    assert list(rows)[-9:] == [text.name, *names]
    for kind, name in zip(done.check.kinds, [text.name, *names], strict=True):
        assert rows[name] == [
            f"{kind.perplexity_dense:.2f}",
            f"{kind.perplexity_moe:.2f}",
            f"{kind.perplexity_moe / kind.perplexity_dense:.2f}",
            f"{kind.worst_window:.2f}",
            f"{100 * kind.top1_agreement:.0f} %",
        ]


def test_files_of_one_name_have_a_row_each(converted, shown):
    done = converted()
    given = {0: "a/notes.txt", 1: "b/notes.txt", 2: "c/code.txt"}
    kinds = [replace(k, kind=given.get(i, k.kind)) for i, k in enumerate(done.check.kinds)]
    page = shown(replace(done, check=replace(done.check, kinds=kinds)))
    for kind, name in zip(kinds[:3], ("a/notes.txt", "b/notes.txt", "c/code.txt"), strict=True):
        assert f"│ {name} │ {kind.perplexity_dense:.2f} │" in joined(page)


def test_what_the_check_read_is_said(converted, shown):
    words = joined(shown(converted()))
    assert (
        f"Perplexity on {9 * 128:,} tokens that nothing was fitted on, windows of 64. "
        "Left out: its own writing."
    ) in words
    assert "Exactness: ok, all experts on: logits differ by" in words


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.02, "Fine as it is: perplexity is 1.02 × the dense model's at worst (code, built in)."),
        (1.1, "Fine as it is: perplexity is 1.10 ×"),
        (1.11, "Heal it: perplexity is 1.11 × the dense model's at worst (code, built in). "),
        (1.11, " with about 20,000 tokens, or raise --top-k."),
        (1.5, " with about 100,000 tokens, or raise --top-k."),
        (4.9, "Heal it: perplexity is 4.90 ×"),
        (4.9, " with millions of tokens, or raise --top-k."),
        (5.0, "Broken: perplexity is 5.00 × the dense model's at worst (code, built in). "),
        (80.0, "Broken: perplexity is 80.00 ×"),
        (80.0, " with millions of tokens, or raise --top-k."),
    ],
)
def test_the_worst_kind_is_judged_in_words(converted, shown, ratio, words):
    done = with_ratios(converted(), ratio - 0.01, code=ratio)
    assert words in joined(shown(done))


@pytest.mark.parametrize(("ratio", "finetune"), [(1.05, False), (1.3, True), (9.0, True)])
def test_the_command_that_heals_names_the_result(converted, shown, ratio, finetune):
    done = with_ratios(converted(), ratio)
    page = shown(done).replace("\n", "").replace(" ", "")
    assert (f"upcyclefinetune{done.out}--data…with" in page) == finetune
    assert ("--recipethoroughlosesless" in page) == finetune


@pytest.mark.parametrize("ratio", [1.05, 1.3, 9.0])
def test_kinds_that_lost_alike_ask_for_no_other_text(converted, shown, ratio):
    assert "lost much more" not in shown(with_ratios(converted(), ratio, code=1.4 * ratio))


def test_a_kind_that_lost_much_more_is_named_with_the_flag(converted, shown, text):
    words = joined(shown(with_ratios(converted(), 1.2, scholarly=1.9)))
    assert "perplexity is 1.90 × the dense model's at worst (scholarly, built in)." in words
    assert "scholarly, built in lost much more than the rest: add such text, " in words
    assert f"--calibrationbuiltin+{text}+FILE." in words.replace(" ", "")


TRIALS = DenseLayers(
    layers=(0, 2),
    damage=[3.0, 0.1, 2.0],
    trials=[
        Trial((), {"builtin": 2.0, "self": 4.5}),
        Trial((0,), {"builtin": 1.5, "self": 1.5}),
        Trial((0, 2), {"builtin": 1.25, "self": 1.25}),
    ],
)


def test_choices_of_dense_layers_are_told_with_what_they_are_worth(converted, shown):
    words = joined(shown(replace(converted(), dense_layers=TRIALS)))
    assert (
        "Dense layers, tried on a few tokens: perplexity 3.00 × (worst text 4.50 ×) with none, "
        "1.50 × (worst text 1.50 ×) with layer 0, 1.25 × (worst text 1.25 ×) with layers 0 and 2."
    ) in words
    assert "you lose" not in words


def test_dense_layers_that_were_named_have_no_trials(converted, shown):
    assert "tried" not in shown(converted(keep_dense=[0]))


def test_runtimes_that_dense_layers_cost_are_named(converted, shown):
    kept = replace(converted(keep_dense=[0, 2], experts=6), dense_layers=TRIALS)
    without = converted(experts=6).plan.runtimes
    lost = [name for name, why in kept.plan.runtimes.items() if why and not without[name]]
    assert lost == ["llama.cpp", "MLX"]
    words = joined(shown(kept))
    assert (
        "For layers 0 and 2 dense you lose llama.cpp and MLX: --keep-dense none gives them back."
    ) in words


def test_copies_need_no_verdict(converted, shown):
    words = joined(shown(converted(method="copy", experts=2, compensate="none")))
    assert "The function is unchanged; train it further so that the copies come to differ." in words
    assert "Fine as it is" not in words


def test_copies_with_new_neurons_are_to_be_trained(converted, shown):
    done = with_ratios(converted(method="drop", experts=2), 3.0, code=4.0)
    words = joined(shown(done))
    assert "Exactness: not expected: copies were changed." in words
    assert "Perplexity is up to 4.00 × the dense model's until it is trained." in words
    assert "Heal it" not in words


def test_without_a_check_there_is_no_verdict(converted, shown):
    page = shown(converted(check="none"))
    assert "Not checked (--check none)." in page
    assert "erplexity" not in page


# --- recipes ---------------------------------------------------------------------------------


@pytest.fixture
def listed(monkeypatch, capsys):
    monkeypatch.setattr(out, "_width", WIDTH)
    show_recipes(describe_recipes(), describe_presets(), every_method())
    return capsys.readouterr().out


def test_recipes_and_methods_read_well_on_eighty_columns(listed):
    """No name, paper or parameter is cut, and no cell is a column of a few letters."""
    assert max(map(len, listed.splitlines())) <= WIDTH
    assert "…" not in listed
    rows = [line.strip("│").split("│") for line in listed.splitlines() if line.startswith("│")]
    assert {len(cells) for cells in rows} == {2}
    widths = {len(cells[1]) for cells in rows}
    assert max(widths) > 40
    for row in [*describe_recipes(), *describe_presets(), *every_method()]:
        cells = cells_of(rows, row["name"])  # a recipe and a method may have one name
        (cell,) = [cell for cell in cells if cell.startswith(row["summary"])]
        assert row["paper"] in cell
        assert all(f"{name}=" in cell for name in row.get("parameters", {}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cmoe", "split · measured: 9 to 22 times the dense perplexity"),
        ("emoe", "split · not measured on a real model"),
        ("relufy", "measured: from 342 to 4.70 times the dense perplexity"),
        ("grin", "not measured on a real model"),
    ],
)
def test_recipe_says_what_was_measured_or_that_nobody_has(listed, name, words):
    rows = [line.strip("│").split("│") for line in listed.splitlines() if line.startswith("│")]
    assert words in next(cells_of(rows, name))


def cells_of(rows, name):
    """What stands beside the name, which begins a cell of several lines."""
    begins = [i for i, cells in enumerate(rows) if cells[0].strip()] + [len(rows)]
    for begin, end in itertools.pairwise(begins):
        if rows[begin][0].strip() == name:
            yield joined(" ".join(cells[1] for cells in rows[begin:end]))


def test_defaults_are_spelt_as_in_a_recipe(listed):
    assert "markers=null " in listed
    assert "normalize=true " in listed


def test_what_a_merge_has_shown_of_its_models(converted, shown):
    findings = Findings.model_validate(records.findings())
    page = shown(replace(converted(), findings=findings))
    words = joined(re.sub("[│┃]", " ", page))
    assert "org/coder 3 % 1.2 %" in words
    assert "writer 125 % 0 %" in words
    assert (
        "Nearest to each other are org/coder and writer: their FFNs are 126 % of the base's length "
        "apart. Condition number of the router's rows: 1.5 to inf (layer 1); infinite "
        "where rows cancel out, as those that are fitted to text do."
    ) in words
    assert "this merge 3.25 11.50 6.12" in words
    assert "mean of the sources 3.50 12.00 inf" in words


def test_perplexities_on_many_texts_have_room(converted, shown):
    names = [f"a-rather-long-name-of-text-{i}.jsonl" for i in range(7)]
    rows = [{"model": "this merge", "perplexity": [1.5 + i for i in range(7)]}]
    beside = {"texts": names, "tokens": [8] * 7, "models": rows}
    findings = Findings.model_validate(records.findings(perplexities=beside))
    page = shown(replace(converted(), findings=findings))
    words = joined(re.sub("[│┃]", " ", page))
    assert "this merge 1.50 2.50 3.50 4.50" in words
    assert "this merge 5.50 6.50 7.50" in words
