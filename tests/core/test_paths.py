"""Files that are whole or as they were, whatever happens while they are written."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from processes import kill, killed
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from upcycle.core.paths import disk_errors, whole_file, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def torn(path):
    with whole_file(path) as draft:
        draft.write_text("to")
        kill()


def test_killed_write_leaves_the_former_file_and_the_next_one_clears_up(tmp_path):
    path = tmp_path / "eval[1].json"
    path.write_text("former")
    assert killed(lambda: torn(path))
    assert path.read_text() == "former"
    assert len(names(tmp_path)) == 2
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["eval[1].json"]


def test_files_of_others_and_drafts_at_work_are_left_alone(tmp_path):
    path = tmp_path / "eval.json"
    others = [".eval.json.draft", ".eval.json.mine.draft", "eval.json.12345678.draft"]
    for name in others:
        (tmp_path / name).touch()
    with whole_file(path) as slow:
        slow.write_text("slow")
        write_whole(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow"
    assert names(tmp_path) == sorted([*others, "eval.json"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "no room"), KeyboardInterrupt()])
def test_failed_write_leaves_the_former_file_alone(tmp_path, error):
    path = tmp_path / "eval.json"
    path.write_text("former")

    def fail():
        with whole_file(path) as draft:
            draft.write_text("to")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "former"
    assert names(tmp_path) == ["eval.json"]


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_permissions_stay(tmp_path, mode):
    path = tmp_path / "eval.json"
    path.touch()
    path.chmod(mode)
    write_whole(path, "new")
    assert path.stat().st_mode & 0o777 == mode


def test_new_files_get_the_permissions_of_all_new_files(tmp_path):
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "new", "x")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_pipe_stays_one(tmp_path):
    """As /dev/null and /dev/stdout do."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "new")
    reader.join()
    assert read == ["new"]
    assert pipe.is_fifo()


def test_bytes_are_on_the_disk_before_the_rename_and_the_name_after(tmp_path, monkeypatch):
    events, fsync, path = [], os.fsync, tmp_path / "eval.json"

    def sync(descriptor):
        folder = Path(f"/proc/self/fd/{descriptor}").is_dir()
        events.append(("folder" if folder else "file", path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(path, "new")
    assert events == [("file", False), ("folder", True)]


def test_what_replaces_the_draft_is_taken(tmp_path):
    """safetensors writes a file of its own beside it and renames that."""
    with whole_file(tmp_path / "state.safetensors") as draft:
        save_file({"a": torch.ones(3)}, draft)
    assert torch.equal(load_file(tmp_path / "state.safetensors")["a"], torch.ones(3))
    assert names(tmp_path) == ["state.safetensors"]


def test_full_disk_is_one_error_whoever_meets_it():
    with pytest.raises(OSError, match="No space left on device") as caught, disk_errors():
        raise SafetensorError("Error while serializing: I/O error: no room (os error 28)")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError), disk_errors():
        raise SafetensorError("invalid header")
