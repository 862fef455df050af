"""benchmarks/heal.py, without training anything: which cells it measures, and what it writes."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def heal(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import heal

    return heal


@pytest.fixture
def study(heal, monkeypatch, tmp_path):
    """Runs the script with commands that only say what they were; returns the cells' commands."""
    from command import Measured

    trained = []

    def finetune(*arguments):
        trained.append(arguments)
        out = Path(arguments[arguments.index("-o") + 1])
        out.mkdir(parents=True)
        run = {"before": {"perplexity": 40.0}, "after": {"perplexity": 30.0}, "seconds": 120}
        (out / "upcycle.json").write_text(json.dumps({"training": [run]}))
        return Measured({}, 90.0, 2_000_000_000)

    def evaluate(command, model, *arguments):
        if (tmp_path / "killed").exists():
            raise SystemExit
        ratio = 2.0 if model == "split" else 1.5
        return {"texts": [{"perplexity_ratio": ratio}, {"perplexity_ratio": ratio + 0.25}]}

    monkeypatch.setattr(heal, "measured", finetune)
    monkeypatch.setattr(heal, "upcycle", evaluate)

    def run(*arguments):
        trained.clear()
        fixed = "heal.py --dense dense --split split --data mix --text a/c4.txt --text b/code.txt"
        places = ["--out", tmp_path / "out", "--json", tmp_path / "study.json"]
        monkeypatch.setattr(sys, "argv", [*fixed.split(), *map(str, [*places, *arguments])])
        heal.main()
        return list(trained)

    return run


def test_cells_are_measured_once_and_written_in_the_form_of_results(study, tmp_path):
    from tables import Result

    grid = ["--ways", "heal", "temperature 2", "--tokens", 8192, 32768]
    assert study(*grid, "--cells", 2)[0][-4:] == ("--tokens", "8192", "--recipe", "heal")
    (second,) = study(*grid, "--cells", 1)
    assert second[-2:] == ("--set", "distill_temperature=2")
    (tmp_path / "killed").touch()
    with pytest.raises(SystemExit):
        study(*grid)
    (tmp_path / "killed").unlink()
    (tmp_path / "out/.temperature-2-32768.partial").mkdir()
    ((*_, way),) = study(*grid)  # the other one had only to be evaluated
    assert way == "distill_temperature=2"
    assert not study(*grid)
    result = Result.model_validate_json((tmp_path / "study.json").read_text())
    assert [row[:2] for row in result.rows] == [
        ["before", 0],
        ["heal", 8192], ["temperature 2", 8192], ["heal", 32768], ["temperature 2", 32768],
    ]  # fmt: skip
    assert list(result.columns)[2:4] == ["c4.txt", "code.txt"]
    assert result.rows[0][2:] == [2.0, 2.25, None, None, None, None]
    assert result.rows[1][2:] == [1.5, 1.75, 0.75, 2.0, 1.5, 2.0]
    for row in result.rows[3:]:  # of what was begun before nobody knows the cost
        assert row[2:] == [1.5, 1.75, 0.75, 2.0, None, None]
    assert "| temperature 2 | 8,192 | 1.500 | 1.750 | 0.75 | 2.0 | 1.5 | 2.00 |" in result.table()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name[0] != "."]


def test_flags_of_every_way_are_settings(heal):
    """As `finetune` takes them."""
    import yaml

    from upcycle.core.flags import TRAINING_FLAGS
    from upcycle.finetune.settings import load_training

    for way, words in heal.WAYS.items():
        settings, recipe, rest = {}, "heal", list(words)
        if way not in heal.WITHOUT_TEACHER:
            settings["teacher"] = "dense"
        while rest:
            flag = rest.pop(0)
            if flag == "--merge":
                settings["merge"] = True
            elif flag == "--recipe":
                recipe = rest.pop(0)
            elif flag == "--set":
                name, _, value = rest.pop(0).partition("=")
                settings[name] = yaml.safe_load(value)
            else:
                name = flag.removeprefix("--").replace("-", "_")
                assert name in TRAINING_FLAGS, way
                value = rest.pop(0)
                settings[name] = value if name == "train" else float(value)
        assert load_training(recipe, settings).teacher == settings.get("teacher"), way
