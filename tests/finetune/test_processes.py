"""Training by several processes: the same losses as by one."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, PartialState
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from reference import gap, load, logits, weights
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

import upcycle
from upcycle.cli import app
from upcycle.finetune import loop
from upcycle.finetune.run import finetune

SETTINGS = {
    "preset": "heal", "steps": 3, "seq_len": 32, "batch_size": 4, "micro_batch": 1,
    "validation_tokens": 160, "lr": 1e-3, "balance": 0.1, "next_token": 0.5, "seed": 3,
    "router_losses": {"cv2": 0.1, "adaptive_balance": 1}, "gating": "noisy_top_k",
}  # fmt: skip
DEVICE_LEFT_OPEN = [
    *"--recipe heal --steps 3 --seq-len 32 --batch-size 4 --set micro_batch=1 --lr 1e-3".split(),
    *"--balance 0.1 --set next_token=0.5 --seed 3 --set validation_tokens=160".split(),
    *"--set router_losses.cv2=0.1 --set router_losses.adaptive_balance=1".split(),
    *"--set gating=noisy_top_k".split(),
]
FLAGS = [*DEVICE_LEFT_OPEN, "--device", "cpu"]
CONFIGS = Path(upcycle.__file__).parent / "recipes" / "accelerate"


def free_port():
    with socket.socket() as one:
        one.bind(("", 0))
        return one.getsockname()[1]


def launch(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the CPU by itself
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def ddp(*arguments):
    # It finds a port of its own: one that was free a moment ago may be another test's by now.
    processes = "torch.distributed.run --standalone --nproc_per_node 2 -m upcycle finetune".split()
    return launch(*processes, *arguments)


@pytest.fixture(scope="module")
def model(dense, moe):
    return moe(dense(), target="qwen2_moe", shared=0.25)


@pytest.fixture(scope="module")
def alone(model, text, tmp_path_factory):
    """The same run in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    return finetune(str(model), out, data=str(text), **SETTINGS)


def check_same(alone, code, stdout, stderr, out):
    """Of a run by --json and its log."""
    assert code == 0, stderr[-3000:]
    assert stdout.count("\n") == 1
    printed = json.loads(stdout)
    assert printed["processes"] == 2
    exact = alone.settings.precision is None
    if exact:
        check_log(alone, out)
    else:  # later steps depend on how gradients were rounded
        check_log(alone, out, slice(2), 1e-2)
    assert printed["before"] == pytest.approx(alone.before, rel=1e-4)
    assert weights(out).keys() == weights(alone.out).keys()
    assert not exact or gap(logits(load(out)), logits(load(alone.out))) < 1e-2
    assert {path.name for path in out.parent.iterdir()} == {"out"}


def check_log(alone, out, part=slice(None), tolerance=1e-4):
    log = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == len(alone.log)
    for row, expected in zip(log[part], alone.log[part], strict=True):
        assert row.keys() == expected.keys()
        about = [[alarm["about"] for alarm in r.get("alarms", ())] for r in (row, expected)]
        assert about[0] == about[1]
        for name in row.keys() - {"tokens_per_second", "alarms"}:
            assert row[name] == pytest.approx(expected[name], rel=tolerance), name


def test_data_parallel_processes_learn_the_same(model, text, alone, tmp_path):
    """Also from the teacher's predictions, of which each stores its part: all words of each."""
    out, kept = tmp_path / "out", ["--set", "teacher_top_k=300"]
    done = ddp(model, "--data", text, "-o", out, *DEVICE_LEFT_OPEN, *kept, "--json")
    check_same(alone, done.returncode, done.stdout, done.stderr, out)


def forked(tmp_path, act):
    """What `act(rank)` returns in each of two processes that know each other, as torchrun would
    start them; no module is imported again."""
    port, children = free_port(), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(100)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate sets the number of threads
                AcceleratorState._reset_state(reset_partial_state=True)
                (tmp_path / f"{rank}.json").write_text(json.dumps(act(rank)))
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    results = [tmp_path / f"{rank}.json" for rank in range(2)]
    said = [json.loads(path.read_text()) for path in results]
    for path in results:
        path.unlink()
    return said


def command(*arguments):
    """A command's exit code and streams."""
    result = CliRunner().invoke(app, ["finetune", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def sharded(precision="no"):
    """Make of this process one of `accelerate launch --config_file fsdp2.yaml`.

    On a CPU accelerate ignores that config in silence and copies the model to every process: FSDP
    is for accelerators alone, so it must be told that these are some.
    """
    fields = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    os.environ |= {name.upper(): str(value) for name, value in fields["fsdp_config"].items()}
    os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": precision}
    start = PartialState.__init__

    def accelerated(self, *args, **options):
        start(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = accelerated
    take_up = loop._take_up

    def check(setup, progress):
        assert setup.accelerator.distributed_type == DistributedType.FSDP
        assert all(isinstance(p, DTensor) for p in setup.plain.parameters())
        take_up(setup, progress)

    loop._take_up = check


SHARDED = {
    "plain": ("no", [], {}),
    "bf16": ("bf16", [], {"precision": "bf16"}),
    "all at once": (
        "no",
        """
        --set dense_router_gradient=true --set gradient_checkpointing=true --set match_layers=0.1
        """.split(),
        {"dense_router_gradient": True, "gradient_checkpointing": True, "match_layers": 0.1},
    ),
    "low-rank": ("no", ["--lora", "2", "--merge"], {"lora": 2, "merge": True}),
}


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_processes_learn_the_same(model, text, tmp_path, kind):
    precision, flags, settings = SHARDED[kind]
    out = tmp_path / "sharded" / "out"
    flags = [model, "--data", text, "-o", out, *FLAGS, *flags, "--json"]

    def act(rank):
        sharded(precision)
        return command(*flags)

    first, second = forked(tmp_path, act)
    assert second == [0, "", ""], first[2]
    alone = finetune(str(model), tmp_path / "alone", data=str(text), **SETTINGS | settings)
    check_same(alone, *first, out)


def test_sharded_weights_of_two_dtypes_are_refused(model, text, tmp_path):
    flags = [model, "--data", text, "-o", tmp_path / "out", *FLAGS, "--set", "dtype=bfloat16"]

    def act(rank):
        sharded()
        return command(*flags)

    first, second = forked(tmp_path, act)
    assert first[0] == second[0] == 2
    assert "--dtype bfloat16 with FSDP" in first[2]
    assert not list(tmp_path.iterdir())


def test_only_one_process_says_what_is_wrong(model, text, tmp_path):
    flags = [model, "--data", text, "-o", tmp_path / "out", *FLAGS, "--batch-size", "3"]
    first, second = forked(tmp_path, lambda rank: command(*flags))
    assert first[2].startswith("error: --batch-size 3 is not a multiple of 2")
    assert first[2].count("\n") == 1
    assert second == [2, "", ""]
    assert not list(tmp_path.iterdir())


def test_an_interrupt_of_one_process_stops_all_and_all_go_on(model, text, alone, tmp_path):
    out, step = tmp_path / "out", loop.take_step
    flags = [model, "--data", text, "-o", out, *FLAGS]

    def interrupted(rank):
        def stop_second(setup, number):
            if (rank, number) == (1, 1):
                signal.raise_signal(signal.SIGTERM)
            return step(setup, number)

        loop.take_step = stop_second
        return command(*flags)

    first, second = forked(tmp_path, interrupted)
    assert (first[0], second[0]) == (1, 1)
    assert "--resume goes on" in first[2]
    assert second[2] == ""
    assert not out.exists()
    first, second = forked(tmp_path, lambda rank: command(*flags, "--resume", "--json"))
    assert second == [0, "", ""]
    assert json.loads(first[1])["steps"] == 3
    check_log(alone, out)


def as_launched(monkeypatch, *flags):
    """Give this process the environment of `accelerate launch` without several GPUs."""
    arguments = launch_command_parser().parse_args([*flags, "-m", "upcycle", "finetune"])
    arguments, _, _ = _validate_launch_command(arguments)
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("cpu", [[], ["--cpu"]])
def test_one_process_of_several_that_were_asked_for_is_refused(
    model, text, tmp_path, monkeypatch, cpu
):
    as_launched(monkeypatch, "--num_processes", "2", *cpu)
    code, _, error = command(model, "--data", text, "-o", tmp_path / "out", *DEVICE_LEFT_OPEN)
    assert code == 2
    assert error.count("\n") == 1
    assert "torchrun --nproc_per_node N -m upcycle finetune … --device cpu" in error
    assert not list(tmp_path.iterdir())


def test_one_process_that_was_asked_for_trains(model, text, alone, tmp_path, monkeypatch):
    as_launched(monkeypatch, "--num_processes", "1")
    out = tmp_path / "out"
    code, _, error = command(model, "--data", text, "-o", out, *DEVICE_LEFT_OPEN)
    assert code == 0, error
    check_log(alone, out)


def test_more_processes_than_gpus_are_refused(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    code, _, error = command(model, "--data", text, "-o", tmp_path / "out", *DEVICE_LEFT_OPEN)
    assert code == 2
    assert "2 processes were started, but torch sees 1 GPUs here" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_shipped_configs_are_what_accelerate_reads(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.mixed_precision == "bf16"
    assert config.num_processes > 1
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
