"""The docs: commands in them run, links lead somewhere, and what is generated is current."""

import importlib.util
import json
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import make_moved
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.models.runtimes import Run
from upcycle.models.targets import TARGETS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
EXECUTED = [README, *sorted((ROOT / "docs/guides").glob("*.md"))]
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "dev").glob("*.md")])
NOT_RUN = {
    'pip install ".[gguf,datasets,lora,eval]"': "installs",
    "make demo": "converts a real model",
    "make test": "is what runs this test",
    "upcycle convert MODEL -o out --calibration mixed+hf:HuggingFaceFW/fineweb": "needs the hub",
    "upcycle eval out --against MODEL --tasks arc_easy,hellaswag": "needs the hub",
    "vllm serve out": "starts a server",
    "python convert_hf_to_gguf.py out --outfile out.gguf": "is llama.cpp's",
    "llama-cli -m out.gguf": "is llama.cpp's",
    "torchrun --nproc_per_node 2 -m upcycle finetune out --data notes.txt -o healed": "starts "
    "several processes",
    "accelerate launch --config_file fsdp2.yaml -m upcycle finetune out --data notes.txt "
    "-o healed": "needs several GPUs",
}
"""Commands of README and guides that are not run here, and why."""
SOURCES = {"MODEL", "./my-llama", "meta-llama/Llama-3.2-1B"}
"""What the docs call a dense model."""
SMALL = {
    "convert": "--calibration-tokens 128 --seq-len 64 --overwrite",
    "plan": "--calibration-tokens 128 --seq-len 64",
    "merge": "--set calibration_tokens=128 --seq-len 64 --overwrite",
    "finetune": "--steps 1 --seq-len 32 --batch-size 1 --overwrite --set validation_tokens=64",
    "eval": "--tokens 64 --seq-len 64",
    "report": "--tokens 64 --seq-len 64 --overwrite",
}
"""What is added to a command, so that it takes no time."""
MOE = """base_model: MODEL
experts:
  - source_model: coder
    positive_prompts: ["def main():"]
  - source_model: writer
    positive_prompts: ["Once upon a time"]
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


WITH_PYTHON = [page for page in EXECUTED if blocks(page, "python")]


def commands(page: Path) -> list[str]:
    """The commands of a page, without their comments."""
    lines = [line for block in blocks(page, "console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [re.sub(r"\s+#.*", "", line[2:]) for line in lines]


def script(path: str):
    """One of the scripts that write parts of the docs, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def place(dense, moe, tmp_path, monkeypatch):
    """A folder with what the commands name: a dense model, two fine-tunes of it and a file that
    merges them, results of a split and of copies, and texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)
    source = dense(num_hidden_layers=1, intermediate_size=256)
    Path("MODEL").symlink_to(source)
    Path("my-llama").symlink_to(source)
    shutil.copytree(moe(source), "out")
    shutil.copytree(moe(source, method="copy", top_k=2), "copies")
    for seed, name in enumerate(("coder", "writer")):
        make_moved(Path(name), source, seed)
    Path("moe.yml").write_text(MOE)
    words = "Bread is flour, water and time. " * 200
    Path("notes.txt").write_text(words)
    Path("code.txt").write_text(words)
    Path("notes.jsonl").write_text(f"{json.dumps({'text': words})}\n" * 4)


def run(command: str) -> None:
    words = ["MODEL" if word in SOURCES else word for word in shlex.split(command)[1:]]
    result = CliRunner().invoke(app, [*words, *SMALL.get(words[0], "").split()])
    assert result.exit_code == 0, f"{command}\n{result.output}"


@pytest.mark.parametrize("page", EXECUTED, ids=lambda page: page.stem)
def test_commands_run_as_they_stand(page, place):
    """In their order, each on what those before it have made. (Up to eight conversions a page, so
    this takes seconds.)"""
    for command in commands(page):
        if command not in NOT_RUN:
            run(command)


def test_every_other_command_is_one_of_those_known_not_to_run():
    told = {command for page in EXECUTED for command in commands(page)}
    assert {command for command in told if not command.startswith("upcycle ")} <= set(NOT_RUN)
    assert set(NOT_RUN) <= told


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_python_runs_as_it_stands(page, place):
    for block in blocks(page, "python"):
        if "upcycle.convert" in block:
            shutil.rmtree("out")
        exec(compile(small(block), str(page), "exec"), {})


def small(python: str) -> str:
    """The same with settings that take no time."""
    few = 'calibration_tokens=128, seq_len=64, calibration="notes.txt"'
    python = python.replace("active=0.5)", f"active=0.5, {few})")
    return python.replace("teacher=", "steps=1, seq_len=32, batch_size=1, teacher=")


def test_ci_runs_the_commands_of_the_readme():
    assert "make test" in commands(README)
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make check", "make test"]


def test_readme_is_short_and_shows_its_picture_and_table_without_decimals():
    text = README.read_text()
    assert len(text.encode()) <= 7000
    table = text[text.index("| you want") :].split("\n\n")[0]
    assert len(table.splitlines()) == 2 + 5
    assert not re.search(r"\d\.\d", table)
    assert text.index("pip install") < text.index("docs/frontier.svg") < text.index("| you want")


# --- links -----------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), target


def test_every_page_is_reached_from_the_readme():
    seen, found = set(), [README]
    while found:
        page = found.pop()
        seen.add(page)
        links = re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", page.read_text())
        found += {(page.parent / link).resolve() for link in links} - seen
    assert set(PAGES) <= seen


# --- what is generated -----------------------------------------------------------------------


@pytest.mark.parametrize("page", ["methods", "cli", "models", "runtimes"])
def test_reference_is_current(page):
    written = getattr(script("docs/reference.py"), f"{page}_page")()
    assert (ROOT / f"docs/{page}.md").read_text() == written, "run `make docs`"


def test_every_limit_of_a_runtime_has_words():
    page = (ROOT / "docs/runtimes.md").read_text()
    assert "lambda" not in page
    for limit in {limit for t in TARGETS.values() for ls in t.runtimes.values() for limit in ls}:
        assert "\n" not in (limit.__doc__ or ""), limit.__name__


def test_a_target_that_was_run_nowhere_is_said_to_be_read(monkeypatch):
    reference = script("docs/reference.py")
    monkeypatch.setitem(TARGETS["mixtral"].ran, "vLLM", Run("9.9", "2030-01-31", "a toy"))
    monkeypatch.delitem(TARGETS["mixtral"].ran, "MLX")
    (cells,) = [
        line.split(" | ")
        for line in reference.runtimes_page().split("## With")[0].splitlines()
        if line.startswith("| `mixtral`")
    ]
    assert cells[2:4] == ["9.9, 2030-01-31", "*read*"]


def test_tables_are_those_of_the_results():
    tables = script("benchmarks/tables.py")
    results = tables.read()
    assert {name for names in tables.SECTIONS.values() for name in names} == set(results)
    assert (ROOT / "docs/results.md").read_text() == tables.results_page(results), "run `make docs`"
    readme = README.read_text()
    assert readme == tables.with_table(readme, tables.readme_table(results)), "run `make docs`"


def test_picture_shows_the_results():
    tables = script("benchmarks/tables.py")
    drawn, results = (ROOT / "docs/frontier.svg").read_text(), tables.read()
    for way, ratios in tables.bars(results).items():
        assert way in drawn
        assert all(f">{ratio:.1f}<" in drawn for ratio in ratios)
    for way, line in tables.curves(results).items():
        assert way in drawn
        shown = line.values() if way in tables.BESIDE else []
        assert all(f">{ratio:.2f}<" in drawn for ratio in shown if ratio != 1)


def test_ratios_in_words():
    tables = script("benchmarks/tables.py")
    assert [tables.in_words(r) for r in (1.52, 2.04, 2.61)] == [
        "half more",
        "twice",
        "two and a half times",
    ]
    assert tables.mean([2, 8]) == pytest.approx(4)
    assert all(low < high for low, high in pairwise(tables.WORDS))
