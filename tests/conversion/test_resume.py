"""A checkpoint is whole or absent: kills, interrupts, full disks, and the bytes that result."""

import errno
import hashlib
import json
import os
import shutil
import signal

import pytest
import torch
from processes import kill, killed
from reference import content
from safetensors.torch import load_file, save_file
from tiny import PLAIN_SPLIT
from typer.testing import CliRunner

import upcycle
from upcycle import AlreadyFinished, UpcycleError
from upcycle.cli import app
from upcycle.conversion import run as conversion
from upcycle.conversion import writing
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.core.machine import torch_threads
from upcycle.models.stream import HiddenStream
from upcycle.models.workspace import Workspace, partial_folder
from upcycle.models.writer import CheckpointWriter

SETTINGS = PLAIN_SPLIT | {
    "calibration_tokens": 128, "seq_len": 64, "max_shard_size": "100KB", "keep_dense": [1],
}  # fmt: skip
DEFAULT = {"calibration_tokens": 128, "seq_len": 64, "max_shard_size": "100KB"}
"""By the default recipe, which chooses the layers that stay dense and converts one on another."""
FLAGS = """
    --calibration-tokens 128 --seq-len 64 --set max_shard_size=100KB --keep-dense 1
    --experts 8 --top-k 2 --set split=coactivation --set compensate=none --set sequential=false
    --set router_spread=1e-4 --calibration builtin
""".split()


@pytest.fixture(autouse=True)
def short_check(monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)


@pytest.fixture(autouse=True)
def source_stays_as_it_is(dense):
    before = hashes(dense())
    yield
    assert hashes(dense()) == before


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture(scope="module")
def uninterrupted(dense, tmp_path_factory):
    """The bytes of a conversion that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHECK_TOKENS, "fast", 64)
        upcycle.convert(str(dense()), out, **SETTINGS)
    assert len(list(out.glob("*.safetensors"))) > 1
    return content(out)


def hashes(folder):
    """Of every file, those that lie in folders below too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).digest() for p in files}


def command(dense, out, *flags) -> tuple[int, str]:
    """The command line's exit code, and the last line that it prints on stderr."""
    arguments = ["convert", str(dense()), "-o", str(out), *FLAGS, *flags]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, SystemExit | None)
    return result.exit_code, result.stderr.splitlines()[-1]


# --- kills -----------------------------------------------------------------------------------


def kill_at_step(stage, step):
    def arrange(patch):
        def progress(at_stage, done, total):
            if (at_stage, done) == (stage, step):
                kill()

        return progress

    return arrange


def kill_in_tensor(number):
    """With a tensor in place that is wrong."""

    def arrange(patch):
        write, calls = CheckpointWriter.write, []

        def torn(self, name, tensor):
            calls.append(name)
            if len(calls) == number:
                write(self, name, torch.full_like(tensor, 7))
                kill()
            write(self, name, tensor)

        patch.setattr(CheckpointWriter, "write", torn)

    return arrange


def kill_in_journal(number):
    """With half a line written."""

    def arrange(patch):
        append, calls = Workspace._append, []

        def torn(self, entry):
            calls.append(entry)
            if len(calls) == number:
                line = json.dumps(entry)
                with (self.folder / "journal.jsonl").open("a") as journal:
                    journal.write(line[: len(line) // 2])
                kill()
            append(self, entry)

        patch.setattr(Workspace, "_append", torn)

    return arrange


def kill_before_publishing(patch):
    patch.setattr(Workspace, "publish", lambda *_, **__: kill())


MOMENTS = {
    "before layer 0": kill_at_step("converting layers", 0),
    "before layer 1": kill_at_step("converting layers", 1),
    "before layer 2": kill_at_step("converting layers", 2),
    "after the last layer": kill_at_step("converting layers", 3),
    "in the embeddings": kill_in_tensor(1),
    "in layer 0": kill_in_tensor(9),
    "in layer 2": kill_in_tensor(60),
    "in the journal's first line": kill_in_journal(1),
    "in the journal's line of layer 0": kill_in_journal(4),
    "in the check": kill_at_step("checking", 1),
    "before publishing": kill_before_publishing,
}


MOMENTS_BY_DEFAULT = {
    "while layers are measured": kill_at_step("measuring layers", 1),
    "before layer 0": kill_at_step("converting layers", 0),
    "in the first layer that is no longer dense": kill_in_tensor(60),
    "before layer 2": kill_at_step("converting layers", 2),
    "in the check": kill_at_step("checking", 1),
}
MOMENTS_BY_TAYLOR = {
    "on the way there": kill_at_step("backward pass", 1),
    "on the way back": kill_at_step("backward pass", 5),
    "while layers are measured": kill_at_step("measuring layers", 1),
    "before layer 2": kill_at_step("converting layers", 2),
}


def start_and_kill(dense, out, moment, *, base=SETTINGS, **settings) -> None:
    def act():
        with pytest.MonkeyPatch.context() as patch:
            progress = (MOMENTS | MOMENTS_BY_DEFAULT | MOMENTS_BY_TAYLOR)[moment](patch)
            upcycle.convert(str(dense()), out, progress=progress, **base | settings)

    dense()
    assert killed(act)
    assert not out.exists()
    assert partial_folder(out).is_dir()


@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_after_a_kill_gives_the_same_bytes(dense, out, uninterrupted, moment):
    start_and_kill(dense, out, moment)
    upcycle.convert(str(dense()), out, resume=True, **SETTINGS)
    assert content(out) == uninterrupted
    assert list(out.parent.iterdir()) == [out]


def test_resumed_after_many_kills_gives_the_same_bytes(dense, out, uninterrupted):
    moments = [
        "in the journal's first line", "in the embeddings", "before layer 0", "in layer 0",
        "before layer 1", "before layer 2", "after the last layer", "in the check",
        "before publishing",
    ]  # fmt: skip
    for moment in moments:
        start_and_kill(dense, out, moment, resume=True)
    upcycle.convert(str(dense()), out, resume=True, **SETTINGS)
    assert content(out) == uninterrupted


@pytest.mark.parametrize("moment", MOMENTS_BY_DEFAULT)
def test_the_default_recipe_resumed_after_a_kill_gives_the_same_bytes(
    dense, out, tmp_path_factory, moment
):
    start_and_kill(dense, out, moment, base=DEFAULT)
    other = tmp_path_factory.mktemp("other") / "out"
    for place in (out, other):
        upcycle.convert(str(dense()), place, resume=True, **DEFAULT)
    assert content(out) == content(other)
    assert list(out.parent.iterdir()) == [out]


TAYLOR = SETTINGS | {"shared_by": "taylor", "keep_dense": "auto"}
"""With a backward pass, and layers to keep dense that are measured by its gradients."""


@pytest.fixture(scope="module")
def uninterrupted_by_taylor(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("taylor") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHECK_TOKENS, "fast", 64)
        upcycle.convert(str(dense()), out, **TAYLOR)
    return content(out)


@pytest.mark.parametrize("moment", MOMENTS_BY_TAYLOR)
def test_a_run_with_a_backward_pass_resumed_after_a_kill_gives_the_same_bytes(
    dense, out, uninterrupted_by_taylor, moment
):
    start_and_kill(dense, out, moment, base=TAYLOR)
    upcycle.convert(str(dense()), out, resume=True, **TAYLOR)
    assert content(out) == uninterrupted_by_taylor
    assert list(out.parent.iterdir()) == [out]


def test_a_finished_backward_pass_is_not_repeated(dense, out, monkeypatch):
    start_and_kill(dense, out, "before layer 2", base=TAYLOR)
    monkeypatch.setattr(HiddenStream, "to_loss", lambda *_: pytest.fail("went back again"))
    upcycle.convert(str(dense()), out, resume=True, **TAYLOR)


LEARNING = {
    "learns split and router": {"fit": "transport", "top_k": 3},
    "learns weights, then refits them": {
        "fit": "distillation", "compensate": "least_squares", "sequential": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", LEARNING.values(), ids=LEARNING)
def test_a_run_that_learns_resumed_after_a_kill_in_a_layer_gives_the_same_bytes(
    dense, out, tmp_path_factory, monkeypatch, settings
):
    monkeypatch.setattr("upcycle.conversion.fit.learn.BATCH", 32)
    learning = SETTINGS | {"keep_dense": []} | settings

    def progress(stage, done, total):
        if stage == "learning" and done > total / 3:  # in the second of three layers
            kill()

    def act():
        upcycle.convert(str(dense()), out, progress=progress, **learning)

    dense()
    assert killed(act)
    assert (partial_folder(out) / "aside" / "layer 0.safetensors").is_file()
    other = tmp_path_factory.mktemp("other") / "out"
    for place in (out, other):
        upcycle.convert(str(dense()), place, resume=True, **learning)
    assert content(out) == content(other)
    assert all(layer["fit"] for layer in json.loads((out / "upcycle.json").read_text())["layers"])


def test_resuming_does_not_repeat_finished_layers(dense, out, monkeypatch):
    start_and_kill(dense, out, "before layer 2")
    layers, convert_layer = [], writing.convert_layer
    monkeypatch.setattr(
        writing,
        "convert_layer",
        lambda p, i, *rest: layers.append(i) or convert_layer(p, i, *rest),
    )
    upcycle.convert(str(dense()), out, resume=True, **SETTINGS)
    assert layers == [2]


def test_copies_resume_too(dense, out, tmp_path_factory):
    request = {"method": "drop", "experts": 2}
    start_and_kill(dense, out, "before layer 2", keep_dense=[], **request)
    other = tmp_path_factory.mktemp("other") / "out"
    for place in (out, other):
        upcycle.convert(str(dense()), place, resume=True, **SETTINGS | {"keep_dense": []} | request)
    assert content(out) == content(other)


def test_without_resume_a_killed_run_is_begun_anew(dense, out, uninterrupted):
    start_and_kill(dense, out, "before layer 1")
    steps = []
    upcycle.convert(str(dense()), out, progress=lambda *step: steps.append(step), **SETTINGS)
    assert content(out) == uninterrupted
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("recipe", [{}, {"compensate": "least_squares", "sequential": True}])
def test_another_request_can_not_resume(dense, out, recipe):
    start_and_kill(dense, out, "before layer 1", **recipe)
    left = hashes(partial_folder(out))
    with pytest.raises(UpcycleError, match="begun with another source, text, recipe or version"):
        upcycle.convert(str(dense()), out, resume=True, **SETTINGS | recipe, seed=1)
    code, sentence = command(dense, out, "--resume", "--seed", "1")
    assert code == 2
    assert "repeat that request, or drop --resume to start anew" in sentence
    assert hashes(partial_folder(out)) == left


def test_another_text_of_the_same_name_can_not_resume(dense, out, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("one thing and another\n" * 400)
    request = {"calibration": str(text), "router": "centroid"}
    start_and_kill(dense, out, "before layer 1", **request)
    text.write_text("something else\n" * 400)
    with pytest.raises(UpcycleError, match="begun with another source, text, recipe or version"):
        upcycle.convert(str(dense()), out, resume=True, **SETTINGS | request)


def change_a_byte(folder, name) -> None:
    """Of a tensor, in place; the file keeps its times."""
    for path in folder.glob("*.safetensors"):
        times = path.stat()
        tensors = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[-1] *= -1
            save_file(tensors, path, metadata={"format": "pt"})
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_source_that_changed_after_a_kill_can_not_resume(dense, out, tmp_path):
    """However little, and in whichever layer."""
    source = shutil.copytree(dense(), tmp_path / "source")
    start_and_kill(lambda: source, out, "before layer 1", check="none")
    change_a_byte(source, "model.layers.2.mlp.up_proj.weight")
    with pytest.raises(UpcycleError, match="begun with another source, text, recipe or version"):
        upcycle.convert(str(source), out, resume=True, **SETTINGS, check="none")
    change_a_byte(source, "model.layers.2.mlp.up_proj.weight")
    upcycle.convert(str(source), out, resume=True, **SETTINGS, check="none")


@pytest.mark.parametrize(
    ("settings", "at", "changed"),
    [
        ({"check": "none"}, 0, 2),
        ({"method": "copy", "keep_dense": [], "check": "none"}, 0, 2),
        ({"check": "fast"}, 2, 0),
    ],
    ids=["split, before its layer is read", "copies", "before the check reads it again"],
)
def test_source_that_changes_while_it_is_converted_is_noticed(
    dense, out, tmp_path, monkeypatch, settings, at, changed
):
    source = shutil.copytree(dense(), tmp_path / "source")
    name = f"model.layers.{changed}.mlp.up_proj.weight"
    at_layer(monkeypatch, at, lambda: change_a_byte(source, name))
    with pytest.raises(UpcycleError, match=f"{name} in .* changed while it was read"):
        upcycle.convert(str(source), out, **SETTINGS | settings)
    assert not out.exists()


# --- the end of a run ------------------------------------------------------------------------


def test_resuming_a_finished_run_says_so_and_changes_nothing(dense, out):
    upcycle.convert(str(dense()), out, resume=True, **SETTINGS)
    before = hashes(out)
    for overwrite in (False, True):
        with pytest.raises(AlreadyFinished, match="out is the finished result of this run"):
            upcycle.convert(str(dense()), out, resume=True, overwrite=overwrite, **SETTINGS)
    assert hashes(out) == before
    assert list(out.parent.iterdir()) == [out]


def test_loop_around_resume_ends(dense, out):
    arguments = ["convert", str(dense()), "-o", str(out), *FLAGS, "--check", "none", "--resume"]
    first, second = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert (first.exit_code, second.exit_code) == (0, 0)
    sentence = f"{out} is the finished result of this run: nothing is left to do\n"
    assert second.stdout == sentence
    printed = CliRunner().invoke(app, [*arguments, "--json"])
    assert printed.exit_code == 0
    assert json.loads(printed.stdout) == json.loads((out / "upcycle.json").read_text())


def test_resuming_beside_the_result_of_another_request_is_refused(dense, out):
    upcycle.convert(str(dense()), out, **SETTINGS)
    before = hashes(out)
    code, sentence = command(dense, out, "--resume", "--seed", "1")
    assert code == 2
    assert "exists and is not empty: choose another, or --overwrite" in sentence
    assert hashes(out) == before
    assert command(dense, out, "--resume", "--seed", "1", "--overwrite")[0] == 0
    assert hashes(out) != before


# --- threads ---------------------------------------------------------------------------------


def test_resume_goes_on_with_the_threads_that_the_run_began_with(
    dense, out, monkeypatch, threads_asked_for
):
    """Sums are dealt out among them, so that their number shows in the bytes."""
    request = SETTINGS | {"check": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3)
        start_and_kill(dense, out, "before layer 1", check="none")
    upcycle.convert(str(dense()), out, resume=True, **request)
    assert json.loads((out / "upcycle.json").read_text())["run"]["threads"] == 3
    with pytest.raises(AlreadyFinished):
        upcycle.convert(str(dense()), out, resume=True, **request)
    upcycle.convert(str(dense()), out, overwrite=True, **request)
    assert json.loads((out / "upcycle.json").read_text())["run"]["threads"] == 1
    assert threads_asked_for == [3, 1]


def test_threads_are_those_of_before_after_a_run():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- interrupts and failures -----------------------------------------------------------------


def at_layer(monkeypatch, layer, act) -> None:
    """Arranges for something to happen while the layer is converted."""
    convert_layer = writing.convert_layer

    def convert(plan, at, *rest):
        if at == layer:
            act()
        return convert_layer(plan, at, *rest)

    monkeypatch.setattr(writing, "convert_layer", convert)


def fail():
    raise RuntimeError("broken")


@pytest.fixture
def signals_as_on_a_terminal():
    """A shell that starts the tests in the background has them ignore SIGINT."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    former = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(numbers, former, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_as_on_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(dense, out, monkeypatch, number):
    at_layer(monkeypatch, 2, lambda: signal.raise_signal(number))
    code, sentence = command(dense, out)
    assert code == 1
    assert sentence.startswith("error: interrupted; nothing was left behind")
    assert list(out.parent.iterdir()) == []


@pytest.mark.usefixtures("signals_as_on_a_terminal")
def test_interrupt_of_a_resumable_run_keeps_what_is_done(dense, out, uninterrupted):
    with pytest.MonkeyPatch.context() as patch:
        at_layer(patch, 2, lambda: signal.raise_signal(signal.SIGINT))
        code, _ = command(dense, out, "--resume")
    assert code == 1
    assert list(out.parent.iterdir()) == [partial_folder(out)]
    upcycle.convert(str(dense()), out, resume=True, **SETTINGS)
    assert content(out) == uninterrupted


@pytest.mark.parametrize("resume", [False, True])
def test_failure_keeps_the_finished_layers_only_if_resumable(dense, out, monkeypatch, resume):
    at_layer(monkeypatch, 2, fail)
    with pytest.raises(RuntimeError, match="broken"):
        upcycle.convert(str(dense()), out, resume=resume, **SETTINGS)
    assert list(out.parent.iterdir()) == ([partial_folder(out)] if resume else [])


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "name"),
    [(CheckpointWriter, "write"), (os, "posix_fallocate"), (Workspace, "done")],
)
def test_full_disk_leaves_nothing_and_says_so(dense, out, monkeypatch, place, name):
    monkeypatch.setattr(place, name, disk_full, raising=False)
    assert command(dense, out) == (1, "error: No space left on device")
    assert list(out.parent.iterdir()) == []


def test_full_disk_at_the_first_moment_leaves_nothing(dense, out, monkeypatch):
    monkeypatch.setattr(Workspace, "_append", disk_full)
    sentence = f"error: can't write beside {out}: No space left on device"
    assert command(dense, out) == (2, sentence)
    assert list(out.parent.iterdir()) == []


def test_full_disk_at_the_last_moment_leaves_nothing(dense, out, monkeypatch):
    monkeypatch.setattr(conversion, "conversion_record", disk_full)
    assert command(dense, out) == (1, "error: No space left on device")
    assert list(out.parent.iterdir()) == []


# --- overwriting -----------------------------------------------------------------------------


def test_former_result_stays_until_the_new_one_is_whole(dense, out, uninterrupted):
    upcycle.convert(str(dense()), out, **SETTINGS)
    seen = []

    def watch(stage, done, total):
        seen.append(stage)
        assert content(out) == uninterrupted

    upcycle.convert(str(dense()), out, overwrite=True, progress=watch, **SETTINGS, seed=1)
    assert {"converting layers", "checking"} == set(seen)
    assert content(out) != uninterrupted
    assert list(out.parent.iterdir()) == [out]


def test_failing_run_keeps_the_former_result(dense, out, uninterrupted, monkeypatch):
    upcycle.convert(str(dense()), out, **SETTINGS)
    monkeypatch.setattr(CheckpointWriter, "write", disk_full)
    assert command(dense, out, "--overwrite")[0] == 1
    assert content(out) == uninterrupted
    assert list(out.parent.iterdir()) == [out]


# --- bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "drop", "experts": 2, "keep_dense": []},
        {"split": "parameter_clustering", "router": "kmeans"},
        {"calibration": "self", "check": "none"},
    ],
)
def test_same_seed_same_bytes_other_seed_other_bytes(dense, tmp_path, settings):
    contents = []
    for number, seed in enumerate((0, 0, 1)):
        place = tmp_path / str(number)
        upcycle.convert(str(dense()), place, **SETTINGS | settings, seed=seed)
        contents.append({p.name: p.read_bytes() for p in place.glob("*.safetensors")})
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_tokenizer_and_licence_files_are_copied_byte_for_byte(dense, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in dense().iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    extra = {"LICENSE": b"mine\r\n", "merges.txt": b"\xff\x00", "chat_template.jinja": b"{{ x }}"}
    extra["additional_chat_templates/tool_use.jinja"] = b"{{ y }}"
    (source / "additional_chat_templates").mkdir()
    for name, content_ in extra.items():
        (source / name).write_bytes(content_)
    upcycle.convert(str(source), tmp_path / "out", check="none", **SETTINGS)
    names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", *extra}
    assert all((tmp_path / "out" / n).read_bytes() == (source / n).read_bytes() for n in names)
