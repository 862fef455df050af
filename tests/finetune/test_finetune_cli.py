"""The command line of `upcycle finetune`."""

import json
import os
import re
import shutil
import signal

import pytest
from typer.testing import CliRunner

from upcycle.cli import app
from upcycle.core.settings import shipped_presets
from upcycle.models.workspace import partial_folder

QUICK = "--steps 2 --seq-len 32 --batch-size 2 --set validation_tokens=32 --lr 1e-3".split()


@pytest.fixture
def model(dense, moe):
    return moe(dense())


def run(*arguments, env=None):
    arguments = ["finetune", *map(str, arguments)]
    result = CliRunner().invoke(app, arguments, env=env or {})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def error(*arguments, code=2):
    result = run(*arguments)
    assert result.exit_code == code
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in result.stderr
    assert code != 2 or (result.stdout, len(lines)) == ("", 1)
    return lines[-1].removeprefix("error: ")


def test_help_names_the_presets():
    text = re.sub(r"\s+", " ", run("--help").output)
    named = ["heal", "specialise", "routers", "btx", "lora"]
    assert {*named} < {*shipped_presets()}
    assert " | ".join(named) in text


def test_json_is_one_object_and_nothing_else(model, text, tmp_path):
    result = run(model, "--data", text, "-o", tmp_path / "out", *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""
    printed = json.loads(result.stdout)
    assert printed["settings"]["validation_tokens"] == 32
    assert (printed["steps"], printed["tokens"]) == (2, 128)
    assert printed["out"] == str(tmp_path / "out")
    measured = {"loss", "perplexity", "perplexity_ratio", "kl"}
    assert measured == printed["before"].keys() == printed["after"].keys()


def test_tables_go_to_stdout_and_progress_to_stderr(model, text, tmp_path):
    result = run(model, "--data", text, "-o", tmp_path / "out", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "perplexity" in result.stdout
    assert "AutoModelForCausalLM" in result.stdout
    assert "step 0 of 2: validation loss" in result.stderr
    assert "the weights themselves, preset heal" in result.stderr + result.stdout


def test_a_run_that_brings_nothing_says_so_with_a_teacher_too(model, text, tmp_path):
    result = run(model, "--data", text, "-o", tmp_path / "out", *QUICK, "--lr", "1e-30")
    assert result.exit_code == 0, result.stderr
    assert "the state after step 0 of 2" in result.stdout
    assert "Training made it no better: lower --lr, or give more --tokens." in result.stdout


def test_a_dense_model_that_is_gone(dense, moe, text, tmp_path):
    copy = shutil.copytree(moe(dense()), tmp_path / "model")
    record = json.loads((copy / "upcycle.json").read_text())
    record["source"]["name"] = "../gone"
    (copy / "upcycle.json").write_text(json.dumps(record))
    assert error(copy, "--data", text, "-o", tmp_path / "out", *QUICK) == (
        "--distill 1 compares with a dense model, and what the model was made from is not known, "
        "or is not there: name it by --teacher DENSE, or give --distill 0"
    )


def test_how_much_of_a_text_is_used_is_said_and_recorded(model, text, tmp_path):
    result = run(model, "-o", tmp_path / "out", "--data", text, *QUICK)
    said = " ".join(result.stderr.split())
    (used,) = json.loads((tmp_path / "out" / "upcycle.json").read_text())["training"][-1]["used"]
    assert used["text"] == text.name
    assert used["total"] == pytest.approx(len(text.read_text()), rel=0.01)
    assert (
        f"{text.name}: {used['tokens']:,} of about {used['total']:,} tokens "
        f"({100 * used['tokens'] / used['total']:.2g} %) train, from all over it; "
        f"{used['held_out']:,} from its end validate."
    ) in said


def test_set_replaces_any_setting(model, text, tmp_path):
    sets = ["--set", "next_token=2.5", "--set", "clip=0.25", "--set", "train=router"]
    result = run(model, "-o", tmp_path / "out", "--data", text, *QUICK, *sets, "--json")
    settings = json.loads(result.stdout)["settings"]
    assert (settings["train"], settings["next_token"]) == ("router", 2.5)
    assert settings["clip"] == 0.25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "9"], "--tokens and --steps both"),
        (["--recipe", "hael"], "unknown recipe 'hael'"),
        (["--set", "leraning_rate=1"], "unknown setting 'leraning_rate'"),
        (["--set", "lr"], "--set 'lr' is not KEY=VALUE"),
        (["--data", "missing.txt"], "--data 'missing.txt' is not a file"),
        (["--data", "probe:code"], "is for --set validate_also=… alone"),
        (
            ["--set", "validate_also=x.txt"],
            "--set validate_also='x.txt' is not a file: give probes",
        ),
        (["--set", "router_losses.erc.alpha=0.5"], "router_losses.erc.weight is missing"),
        (["--data", "builtin*0+builtin"], "has 'builtin' count 0 times: leave it out"),
        (["--train", "routers"], "train='routers'"),
        (["--merge"], "give --lora RANK too"),
        (["--seq-len", "2048"], "--seq-len 2048 is more than the model's 1024 positions"),
        (["--set", "micro_batch=3"], "--batch-size 2 is not a multiple of 3"),
    ],
)
def test_bad_requests_end_with_one_sentence(model, tmp_path, flags, message):
    assert message in error(model, "-o", tmp_path / "out", *QUICK, *flags)
    assert not list(tmp_path.iterdir())


def test_a_folder_for_the_result_and_a_model_are_needed(model, dense, tmp_path):
    assert "-o OUT" in error(model)
    assert "convert" in error(dense(), "-o", tmp_path / "out", *QUICK)
    assert "no-such-model" in error("./no-such-model", "-o", tmp_path / "out", *QUICK)


def test_dense_model_of_that_name_is_another(model, dense, text, tmp_path):
    """As when a relative path is read from another folder."""
    other, copy = dense(rms_norm_eps=1e-3), shutil.copytree(model, tmp_path / "model")
    record = json.loads((copy / "upcycle.json").read_text())
    record["source"]["name"] = os.path.relpath(other, copy)
    (copy / "upcycle.json").write_text(json.dumps(record))
    request = [copy, "--recipe", "heal", "--data", text, "-o", tmp_path / "out", *QUICK]
    sentence = error(*request)
    assert (
        f"made from {os.path.relpath(other, copy)}, but what has that name now is another"
        in sentence
    )
    assert run(*request, "--teacher", other).exit_code == 0


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ("[", "it is not JSON"),
        ("[]", "=[]: "),
        ("{}", "out is missing"),
        ('{"training": null}', "training=None: "),
        ('{"training": [{"step": 3}]}', "training.0.model is missing"),
        ('{"out": "x", "plan": {"source": "x"}}', "plan.family is missing"),
    ],
)
def test_damaged_record(model, text, tmp_path, record, problem):
    copy = shutil.copytree(model, tmp_path / "model")
    (copy / "upcycle.json").write_text(record)
    sentence = error(copy, "--data", text, "-o", tmp_path / "out", *QUICK)
    assert sentence.startswith(f"{copy / 'upcycle.json'} is not what upcycle writes: {problem}")


def test_tracker_that_is_not_installed(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    request = [model, "--data", text, "-o", tmp_path / "out", *QUICK, "--set", "tracker=wandb"]
    assert error(*request) == "--set tracker=wandb is not installed: pip install wandb"


def test_an_interrupt_says_how_to_go_on(model, text, tmp_path, monkeypatch):
    from upcycle.finetune import loop

    out, step = tmp_path / "out", loop.take_step

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", interrupted)
        message = error(model, "--data", text, "-o", out, *QUICK, code=1)
    assert "--resume goes on" in message
    assert partial_folder(out).is_dir()
    assert not out.exists()
    result = run(model, "--data", text, "-o", out, *QUICK, "--resume")
    assert result.exit_code == 0, result.stderr
    assert "step 0 of 2" not in result.stderr
    assert "step 2 of 2" in result.stderr
    assert not partial_folder(out).exists()
