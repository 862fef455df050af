import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import upcycle
from upcycle.conversion.recipe import Recipe
from upcycle.core.flags import PARAMETERS, as_flags, setting
from upcycle.finetune.settings import Training

SPEAK_FLAGS = ("arguments.py", "cli.py", "options.py", "console", "core/flags.py")
"""The modules of the command line itself."""


def sentences() -> Iterator[tuple[str, str]]:
    """Every text of the library's modules that is no docstring, with where it is."""
    root = Path(upcycle.__file__).parent
    for path in root.rglob("*.py"):
        if path.relative_to(root).as_posix().startswith(SPEAK_FLAGS):
            continue
        tree = ast.parse(path.read_text())
        notes = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
        for node in ast.walk(tree):
            if id(node) in notes | parts:
                continue
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    v.value if isinstance(v, ast.Constant) else "{}" for v in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            yield f"{path.relative_to(root)}:{node.lineno}", text


@pytest.mark.parametrize(
    ("python", "command_line"),
    [
        ("`top_k=9` is more than the 8 experts", "--top-k 9 is more than the 8 experts"),
        ("raise `top_k`, or pass `overwrite`", "raise --top-k, or pass --overwrite"),
        ("`out=a b` exists", "-o a b exists"),
        ("`runtimes=llama.cpp` alone", "--for llama.cpp alone"),
        ("`keep_dense=0,1,…`", "--keep-dense 0,1,…"),
        ("`merge=True`, `assistant_only_loss=True`", "--merge, --assistant-only-loss"),
        (
            "`granularity=2` and `spread_gain=True`",
            "--set granularity=2 and --set spread_gain=true",
        ),
        ("lower `micro_batch=…`", "lower --set micro_batch=…"),
        ("`split.rows=3`", "--set split.rows=3"),
        ("`router_losses.erc.alpha=1`", "--set router_losses.erc.alpha=1"),
        ("the folder lr=1e-4 and `qwen2_moe`", "the folder lr=1e-4 and `qwen2_moe`"),
        ("`upcycle eval --json` prints", "`upcycle eval --json` prints"),
    ],
)
def test_command_line_spells_settings_as_flags(python, command_line):
    assert as_flags(python) == command_line


def test_setting_is_named_as_python_has_it():
    assert setting("top_k", 2) == "`top_k=2`"
    assert setting("spread_gain", True) == "`spread_gain=True`"
    assert as_flags(setting("keep_dense", (0, 29))) == "--keep-dense 0,29"
    assert as_flags(setting("granularity")) == "--set granularity=…"


def test_sentences_of_the_library_name_fields():
    commands = re.compile(r"`[^`]*`|<!--.*?-->|--num_processes|--private$")
    found = [
        (where, text)
        for where, text in sentences()
        if "page/advice" not in where  # whole commands
        and "finetune/processes" not in where  # torchrun's own
        and re.search(r"(?<![\w-])--[a-z]", commands.sub("", text))
    ]
    assert not found


def test_named_fields_exist():
    known = {*Recipe.model_fields, *Training.model_fields, *PARAMETERS, "{}"}
    named = [
        (where, field)
        for where, text in sentences()
        for field in re.findall(r"`([a-z_]+|{})(?:\.\w+)?=", text)
    ]
    assert len(named) > 80
    assert not [(where, field) for where, field in named if field not in known]
