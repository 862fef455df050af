"""Malformed input of every kind: exit code 2 and one sentence, or a result. Never a traceback,
never anything left behind, and never a change of what was read.

The inputs are the same in every run. `python benchmarks/fuzz.py` tries more, and others.
"""

import copy
import hashlib
import json
import os
import shutil
import signal
from contextlib import contextmanager, suppress

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny import make_dense
from typer.testing import CliRunner

from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.core.settings import shipped_presets, shipped_recipes
from upcycle.finetune.settings import load_training

INPUTS = int(os.environ.get("UPCYCLE_FUZZ_INPUTS", "0"))
SECONDS = 60
"""In which every input must come to its end."""
fuzzed = settings(
    max_examples=INPUTS or 24,
    derandomize=not INPUTS,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
SMALL = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
PLAN = "--top-k 2 --seq-len 32 --calibration-tokens 64 --calibration builtin".split()
COPY = "--method copy --check none --calibration none --set router=normal".split()
WORDS = "the quick brown fox jumps over the lazy dog. " * 20

# --- what may happen to a file ------------------------------------------------------------------

ODD = st.sampled_from(
    [
        *(None, True, False, 0, -1, 1, 3, 10**30, -(2**63), 2**31, 0.5, -0.0, 1e308),
        *(
            float("nan"),
            float("inf"),
            "",
            "x",
            "5",
            "[/red]",
            "\ud800",
            "a\0b",
            "../../x",
            "é" * 999,
        ),
        *([], {}, [0], ["x"], {"x": 0}, {"name": 0}, [[[[[]]]]], json.loads("[" * 200 + "]" * 200)),
    ]
)


@st.composite
def values(draw, value):
    """A value of JSON, changed in one to three places."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        value = _changed(draw, value)
    return value


def _changed(draw, value):
    if not isinstance(value, dict | list) or not value or not draw(st.integers(0, 9)):
        return copy.deepcopy(draw(ODD))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    if draw(st.integers(0, 4)):
        value[key] = _changed(draw, value[key])
    else:
        del value[key]
    return value


@st.composite
def flipped(draw, data: bytes):
    """Bytes that were cut, or of which some are others."""
    place = draw(st.integers(0, len(data) - 1))
    if draw(st.booleans()):
        return data[:place]
    new = draw(st.binary(min_size=1, max_size=4))
    return data[:place] + new + data[place + draw(st.integers(0, 4)) :]


def damaged(data: bytes):
    """A file of JSON, as values or as bytes."""
    changed = values(json.loads(data)).map(lambda value: json.dumps(value).encode())
    return st.one_of(changed, changed, changed, flipped(data))


# --- what must hold -----------------------------------------------------------------------------


def contents(folder):
    """Every file, with a digest of what it holds."""
    return {
        str(path.relative_to(folder)): path.is_file()
        and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
    }


@contextmanager
def in_time():
    def stop(*_):
        raise TimeoutError("it hangs")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def check(work, *arguments):
    """The command takes its input, or refuses it in one sentence; what it may write is `new…`."""
    before = contents(work)
    with in_time():
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert (result.exit_code, len(errors)) in ((0, 0), (2, 1)), result.stderr
    if errors:
        assert result.stderr.splitlines()[-1] == errors[0]
        assert result.stdout == ""
    made = {name for name in contents(work) if name.startswith("new")}
    assert bool(made) <= (result.exit_code == 0)
    for name in made:
        (work / name).is_file() and (work / name).unlink()
    shutil.rmtree(work / "new", ignore_errors=True)
    assert contents(work) == before


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Beside one another in a folder: a dense model, its MoE, texts and an evaluation."""
    work = tmp_path_factory.mktemp("fuzz")
    make_dense(work / "dense", shards="8kB", **SMALL)
    make_dense(work / "single", **SMALL)
    (work / "a.txt").write_text(WORDS)
    for arguments in (
        ["convert", work / "single", "-o", work / "moe", *PLAN, "--check", "none"],
        ["eval", work / "moe", "--text", work / "a.txt", "--tokens", 32, "--seq-len", 16,
         "--output", work / "eval.json"],
    ):  # fmt: skip
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.stderr
    (work / "moe/train_log.jsonl").write_text('{"step":1,"loss":2.5}\n{"step":2,"loss":2.25}\n')
    return work


@contextmanager
def instead(path, data: bytes):
    """The file holds other bytes for a while."""
    former = path.read_bytes() if path.exists() else None
    path.write_bytes(data)
    try:
        yield
    finally:
        path.unlink() if former is None else path.write_bytes(former)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_a_source(good, file):
    path = good / "dense" / file

    @fuzzed
    @given(damaged(path.read_bytes()))
    def attempt(data):
        with instead(path, data):
            check(good, "plan", good / "dense", *PLAN)

    attempt()


def test_a_config_that_is_converted(good):
    path = good / "single/config.json"

    @fuzzed
    @given(damaged(path.read_bytes()))
    def attempt(data):
        with instead(path, data):
            check(good, "convert", good / "single", "-o", good / "new", *COPY)

    attempt()


def test_a_safetensors_header(good):
    path = good / "single/model.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    headers = values(json.loads(whole[8:end])).map(lambda value: json.dumps(value).encode())
    headers = headers.map(lambda header: len(header).to_bytes(8, "little") + header)

    @fuzzed
    @given(st.one_of(headers, flipped(whole[:end])).map(lambda header: header + whole[end:]))
    def attempt(data):
        with instead(path, data):
            check(good, "convert", good / "single", "-o", good / "new", *COPY)

    attempt()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer(good, file):
    path = good / "moe" / file

    @fuzzed
    @given(damaged(path.read_bytes()))
    def attempt(data):
        with instead(path, data):
            text = ["--text", good / "a.txt", "--tokens", 16, "--seq-len", 8]
            check(good, "eval", good / "moe", *text)

    attempt()


def test_a_checkpoint_that_is_evaluated(good):
    path = good / "moe/config.json"

    @fuzzed
    @given(damaged(path.read_bytes()))
    def attempt(data):
        with instead(path, data):
            text = ["--text", good / "a.txt", "--tokens", 16, "--seq-len", 8]
            check(good, "eval", good / "moe", *text)

    attempt()


def test_a_recipe(good):
    fields = yaml.safe_load(shipped_recipes()["default"].read_text(encoding="utf-8"))
    texts = values(fields).map(lambda value: yaml.safe_dump(value).encode())

    @fuzzed
    @given(st.one_of(texts, texts, flipped(yaml.safe_dump(fields).encode())))
    def attempt(data):
        with instead(good / "r.yaml", data):
            check(good, "plan", good / "single", "--recipe", good / "r.yaml")

    attempt()


def test_a_preset(tmp_path):
    fields = yaml.safe_load(shipped_presets()["heal"].read_text(encoding="utf-8"))

    @fuzzed
    @given(values(fields).map(yaml.safe_dump))
    def attempt(text):
        (tmp_path / "p.yaml").write_text(text)
        with suppress(UpcycleError):
            load_training(tmp_path / "p.yaml", {})

    attempt()


@pytest.mark.parametrize("file", ["moe/upcycle.json", "eval.json"])
def test_a_record(good, file):
    @fuzzed
    @given(damaged((good / file).read_bytes()))
    def attempt(data):
        with instead(good / file, data):
            saved = ["--evaluation", good / "eval.json"]
            check(good, "report", good / "moe", "-o", good / "new.html", *saved)
            check(good, "inspect", good / "moe")

    attempt()


def as_lines(rows) -> str:
    rows = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_log(good):
    path = good / "moe/train_log.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    logs = values(lines).map(as_lines)

    @fuzzed
    @given(st.one_of(logs.map(str.encode), flipped(path.read_bytes())))
    def attempt(data):
        with instead(path, data):
            saved = ["--evaluation", good / "eval.json"]
            check(good, "report", good / "moe", "-o", good / "new.html", *saved)

    attempt()


def parquet_bytes():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [WORDS, "ok " * 20] * 9}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_text(good, ending):
    rows = [{"text": WORDS}, {"messages": [{"role": "user", "content": WORDS}]}]
    jsonl = "".join(json.dumps(row) + "\n" for row in rows).encode()
    whole = {"txt": WORDS.encode(), "jsonl": jsonl, "parquet": parquet_bytes()}[ending]
    changed = values(rows[0]).map(lambda row: json.dumps(row).encode() + b"\n" + jsonl)
    inputs = st.one_of(changed, flipped(whole)) if ending == "jsonl" else flipped(whole)

    @fuzzed
    @given(inputs)
    def attempt(data):
        path = good / f"b.{ending}"
        with instead(path, data):
            check(good, "eval", good / "moe", "--text", path, "--tokens", 16, "--seq-len", 8)

    attempt()


def test_a_journal(good):
    partial = good / ".new.partial"
    journal = [{"fingerprint": "x"}, {"unit": "layer 0", "record": {"layer": 0}}]

    @fuzzed
    @given(values(journal))
    def attempt(entries):
        partial.mkdir(exist_ok=True)
        (partial / "journal.jsonl").write_text(as_lines(entries))
        before = (partial / "journal.jsonl").read_bytes()
        result = CliRunner().invoke(
            app,
            ["convert", str(good / "single"), "-o", str(good / "new"), *COPY, "--resume"],
        )
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        assert result.exit_code in (0, 2)
        if result.exit_code == 2:
            assert (partial / "journal.jsonl").read_bytes() == before
        shutil.rmtree(good / "new", ignore_errors=True)

    attempt()
    shutil.rmtree(partial, ignore_errors=True)
