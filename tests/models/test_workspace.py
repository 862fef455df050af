"""A folder that grows beside its place, with a journal, and appears at once."""

import errno
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
from processes import kill
from processes import killed as killed_process

from upcycle import AlreadyFinished, UpcycleError
from upcycle.models import workspace as publishing
from upcycle.models.record.file import Identity
from upcycle.models.workspace import (
    JOURNAL,
    Workspace,
    check_out,
    check_replaceable,
    check_unfinished,
    partial_folder,
)

# --- the folder ------------------------------------------------------------------------------


@pytest.fixture
def out(tmp_path):
    return tmp_path / "place" / "out"


def begin(out, fingerprint="a", *, resume=False) -> Workspace:
    return Workspace(out, Identity(fingerprint, 1), resume=resume)


def killed(workspace) -> Workspace:
    """As it is once its process is gone."""
    os.close(workspace._lock)
    return workspace


def publish(out, content, *, overwrite=False):
    workspace = begin(out)
    (workspace.result / "content").write_text(content)
    workspace.publish(overwrite=overwrite)


def test_folder_grows_beside_its_place(out):
    workspace = begin(out)
    assert workspace.folder == out.parent / ".out.partial"
    assert not out.exists()


def test_published_folder_holds_no_journal(out):
    publish(out, "new")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["content"]


def test_publishing_replaces_an_empty_folder(out):
    out.mkdir(parents=True)
    publish(out, "new")
    assert (out / "content").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_publishing_overwrites_when_asked(out):
    publish(out, "old")
    (out / "stale").write_text("x")
    publish(out, "new", overwrite=True)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"content": "new"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_publishing_spares_what_appeared_meanwhile(out):
    workspace = begin(out, resume=True)
    workspace.done("layer 0", {})
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(UpcycleError, match="out appeared meanwhile: pass `overwrite`"):
        workspace.publish(overwrite=False)
    assert (out / "mine").read_text() == "x"
    workspace.abandon()
    assert "layer 0" in begin(out, resume=True).records


@pytest.fixture(params=["one step", "two steps"])
def exchange(request, monkeypatch):
    """With and without a system that lets two folders change places at once."""
    if request.param == "two steps":
        monkeypatch.setattr(publishing, "_swapped", lambda one, other: False)


def renames(monkeypatch, act):
    """Has something happen at every rename, by its number from 1, after it is done."""
    rename, done = Path.rename, []

    def renamed(self, to):
        done.append(rename(self, to))
        act(len(done))
        return done[-1]

    monkeypatch.setattr(Path, "rename", renamed)


@pytest.mark.usefixtures("exchange")
def test_publishing_overwrites_in_one_step_or_two(out):
    publish(out, "old")
    publish(out, "new", overwrite=True)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"content": "new"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs renameat2")
def test_linux_lets_two_folders_change_places(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert publishing._swapped(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()
    assert not publishing._swapped(tmp_path / "one", tmp_path / "absent")


@pytest.mark.parametrize("failing", [OSError("no"), KeyboardInterrupt()])
def test_publishing_that_fails_keeps_what_was_there(out, monkeypatch, failing):
    rename = Path.rename

    def fail(self, to):
        if self.name == "result":
            raise failing
        return rename(self, to)

    publish(out, "old")
    monkeypatch.setattr(publishing, "_swapped", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(type(failing)):
        publish(out, "new", overwrite=True)
    assert (out / "content").read_text() == "old"


@pytest.mark.parametrize("resume", [False, True])
def test_run_killed_between_two_renames_leaves_the_former_result_to_the_next(
    out, monkeypatch, resume
):
    publish(out, "old")
    monkeypatch.setattr(publishing, "_swapped", lambda one, other: False)

    def publish_and_die():
        renames(monkeypatch, lambda number: kill() if number == 1 else None)
        publish(out, "new", overwrite=True)

    assert killed_process(publish_and_die)
    assert not out.exists()
    with pytest.raises(UpcycleError, match="exists and is not empty"):
        check_replaceable(out, overwrite=False)
    again = begin(out, resume=resume)
    assert (out / "content").read_text() == "old"
    assert (again.result / "content").exists() is resume
    again.abandon()


def test_run_killed_after_publishing_is_not_mistaken_for_one_to_resume(out):
    workspace = begin(out)
    (workspace.result / "upcycle.json").write_text(json.dumps({"run": asdict(workspace.run)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "_remove", lambda folder: None)
        workspace.publish(overwrite=False)
    assert partial_folder(out).exists()
    (partial_folder(out) / "result").mkdir()  # the former result, after an exchange
    (partial_folder(out) / "result" / "content").write_text("old")
    with pytest.raises(AlreadyFinished, match="out is the finished result of this run"):
        check_unfinished(out, workspace.run, overwrite=False)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_next_request_starts_anew_beside_what_a_published_run_left(out):
    workspace = begin(out)
    (workspace.result / "upcycle.json").write_text(json.dumps({"run": asdict(workspace.run)}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publishing, "_remove", lambda folder: None)
        workspace.publish(overwrite=False)
    (partial_folder(out) / "left").touch()
    begin(out, "b", resume=True)
    assert sorted(path.name for path in partial_folder(out).iterdir()) == [JOURNAL, "result"]


# --- what is others' -------------------------------------------------------------------------


def test_link_in_the_place_of_the_workspace_is_refused(out, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    out.parent.mkdir()
    partial_folder(out).symlink_to(victim)
    for act in (begin, partial(check_out, source=tmp_path / "source", size=1, overwrite=True)):
        with pytest.raises(UpcycleError, match=r"\.out\.partial is a link, where a run would put"):
            act(out)
    assert [path.name for path in victim.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    "files",
    [
        {"thesis.txt": "precious"},
        {"thesis.txt": "precious", JOURNAL: ""},
        {JOURNAL: '{"day": "Monday"}\n'},
        {"thesis.txt": "precious", JOURNAL: "Dear diary"},
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_folder_that_no_run_made_is_refused(out, files, resume):
    partial_folder(out).mkdir(parents=True)
    for name, text in files.items():
        (partial_folder(out) / name).write_text(text)
    with pytest.raises(UpcycleError, match=r"was not made by upcycle: move it away, or give anot"):
        begin(out, resume=resume)
    found = {path.name: path.read_text() for path in partial_folder(out).iterdir()}
    assert found == files


def test_file_in_the_place_of_the_workspace_is_refused(out):
    out.parent.mkdir()
    partial_folder(out).write_text("precious")
    with pytest.raises(UpcycleError, match="is a file, where a run would put its folder"):
        begin(out)
    assert partial_folder(out).read_text() == "precious"


def test_journal_goes_last_so_that_a_killed_cleaning_leaves_what_is_ours(out, monkeypatch):
    first = begin(out)
    (first.folder / "zz").touch()
    (first.folder / "aside").mkdir()
    killed(first)
    unlink, gone = Path.unlink, []
    monkeypatch.setattr(
        Path, "unlink", lambda self, **kw: gone.append(self.name) or unlink(self, **kw)
    )
    begin(out)
    assert gone[-1] == JOURNAL


# --- durable ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("exchange")
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_then_folders_are_synced_before_the_rename_and_the_parent_after(
    out, monkeypatch, overwrite
):
    if overwrite:
        publish(out, "old")
    workspace = begin(out)
    (workspace.result / "below").mkdir()
    for name in ("content", "below/more"):
        (workspace.result / name).write_text("new")
    events = []
    fsync, swapped, rename = os.fsync, publishing._swapped, Path.rename
    path_of = {}

    def sync(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(path_of.get(path, path.name))
        fsync(descriptor)

    path_of[workspace.result] = "result"
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(
        publishing, "_swapped", lambda one, other: swapped(one, other) and not events.append("swap")
    )
    monkeypatch.setattr(
        Path, "rename", lambda self, to: events.append(f"rename to {to.name}") or rename(self, to)
    )
    workspace.publish(overwrite=overwrite)
    moved = [event for event in events if event.startswith(("rename", "swap"))]
    assert moved[-1] in ("swap", "rename to out")
    assert events == ["more", "below", "content", "result", *moved, out.parent.name]


def test_abandoned_folder_is_gone_unless_it_can_be_resumed(out):
    begin(out).abandon()
    assert not partial_folder(out).exists()
    begin(out, resume=True).abandon()
    assert partial_folder(out).exists()


def test_mount_point_is_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "volume")
    with pytest.raises(UpcycleError, match=r"volume` is a mount point, .* a folder inside it"):
        check_out(tmp_path / "volume", tmp_path / "source", 1, overwrite=False)
    check_out(tmp_path / "volume" / "out", tmp_path / "source", 1, overwrite=False)


def test_place_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UpcycleError, match="can't write beside"):
        begin(tmp_path / "file" / "out")


# --- the journal -----------------------------------------------------------------------------


def test_resumed_run_knows_the_finished_units(out):
    first = begin(out)
    first.done("embeddings", {})
    first.done("layer 0", {"permutation": [1, 0]})
    killed(first)
    assert begin(out, resume=True).records == {
        "embeddings": {},
        "layer 0": {"permutation": [1, 0]},
    }


def test_run_that_is_not_resumed_starts_anew(out):
    first = begin(out)
    first.done("embeddings", {})
    (first.folder / "left").write_text("x")
    (first.folder / "aside").mkdir()
    killed(first)
    second = begin(out)
    assert second.records == {}
    assert not (second.folder / "left").exists()
    assert not (second.folder / "aside").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_second_run_leaves_one_that_is_at_work_alone(out, resume):
    first = begin(out)
    first.done("layer 0", {})
    with pytest.raises(
        UpcycleError, match=r"\.out\.partial belongs to a run that is still at work"
    ):
        begin(out, resume=resume)
    first.publish(overwrite=False)
    publish(out, "new", overwrite=True)


def test_file_system_without_locks(out, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    publish(out, "new")
    assert (out / "content").read_text() == "new"


def test_resuming_nothing_starts_anew(out):
    assert begin(out, resume=True).records == {}
    assert partial_folder(out).exists()


def test_other_fingerprint_is_refused_and_left_alone(out):
    first = begin(out, "a")
    first.done("layer 0", {})
    killed(first)
    with pytest.raises(UpcycleError, match="was begun with another source, text, recipe or ver"):
        begin(out, "b", resume=True)
    assert "layer 0" in begin(out, "a", resume=True).records


def test_journal_is_right_wherever_a_kill_cuts_it(out):
    first = begin(out)
    first.done("embeddings", {})
    first.done("layer 0", {"layer": 0})
    killed(first)
    whole = (first.folder / JOURNAL).read_text()
    units = ["embeddings", "layer 0"]
    for length in range(len(whole) + 1):
        (partial_folder(out) / JOURNAL).write_text(whole[:length])
        resumed = begin(out, resume=True)
        finished = max(0, whole[:length].count("\n") - 1)
        assert list(resumed.records) == units[:finished]
        resumed.done("next", {})
        killed(resumed)
        assert list(killed(begin(out, resume=True)).records) == [*units[:finished], "next"]


def test_run_that_is_killed_twice_before_its_first_unit(out):
    killed(begin(out))
    killed(begin(out, resume=True))
    third = begin(out, resume=True)
    third.done("layer 0", {})
    killed(third)
    assert list(begin(out, resume=True).records) == ["layer 0"]
