"""Files that travel with a checkpoint, and links that do not."""

import pytest
from spoiled import assert_refused
from tiny import QUICK

import upcycle
from upcycle import UpcycleError
from upcycle.models.companions import companions


def test_companions_are_the_small_files_only(copy):
    folder = copy()
    for name in ("LICENSE", "merges.txt", "chat_template.jinja", "notes.txt", "pytorch_model.bin"):
        (folder / name).write_text("x")
    names = {path.name for path in companions(folder)}
    assert names == {
        "LICENSE", "merges.txt", "chat_template.jinja", "generation_config.json",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer_backup.txt", "README.md", "additional_chat_templates"]
)
def test_link_out_of_the_checkpoint_is_not_published(copy, tmp_path, name):
    folder, outside = copy(), tmp_path / "outside"
    outside.mkdir()
    (outside / "id.jinja").write_text("secret")
    target = outside if name.startswith("additional") else outside / "id.jinja"
    (folder / name).symlink_to(target)
    assert_refused(folder, name, "is a link out of its folder", "put a copy in its place")
    moe = tmp_path / "moe"
    with pytest.raises(UpcycleError, match="is a link out of its folder"):
        upcycle.finetune(str(folder), moe, data="builtin")
    assert not moe.exists()


def test_link_within_the_checkpoint_is_copied(copy, tmp_path):
    folder = copy()
    (folder / "terms.txt").write_text("mine")
    (folder / "LICENSE").symlink_to("terms.txt")
    link = tmp_path / "link"
    link.symlink_to(folder)
    upcycle.convert(str(link), tmp_path / "out", **QUICK)
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"
    assert not (tmp_path / "out" / "LICENSE").is_symlink()
