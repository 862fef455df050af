"""Where a model's folder is found: by a path, or in the hub's cache."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from spoiled import assert_refused, edit_config
from tiny import QUICK
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.models.companions import companions
from upcycle.models.opening import open_source
from upcycle.models.shards import SINGLE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_path_with_home(dense, monkeypatch):
    folder = dense()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_source(f"~/{folder.name}").folder == folder


def test_missing_path(tmp_path):
    assert_refused(tmp_path / "absent", f"{tmp_path / 'absent'} does not exist")


def test_file_instead_of_a_folder(copy):
    assert_refused(copy() / "config.json", "is a file: give the folder")


# --- the hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub cache, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cache_model(hub: Path, model: str, folder: Path, revision: str = "main") -> Path:
    repo = hub / f"models--{model.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text(COMMIT)
    return shutil.copytree(folder, repo / "snapshots" / COMMIT)


def test_hub_id_is_found_in_the_cache(hub, dense):
    snapshot = cache_model(hub, "org/tiny", dense())
    opened = open_source("org/tiny")
    assert (opened.folder, opened.label, opened.revision) == (snapshot, "org/tiny", COMMIT)
    assert opened.read_layer(0)


def test_files_of_the_hub_cache_are_links_to_blobs_of_the_same_repository(hub, dense, tmp_path):
    snapshot = cache_model(hub, "org/tiny", dense())
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool.jinja").write_text("{{ x }}")
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(p for p in [*snapshot.rglob("*")] if p.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    upcycle.convert("org/tiny", tmp_path / "out", **QUICK)
    for path in companions(snapshot):
        copied = tmp_path / "out" / path.relative_to(snapshot)
        assert copied.read_bytes() == path.read_bytes()
        assert not copied.is_symlink()
    other = hub / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "0").write_text("secret")
    (snapshot / "LICENSE").symlink_to(other / "0")
    with pytest.raises(UpcycleError, match="is a link out of its folder"):
        upcycle.plan("org/tiny", **QUICK)


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_hub_revision_is_a_tag_or_a_commit(hub, dense, revision):
    snapshot = cache_model(hub, "org/tiny", dense(), revision="v1")
    opened = open_source("org/tiny", revision=revision)
    assert (opened.folder, opened.revision) == (snapshot, COMMIT)


def test_revision_that_is_not_in_the_cache(hub, dense):
    cache_model(hub, "org/tiny", dense())
    with pytest.raises(UpcycleError, match=r"org/tiny is not in the local cache .*offline"):
        open_source("org/tiny", revision="v2")


def test_hub_id_that_is_not_in_the_cache_says_offline(hub):
    result = CliRunner().invoke(app, ["plan", "org/tiny"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "error: org/tiny is not in the local cache and the hub can't be reached (offline): "
        "give a local folder, or connect"
    ]


def test_hub_family_is_refused_before_its_weights_are_fetched(hub, dense, monkeypatch):
    snapshot = cache_model(hub, "org/tiny", dense())
    edit_config(snapshot, model_type="opt")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched")
    )
    with pytest.raises(UpcycleError, match="opt can't become a native MoE"):
        open_source("org/tiny")


def test_hub_model_without_weights_in_the_cache(hub, dense):
    (cache_model(hub, "org/tiny", dense()) / SINGLE).unlink()
    with pytest.raises(UpcycleError, match=f"holds neither {SINGLE}"):
        open_source("org/tiny")


def test_revision_of_a_folder_is_refused(dense):
    with pytest.raises(UpcycleError, match="`revision=v1` goes with a hub id"):
        open_source(str(dense()), revision="v1")
