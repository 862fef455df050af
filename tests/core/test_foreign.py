"""Foreign files: read within bounds, and what libraries say of them in one sentence."""

import ast
import errno
import json
import re
from pathlib import Path

import pytest
import torch

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.recipe import Recipe
from upcycle.core.foreign import DEEPEST, blaming, first_problem, parse_json, parse_yaml, read_json
from upcycle.evaluation.run import evaluate


class PanicException(BaseException):
    """As pyo3 names its own."""


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("raised", "sentence"),
    [
        (ValueError("bad\nlong story"), "x is odd: bad"),
        (AssertionError(), "x is odd: AssertionError"),
        (ValueError("it fails:\n  for a reason"), "x is odd: it fails: for a reason"),
        (PanicException("no entry found"), "x is odd: no entry found"),
        (MemoryError(), "out of memory: lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory: lower"),
        (OSError(errno.ENOSPC, "No space left on device"), "no room is left on the disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "no room is left"),
        (UpcycleError("ours"), "ours"),
    ],
)
def test_what_a_library_raises_is_one_sentence(raised, sentence):
    with pytest.raises(UpcycleError) as found, blaming("x is odd"):
        raise raised
    assert str(found.value).startswith(sentence)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_end_is_no_error(raised):
    with pytest.raises(raised), blaming("x is odd"):
        raise raised


@pytest.mark.parametrize("text", ["{", nested(DEEPEST + 1), nested(100_000), "1" * 5000])
def test_json_within_bounds(text):
    with pytest.raises(UpcycleError, match=r"^f is not JSON: "):
        parse_json(text, "f")


def test_json_as_deep_as_it_may_be():
    assert json.dumps(parse_json(nested(DEEPEST), "f")) == nested(DEEPEST)


def test_json_that_is_not_utf8(tmp_path):
    (tmp_path / "f").write_bytes(b"\xff\xfe")
    with pytest.raises(UpcycleError, match="f is not JSON: it is not UTF-8"):
        read_json(tmp_path / "f")


@pytest.mark.parametrize(
    "text",
    ["a: &x 1\nb: *x", "a: &x [*x]", nested(DEEPEST + 1), nested(5000), "a: [", "a: 2024-13-45"],
)
def test_yaml_within_bounds(text):
    with pytest.raises(UpcycleError, match=r"^f is "):
        parse_yaml(text, "f")


def test_yaml_as_it_may_be():
    assert parse_yaml("a: [1, {b: x}]\nc: 2.5", "f") == {"a": [1, {"b": "x"}], "c": 2.5}


def test_a_problem_shows_no_value_that_is_pages_long():
    with pytest.raises(ValueError, match="validation error") as found:
        Recipe(experts=["x" * 10_000] * 10_000)
    assert len(first_problem(found.value)) < 500


# --- no foreign code ----------------------------------------------------------------------------


def calls():
    for path in sorted(Path(upcycle.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                settings = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), settings


def test_no_call_of_an_auto_class_runs_a_checkpoints_code():
    """Left open, transformers asks on the terminal, and takes a `y` from a pipe."""
    loading = re.compile(r"[Aa]uto\w*\.from_(pretrained|config)")
    found = [(where, s) for where, name, s in calls() if loading.fullmatch(name)]
    assert len(found) >= 4
    assert [where for where, s in found if s.get("trust_remote_code") is not False] == []


def test_no_weights_are_a_pickle():
    loaders = ("auto.from_pretrained", "PeftModel.from_pretrained")
    found = [(where, settings) for where, name, settings in calls() if name in loaders]
    assert len(found) >= 3
    assert [where for where, s in found if s.get("use_safetensors") is not True] == []
    assert [where for where, name, _ in calls() if name in ("torch.load", "pickle.load")] == []


@pytest.fixture
def with_code(dense, tmp_path):
    """Copies a model and gives it Python of its own, which leaves a mark when it runs."""

    def copy(file: str, **fields) -> Path:
        folder = tmp_path / "own"
        folder.mkdir()
        for path in dense().iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(found | fields))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'RAN')!r}, 'w')\n")
        return folder

    return copy


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "evil.T"]}},
        ),
    ],
)
def test_a_checkpoints_python_never_runs(with_code, tmp_path, monkeypatch, file, fields):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = with_code(file, **fields)
    with pytest.raises(UpcycleError):
        upcycle.plan(str(folder), seq_len=64)
    assert not (tmp_path / "RAN").exists()


def test_a_pickle_is_not_opened(dense, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for path in dense().iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UpcycleError, match=r"convert its \.bin files to safetensors first"):
        evaluate(str(folder), ["builtin"], tokens=64, seq_len=32)
