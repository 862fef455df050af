"""What a model was fitted on is told when it is measured on that."""

import json
import shutil

import pytest
from records import training_run

import upcycle
from upcycle import UpcycleError
from upcycle.evaluation.run import evaluate
from upcycle.models.history import fitted_on, identity

SIZE = {"tokens": 64, "seq_len": 64}


@pytest.fixture(scope="module")
def split(dense, text, tmp_path_factory):
    """Calibrated on the text and on builtin."""
    out = tmp_path_factory.mktemp("history") / "out"
    upcycle.convert(
        str(dense()), out, experts=4, calibration=f"{text}+builtin", calibration_tokens=256,
        seq_len=64, check="none", keep_dense="none",
    )  # fmt: skip
    return out


def test_texts_of_calibration_are_marked(split, text, tmp_path, monkeypatch):
    """A file by its name alone: the record is published, and holds no path."""
    other = tmp_path / "other.txt"
    other.write_text(text.read_text())
    monkeypatch.chdir(text.parent)
    named = [str(text), text.name, "builtin", str(other)]
    assert [row.fitted for row in evaluate(str(split), named, **SIZE).texts] == [
        True, True, True, False,
    ]  # fmt: skip


def test_dense_model_was_fitted_on_nothing_known(dense):
    (row,) = evaluate(str(dense()), ["builtin"], **SIZE).texts
    assert not row.fitted


def test_copies_that_looked_at_no_text_are_not_marked(dense, tmp_path):
    out = tmp_path / "out"
    upcycle.convert(str(dense()), out, method="copy", router="normal", seq_len=64)
    assert fitted_on(out) == set()
    card = (out / "README.md").read_text()
    assert "tokens that nothing was fitted on, in windows of 64.\n" in card


@pytest.mark.parametrize(
    ("router", "fitted"), [("text", {"text.txt", "builtin"}), ("random", set())]
)
def test_texts_of_experts_count_if_the_router_was_fitted_to_them(
    router, fitted, shelf, text, tmp_path
):
    upcycle.merge(
        [str(shelf / name) for name in ("m1", "m2")], tmp_path / "out", base=str(shelf / "base"),
        text={"m1": str(text), "m2": "builtin"}, router=router, check="none", seq_len=64,
        calibration_tokens=128,
    )  # fmt: skip
    assert fitted_on(tmp_path / "out") == fitted


def test_texts_of_training_count_too(split, tmp_path):
    copy = shutil.copytree(split, tmp_path / "copy")
    record = json.loads((copy / "upcycle.json").read_text())
    record["training"] = [training_run("hf:a/b+builtin"), training_run("hf:c")]
    (copy / "upcycle.json").write_text(json.dumps(record))
    assert fitted_on(copy) == fitted_on(split) | {"hf:a/b", "hf:c"}


@pytest.mark.parametrize("record", ["[]", "{}", '{"training": 5}', '{"plan": "x"}'])
def test_record_that_is_damaged_tells_nothing(tmp_path, record):
    (tmp_path / "upcycle.json").write_text(record)
    assert fitted_on(tmp_path) == set()


def test_record_that_is_no_json_is_an_error(tmp_path):
    (tmp_path / "upcycle.json").write_text("[" * 100_000)
    with pytest.raises(UpcycleError, match=r"upcycle\.json is not what upcycle writes"):
        fitted_on(tmp_path)


def test_identity_of_what_is_no_file():
    assert identity("hf:a/b") == "hf:a/b"
