"""benchmarks/gpu.py on a CPU, its tiny sizes: what it writes has all that a GPU's numbers need."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks/gpu.py"


def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", module)  # where dataclasses look for its names
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gpu(monkeypatch):
    """The script, whose steps run in this process: seven that each import torch would take half a
    minute."""
    module = script(monkeypatch)

    def here(python, step, arguments, left):
        return json.loads(json.dumps(module.run_step(step, arguments)))

    monkeypatch.setattr(module, "in_process", here)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    return module


def test_it_converts_and_times_a_tiny_model(gpu, tmp_path, capsys):
    """(Two conversions and nine timings take seconds.)"""
    gpu.main(["--tiny", "--out", str(tmp_path / "scratch"), "--json", str(tmp_path / "gpu.json")])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["seeds"] == [0]
    assert found["command"][:2] == ["python", "benchmarks/gpu.py"]
    assert {"commit", "date", "machine", "versions", "shape"} <= found.keys()
    split, copies = found["conversions"]
    assert (split["target"], copies["target"]) == ("qwen2_moe", "mixtral")
    for row in found["conversions"]:
        assert row["minutes"] == pytest.approx(row["seconds"] * 4 / 60)
        assert row["host_gb"] > 0
    places = [(row["model"], row["batch"]) for row in found["speed"]]
    assert places == [(m, b) for m in ("dense", "split", "copies") for b in (1, 2)]
    dense, split = found["speed"][0], found["speed"][2]
    assert split["decode, x dense"] == split["decode"] / dense["decode"]
    assert found["left out"] == []
    assert not (tmp_path / "scratch").exists()
    assert "the whole model: within the bounds" in capsys.readouterr().out


def test_what_fails_or_is_too_late_is_left_out_by_name(gpu, tmp_path, monkeypatch):
    def here(python, step, arguments, left):
        if step == "dense":
            return [{"parameters": 1}]
        if step == "convert":
            return "no room" if "split" in arguments else [dict.fromkeys(gpu.BOUNDS, 0)]
        return [{"batch": 1, "prefill": 2.0, "decode": 3.0}, {"batch": 8, "why": "out of memory"}]

    monkeypatch.setattr(gpu, "in_process", here)
    clock = gpu.Clock(tmp_path, gpu.TINY, "cpu", time.monotonic() + 60)
    clock.measure(vllm="a python")
    assert clock.tables["left out"] == [
        {"step": "convert: split", "why": "no room"},
        *(
            {"step": f"{runtime}: {model}", "batch": 8, "why": "out of memory"}
            for runtime in ("transformers", "vLLM")
            for model in ("dense", "copies")
        ),
    ]
    assert [row["model"] for row in clock.tables["speed"]] == ["dense", "copies"] * 2


def test_a_step_that_has_no_time_does_not_begin(monkeypatch):
    assert script(monkeypatch).in_process("nowhere", "dense", [], 1) == "left out: no time"


def test_the_shell_script_is_one():
    subprocess.run(["bash", "-n", SCRIPT.with_suffix(".sh")], check=True)
