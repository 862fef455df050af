"""The plan: what it will read, and what the run will put aside."""

import pytest
from safetensors.torch import load_file
from tiny import PLAIN_SPLIT

import upcycle
from upcycle.models.text import KINDS
from upcycle.models.workspace import Workspace

QUICK = {"calibration_tokens": 64, "seq_len": 64, "check": "none"}
ASIDE = {
    "neither": {},
    "sequential": {"sequential": True},
    "refit": {"compensate": "least_squares"},
    "both": {"sequential": True, "compensate": "least_squares", "keep_dense": [1]},
    "all matrices refit": {"compensate": "descent"},
    "all matrices learned": {"fit": "distillation", "compensate": "least_squares"},
    "repeated neurons": {"split": "sharing_inner"},
    "gradients": {"shared_by": "taylor"},
    "both in bfloat16": {
        "sequential": True, "compensate": "least_squares", "dtype": "bfloat16",
    },
    "copies": {"method": "copy", "sequential": True},
    "pruned copies": {
        "method": "prune", "router": "membership", "top_k": 1, "compensate": "least_squares",
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("check", "seq_len", "windows"),
    [
        ("fast", 512, 2),
        ("fast", 1024, 2),  # built-in probes are short, so windows are of 512 at most
        ("fast", 64, 16),
        ("fast", 1000, 2),
        ("fast", 300, 4),  # rounded up
        ("full", 512, 8),
        ("none", 512, 0),
    ],
)
def test_windows_of_each_kind_that_the_check_reads(dense, check, seq_len, windows):
    plan = upcycle.plan(str(dense()), check=check, seq_len=seq_len, calibration="builtin")
    assert plan.check_windows == windows
    assert plan.held_tokens == len(KINDS) * windows * min(512, seq_len)


def test_every_text_gives_a_sequence(dense):
    asked = {"calibration": "builtin+self", "calibration_tokens": 64, "seq_len": 64}
    assert upcycle.plan(str(dense()), **asked).fit_tokens == 128


@pytest.mark.parametrize(
    "settings",
    [*ASIDE.values(), {"sequential": True, "dtype": "bfloat16"}],
    ids=[*ASIDE, "sequential in bfloat16"],
)
def test_room_for_what_is_put_aside_is_counted(dense, tmp_path, monkeypatch, settings):
    put_aside = []

    def look(workspace, **_):
        for path in (workspace.folder / "aside").glob("*"):
            put_aside.extend(load_file(path).values())

    monkeypatch.setattr(Workspace, "publish", look)
    settings = PLAIN_SPLIT | QUICK | settings
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.aside_bytes() == sum(tensor.nbytes for tensor in put_aside)
