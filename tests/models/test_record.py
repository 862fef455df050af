"""upcycle.json and train_log.jsonl: written and read by one schema."""

import json

import pytest
import records

import upcycle
from upcycle import UpcycleError
from upcycle.models.record.file import Made, Trained, read_record, record_text
from upcycle.models.train_log import LogLine, log_text, read_log

LATER = {"runtimes", "feedback"}
"""Of a plan, what upcycle did not write at first."""


@pytest.fixture(scope="module")
def made(dense, tmp_path_factory):
    """The record of a small conversion with a check and trials of dense layers."""
    out = tmp_path_factory.mktemp("record") / "out"
    upcycle.convert(
        str(dense()), out, experts=4, calibration="builtin", calibration_tokens=512, seq_len=64,
        keep_dense="auto",
    )  # fmt: skip
    return out / "upcycle.json"


def write(path, record):
    path.write_text(json.dumps(record))
    return path


def test_what_convert_writes_is_read_and_written_again_as_it_is(made):
    record = read_record(made)
    assert isinstance(record, Made)
    assert record_text(record) == made.read_text()
    assert list(json.loads(made.read_text())) == [
        "out", "plan", "check", "seconds", "peak_memory", "dense_layers", "versions", "source",
        "run", "layers",
    ]  # fmt: skip
    plan = records.plan()
    assert list(record.plain()["plan"]) == list(plan)
    assert set(record.plain()["plan"]["recipe"]) > set(plan["recipe"])


def test_older_record_is_handed_on_as_it_is(made, tmp_path):
    fields = json.loads(made.read_text())
    for key in ("run", "dense_layers"):
        del fields[key]
    fields["plan"] = {name: value for name, value in fields["plan"].items() if name not in LATER}
    record = read_record(write(tmp_path / "upcycle.json", fields))
    assert json.loads(record_text(record)) == fields
    assert (record.run, record.dense_layers, record.plan.runtimes) == (None, None, {})


def test_what_a_newer_version_adds_is_handed_on(made, tmp_path):
    fields = json.loads(made.read_text()) | {"new": [1]}
    fields["plan"]["recipe"]["newer"] = {"a": "b"}
    fields["training"] = [records.training_run("builtin", newest=2.5)]
    record = read_record(write(tmp_path / "upcycle.json", fields))
    assert json.loads(record_text(record)) == fields


def test_perplexity_that_is_no_number_is_read(made, tmp_path):
    """As of logits that overflow, of which nothing else is wrong."""
    fields = json.loads(made.read_text())
    fields["check"]["kinds"][0] |= {"perplexity_moe": "NaN", "ratio": "Infinity"}
    check = read_record(write(tmp_path / "upcycle.json", fields)).check
    assert check.kinds[0].perplexity_moe != check.kinds[0].perplexity_moe
    assert check.perplexity_ratio == float("inf")


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("plan", "layers"), "many", "plan.layers='many': input should be a valid integer"),
        (("plan", "recipe", "split"), 5, "plan.recipe.split=5: input should be"),
        (("check", "kinds"), [], "check.kinds=[]: list should have at least 1 item"),
        (("check", "kinds", 0, "ratio"), -1.0, "check.kinds.0.ratio=-1.0: it must be above 0"),
        (("check", "kinds", 0, "ratio"), 1e308, "check.kinds.0.ratio=1e+308: it is beyond 1e+300"),
        (("source",), "x", "source='x': input should be a valid dictionary"),
        (("layers", 1, "dense"), None, "layers.1.dense=None: input should be a valid boolean"),
        (("training",), [{}], "training.0.model is missing"),
    ],
)
def test_damage_is_told_by_file_and_field(made, tmp_path, place, value, problem):
    fields = inner = json.loads(made.read_text())
    *way, last = place
    for key in way:
        inner = inner[key]
    inner[last] = value
    path = write(tmp_path / "upcycle.json", fields)
    with pytest.raises(UpcycleError) as refused:
        read_record(path)
    sentence = str(refused.value)
    assert sentence.startswith(f"{path} is not what upcycle writes: {problem}")
    assert sentence.endswith(": restore or delete it")


def test_damage_of_an_encoders_check_is_told_by_its_field(made, tmp_path):
    fields = json.loads(made.read_text())
    kind = {"kind": "probe:web", "tokens": 1, "error": "far", "worst_window": 1.0}
    fields["check"]["kinds"] = [kind | {"cosine": 1.0, "pooled_cosine": 1.0}]
    with pytest.raises(
        UpcycleError, match=r"writes: check\.kinds\.0\.error='far': input should be"
    ):
        read_record(write(tmp_path / "upcycle.json", fields))


def test_model_of_other_origin_that_was_trained_here(tmp_path):
    fields = {"check": None, "training": [records.training_run("builtin")], "run": None}
    record = read_record(write(tmp_path / "upcycle.json", fields))
    assert isinstance(record, Trained)
    assert json.loads(record_text(record)) == fields


def test_log_is_read_as_it_was_written(tmp_path):
    rows = [
        {"step": 0, "validation": {"loss": 2.5, "perplexity": 12.2}},
        {"step": 1, "loss": 2.4, "next_token": 2.4, "grad_norm": float("inf"), "lr": 1e-4}
        | {"imbalance": 1.5, "dead": 0, "tokens_per_second": 10.0},
    ]
    path = tmp_path / "train_log.jsonl"
    path.write_text("".join(map(log_text, rows)))
    assert [line.plain() for line in read_log(path)] == rows
    assert json.loads(path.read_text().splitlines()[1])["grad_norm"] == "Infinity"
    assert read_log(path)[0] == LogLine(step=0, validation={"loss": 2.5, "perplexity": 12.2})
