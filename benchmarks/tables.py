"""The tables and the picture of the docs, from benchmarks/results/*.json.

Each file there is one question: the newest numbers that answer it, and how they came about.
docs/results.md has them all; README.md has five rows in words and docs/frontier.svg, between two
comments that name this script.

    python benchmarks/tables.py [--no-picture]    # the picture wants upcycle[benchmarks]
"""

import argparse
import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

ROOT = Path(__file__).parent.parent
RESULTS, PICTURE = ROOT / "docs/results.md", ROOT / "docs/frontier.svg"
README = ROOT / "README.md"
BEGIN, END = "<!-- by benchmarks/tables.py -->\n", "<!-- end -->\n"
SECTIONS = {
    "Quality without training": ("kinds", "shares", "second-real-model", "second-model"),
    "Training": (
        "frontier",
        "heal-settings",
        "heal-131k",
        "plain-training",
        "copies",
        "training-loop",
        "together",
    ),
    "Merging": ("merge",),
    "Time and memory": ("conversion-time", "copying", "memory", "granules"),
    "Other runtimes": ("vllm", "llama-cpp", "llama-cpp-quantised", "llama-cpp-speed"),
    "What the choices are worth": ("calibration", "spread", "clustering", "routers"),
}
TEXTS = ("web", "code", "encyclopaedia", "technical", "news")
MOST_TOKENS = 131_072
CURVES = {
    0: "--recipe thorough",
    32_768: "trained on 32k tokens",
    MOST_TOKENS: "trained on 131k tokens",
}
"""Of the picture, by tokens of training."""
COLOURS = {
    "default": "#4c72b0",
    CURVES[0]: "#a9bcd9",
    CURVES[32_768]: "#b5d3bb",
    CURVES[MOST_TOKENS]: "#55a868",
}
BESIDE = {CURVES[0]: (4, 4), CURVES[MOST_TOKENS]: (-24, -4)}
"""Where a line's numbers stand, in points from its markers; three lines have no room for theirs."""
SMALL_PRINT: dict[str, Any] = {"fontsize": 7, "color": "#333333"}
OLDER_TEXTS = ("WikiText-2", "code", "prose")
WORDS = {
    1: "as much",
    1.1: "a tenth more",
    1.2: "a fifth more",
    1.25: "a quarter more",
    4 / 3: "a third more",
    1.5: "half more",
    5 / 3: "two thirds more",
    1.8: "four fifths more",
    2: "twice",
    2.25: "two and a quarter times",
    2.5: "two and a half times",
    3: "three times",
    3.5: "three and a half times",
    4: "four times",
}
INTRO = """# Results

One table per question, the newest numbers only; what was measured before, and how it came about, is
in [the log](../dev/log.md). Below each table stand its conditions. `python benchmarks/tables.py`
writes this page from `benchmarks/results/*.json`.

The small machine has 2 cores of an AMD EPYC (AVX-512), 24 GiB, no GPU, Linux, Python 3.11, torch
2.13.0 and transformers 5.23.0. SMOLLM2 is SmolLM2-135M-Instruct, dequantised from its Q4_1 GGUF
file, QWEN Qwen2.5-Coder-0.5B-Instruct from Q4_K_M. Commands stand as they are written today, with
the names of texts in capitals. SsAaEn are n
equal parts of an FFN, s of them always on and a more per token.
"""


class Result(BaseModel):
    """One file: a table, and all that is recorded of how it was measured."""

    model_config = ConfigDict(extra="forbid")

    question: str
    answer: str
    """The main thing, in a sentence."""
    measure: str
    """What the numbers are, with their unit."""
    command: list[str]
    """Empty if it is not recorded, as is `seeds`, which times have none of."""
    commit: str | None
    date: str
    machine: str
    seeds: list[int]
    conditions: str
    columns: dict[str, str]
    """How each column's numbers are written; the first column names the row."""
    rows: list[list[str | int | float | None]]

    def cells(self, row: int, columns: tuple[str, ...]) -> list[float]:
        """The numbers of some columns in a row."""
        names = list(self.columns)
        return [float(self.rows[row][names.index(column)] or 0) for column in columns]

    def table(self) -> str:
        lines = [list(self.columns), ["---"] * len(self.columns)]
        formats = list(self.columns.values())
        for row in self.rows:
            written = zip(row, formats, strict=True)
            lines.append(["" if cell is None else format(cell, form) for cell, form in written])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read() -> dict[str, Result]:
    """All results by the name of their file."""
    files = sorted((ROOT / "benchmarks/results").glob("*.json"))
    return {file.stem: Result.model_validate_json(file.read_text("utf-8")) for file in files}


def results_page(results: dict[str, Result]) -> str:
    """docs/results.md."""
    parts = [INTRO]
    for title, names in SECTIONS.items():
        parts.append(f"# {title}\n")
        parts += [section(results[name]) for name in names]
    return "\n".join(parts)


def section(result: Result) -> str:
    """The question, its answer and table, and below them in small print the conditions."""
    seeds = {0: "", 1: ", one seed"}.get(len(result.seeds), f", {len(result.seeds)} seeds")
    commit = f"commit {result.commit}" if result.commit else "commit not recorded"
    measure = result.measure[0].upper() + result.measure[1:]
    small = f"{measure}; {commit}, {result.machine}, {result.date}{seeds}. {result.conditions}"
    lines = "\n".join(result.command)
    command = f"```text\n{lines}\n```\n\n" if lines else ""
    return (
        f"## {result.question}\n\n{result.answer}\n\n{result.table()}\n{command}"
        f"<sub>{small.strip()}</sub>\n"
    )


def healed(
    results: dict[str, Result], way: str, tokens: int, model: str = "smollm2"
) -> list[float]:
    """With half of the FFNs active, by kind of text, after so many tokens of `heal`."""
    frontier = results["frontier"]
    cell = [model, way, 0.5, tokens]
    return frontier.cells([row[:4] for row in frontier.rows].index(cell), TEXTS)


def in_words(ratio: float) -> str:
    """About a ratio, without decimals, such as `twice`."""
    return WORDS[min(WORDS, key=lambda known: abs(math.log(known / ratio)))]


def mean(ratios: list[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def readme_table(results: dict[str, Result]) -> str:
    """What to use when, in five rows."""
    kinds, shares = results["kinds"], results["shares"]
    half, eight = kinds.cells(0, TEXTS), kinds.cells(1, TEXTS)
    fitted, trained = (healed(results, "thorough", tokens) for tokens in (0, MOST_TOKENS))
    split, pruned = shares.cells(1, OLDER_TEXTS), shares.cells(8, OLDER_TEXTS)
    weights = in_words(float(str(shares.rows[8][4]).removesuffix(" x")))
    rows = [
        ("you want", "use", "perplexity, about, beside the dense model's"),
        ("---", "---", "---"),
        (
            "half of the FFN work per token, no larger",
            "`upcycle convert MODEL -o out`",
            f"{in_words(mean(half))}; {in_words(min(half))} on code, {in_words(max(half))} on "
            "technical text",
        ),
        (
            "the same with few, wide experts",
            "`--experts 8 --top-k 2`",
            in_words(mean(eight)),
        ),
        (
            "a smaller loss, for time and text of your kind",
            "`--recipe thorough --calibration notes.txt`, then `upcycle finetune out --data "
            "notes.txt`",
            f"{in_words(mean(fitted))}; then {in_words(mean(trained))}, after "
            f"{MOST_TOKENS // 1000}k tokens",
        ),
        (
            "a smaller loss, for memory",
            "`--method prune`",
            f"{in_words(mean(pruned))} where a split had {in_words(mean(split))}, by {weights} "
            "the FFN weights",
        ),
        (
            "a larger model, to be trained",
            "`--method copy --experts 8 --top-k 2`",
            "the same, until you train it",
        ),
    ]
    other, after = (in_words(mean(healed(results, "default", t, "qwen"))) for t in (0, MOST_TOKENS))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows) + (
        f"\nQwen2.5-Coder-0.5B loses less: by the first row {other}, and after "
        f"{MOST_TOKENS // 1000}k tokens of `upcycle finetune` {after}.\n"
    )


def with_table(readme: str, table: str) -> str:
    """The README with the table between the two comments."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", readme, flags=re.DOTALL)


def curves(results: dict[str, Result]) -> dict[str, dict[float, float]]:
    """By tokens of training, perplexity over the dense model's for each share that is active: the
    mean of the kinds of text that were trained on."""
    frontier = results["frontier"]
    found: dict[str, dict[float, float]] = {label: {} for label in CURVES.values()}
    found[CURVES[0]][1.0] = 1.0
    for row in frontier.rows:
        cell = dict(zip(frontier.columns, row, strict=True))
        drawn = cell["model"] == "smollm2" and cell["what"] in ("thorough", "the dense model")
        if drawn and cell["tokens"] in CURVES:
            found[CURVES[int(cell["tokens"])]][float(cell["active"])] = float(cell["mean"])
    return found


def bars(results: dict[str, Result]) -> dict[str, list[float]]:
    """With half of the FFNs active, for each way, perplexity over the dense model's by kind of
    text."""
    return {
        "default": healed(results, "default", 0),
        CURVES[0]: healed(results, "thorough", 0),
        CURVES[MOST_TOKENS]: healed(results, "thorough", MOST_TOKENS),
    }


def draw_curves(axes: Any, lines: dict[str, dict[float, float]]) -> None:
    """One line per number of tokens, over the share that is active."""
    from matplotlib.ticker import NullLocator

    for label, line in lines.items():
        shares = sorted(line)
        axes.plot(shares, [line[x] for x in shares], "o-", color=COLOURS[label], markersize=4)
        for share in (x for x in shares if label in BESIDE and line[x] != 1):
            axes.annotate(
                f"{line[share]:.2f}",
                (share, line[share]),
                BESIDE[label],
                textcoords="offset points",
                **SMALL_PRINT,
            )
    shares = sorted({share for line in lines.values() for share in line})
    axes.set(xticks=shares, xticklabels=[f"{share:.0%}" for share in shares])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("by the share of each FFN that is active", fontsize=9)


def draw_bars(axes: Any, ways: dict[str, list[float]]) -> None:
    """One bar per way and kind of text."""
    width = 0.8 / len(ways)
    for i, (way, ratios) in enumerate(ways.items()):
        places = [kind + (i - (len(ways) - 1) / 2) * width for kind in range(len(TEXTS))]
        drawn = axes.bar(places, ratios, width * 0.92, color=COLOURS[way])
        axes.bar_label(drawn, fmt="%.1f", **SMALL_PRINT)
    axes.set(xticks=range(len(TEXTS)), xticklabels=TEXTS, ylim=(0, 3), yticks=[])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title("by kind of text, with half active", fontsize=9)


def draw(results: dict[str, Result], path: Path) -> None:
    """Both pictures under one legend."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "upcycle", "font.family": "sans-serif"}
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.4), width_ratios=(2, 3), layout="constrained"
    )
    draw_curves(left, curves(results))
    draw_bars(right, bars(results))
    for axes in (left, right):
        axes.axhline(1, color="#333333", linewidth=1)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle("Perplexity over the dense model's (SmolLM2-135M)", fontsize=10)
    legend = [Patch(color=colour, label=way) for way, colour in COLOURS.items()]
    figure.legend(handles=legend, frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-picture", action="store_true", help="without matplotlib")
    args = parser.parse_args()
    results = read()
    RESULTS.write_text(results_page(results), "utf-8")
    README.write_text(with_table(README.read_text("utf-8"), readme_table(results)), "utf-8")
    if not args.no_picture:
        draw(results, PICTURE)


if __name__ == "__main__":
    main()
