"""The estimate of a conversion's memory, against what processes of their own took."""

import json
import subprocess
import sys

import psutil
import pytest
import torch
from reference import load

import upcycle
from upcycle.conversion.memory import peak_bytes
from upcycle.core.machine import peak_memory
from upcycle.models.opening import open_source

CLOSE = 1.4
"""Of an estimate over what was measured: the interpreter differs between machines and runs, too."""

QUICK = {"calibration": "builtin", "calibration_tokens": 1024, "check": "none"}
PHASES = {
    "damage": ({"vocab_size": 40000, "dtype": torch.bfloat16}, {"active": 0.5}),
    "trials of long sequences": (
        {"vocab_size": 60000, "max_position_embeddings": 2048},
        {"seq_len": 2048, "calibration_tokens": 8192},
    ),
    "trials of wide layers": (
        {"intermediate_size": 3072, "num_hidden_layers": 2},
        {"calibration_tokens": 3072},
    ),
    "gradients of predictions": (
        {"vocab_size": 60000, "hidden_size": 32},
        {"keep_dense": "none", "shared_by": "taylor"},
    ),
    "gradients in a layer": (
        {"intermediate_size": 5120, "num_hidden_layers": 1, "hidden_size": 256},
        {
            "recipe": "moebert",
            "keep_dense": "none",
            "calibration_tokens": 4096,
            "router": "normal",
        },
    ),
    "learning": (
        {"intermediate_size": 5120, "num_hidden_layers": 1, "hidden_size": 256},
        {
            "recipe": "ladimo",
            "split": "contiguous",
            "fit": {"name": "distillation", "epochs": 1},
            "calibration_tokens": 4096,
            "calibration": "builtin",
        },
    ),
    "refit": (
        {"intermediate_size": 4096, "num_hidden_layers": 1},
        {"keep_dense": "none", "calibration_tokens": 5120},
    ),
    "refit on few tokens": (
        {"intermediate_size": 8192, "num_hidden_layers": 1},
        {"keep_dense": "none", "calibration_tokens": 5120},
    ),
    "pruned copies": (
        {"hidden_size": 512, "intermediate_size": 3072, "num_hidden_layers": 1},
        {"method": "prune", "experts": 24, "keep_dense": "none"},
    ),
    "embeddings": (
        {"hidden_size": 1024, "vocab_size": 60000},
        {"method": "copy", "experts": 2, "top_k": 2},
    ),
}
"""What the model and the request must be like for a phase to need the most."""


def measured(model, out, settings) -> int:
    """Peak resident bytes of a process that converts. (A shell stands between: across exec, a
    process keeps the peak of the one that forked it, which may have held whole models.)"""
    script = "import json, sys, upcycle; model, out, settings = sys.argv[1:]; "
    script += "print(upcycle.convert(model, out, **json.loads(settings)).peak_bytes)"
    command = [sys.executable, "-c", script, str(model), str(out), json.dumps(settings)]
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    run = subprocess.run([*shell, *command], check=True, capture_output=True, text=True)
    return int(run.stdout)


@pytest.mark.parametrize("phase", PHASES)
def test_estimate_is_a_little_above_what_is_measured(dense, tmp_path, phase):
    fields, settings = PHASES[phase]
    model, settings = dense(**fields), QUICK | settings
    estimate = peak_bytes(upcycle.plan(str(model), **settings))
    peak = measured(model, tmp_path / "out", settings)
    assert peak < estimate < CLOSE * peak, f"{estimate / peak:.2f} times {peak / 1e9:.3f} GB"


def test_layers_that_are_named_need_no_measuring(dense):
    model = str(dense(vocab_size=40000))
    named = peak_bytes(upcycle.plan(model, keep_dense=[0], **QUICK))
    assert named < peak_bytes(upcycle.plan(model, keep_dense="auto", **QUICK))


@pytest.mark.parametrize(
    ("split", "least"), [("coactivation_graph", 4 + 8 + 8), ("spectral", 4 + 3 * 8)]
)
def test_a_graph_of_all_neurons_is_counted(dense, split, least):
    """An edge holds its end and its weight, eight bytes each, beside the count of four; of a
    matrix there are its Laplacian and what the solver makes of it."""
    model = str(dense(intermediate_size=4096, num_hidden_layers=1))
    settings = QUICK | {"compensate": "none", "keep_dense": "none"}
    plans = [upcycle.plan(model, split=s, **settings) for s in (split, "random")]
    with_graph, without = map(peak_bytes, plans)
    assert with_graph - without >= least * 4096**2


def test_report_estimates_what_the_plan_did(dense, tmp_path):
    """By then the layers to keep dense are decided, as though nobody had measured them."""
    model = str(dense(vocab_size=40000))
    planned = peak_bytes(upcycle.plan(model, keep_dense="auto", **QUICK))
    upcycle.convert(model, tmp_path / "out", keep_dense="auto", **QUICK)
    report = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert report["plan"]["peak_memory_estimate"] == planned


def test_model_that_writes_its_own_text_is_held_whole(dense):
    model = str(dense(hidden_size=512, intermediate_size=4096, num_hidden_layers=12))
    settings = {"method": "copy", "router": "kmeans", "calibration_tokens": 512}
    plan = upcycle.plan(model, **settings)
    written = upcycle.plan(model, calibration="self", **settings)
    assert peak_bytes(written) > peak_bytes(plan)
    assert peak_bytes(written) > 4 * plan.params_dense


def test_peak_memory_is_what_was_held_at_once():
    held = torch.ones(2**26, dtype=torch.uint8)
    resident = psutil.Process().memory_info().rss
    assert len(held) < 0.99 * resident < peak_memory() < psutil.virtual_memory().total
    del held
    assert peak_memory() > 0.99 * resident


def test_a_latent_is_kept_in_place_of_keys_and_values(dense):
    """As transformers' cache holds it, whatever the heads are that are made from it."""
    source, model = open_source(str(dense("youtu"))), load(dense("youtu"))
    cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long)).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert kept == 5 * source.arch.num_layers * source.arch.cached
    assert source.arch.head_dim == model.model.layers[0].self_attn.qk_head_dim
