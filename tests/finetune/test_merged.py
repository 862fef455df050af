"""Merges, trained further."""

import pytest
import torch
from reference import read_json, weights

import upcycle
from upcycle import UpcycleError

SHORT = {"seq_len": 32, "batch_size": 4, "validation_tokens": 64}


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """Two texts that are easily told apart, by name."""
    folder = tmp_path_factory.mktemp("mix")
    for name, words in (("m1", "THE QUICK BROWN FOX "), ("m2", "over the lazy dogs. ")):
        (folder / f"{name}.txt").write_text(words * 100)
    return {name: str(folder / f"{name}.txt") for name in ("m1", "m2")}


@pytest.fixture(scope="module")
def merged(shelf, mix, tmp_path_factory):
    """A merge of three models, of which two are on, and one of two."""

    def make(*names, **settings):
        out = tmp_path_factory.mktemp("merged") / "moe"
        models = [str(shelf / name) for name in names]
        how = {"check": "none", "base": str(shelf / "base")}
        upcycle.merge(models, out, **how | settings)
        return out

    return make


def is_router(name):
    return name.endswith("block_sparse_moe.gate.weight")


def test_routers_alone_train_and_the_loss_falls(merged, mix, tmp_path):
    moe = merged("m1", "m2", "m3", router="normal")
    done = upcycle.finetune(
        str(moe), tmp_path / "out", preset="routers", data="+".join(mix.values()), lr=3e-2,
        steps=12, **SHORT,
    )  # fmt: skip
    assert done.after["loss"] < done.before["loss"] - 0.05
    before, after = weights(moe), weights(tmp_path / "out")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(filter(is_router, before))


def test_a_merge_of_two_that_are_both_on_has_no_load_to_balance(merged, mix, tmp_path):
    """All else of the presets holds."""
    moe = merged("m1", "m2", router="domain", text=mix, seq_len=64, calibration_tokens=512)
    for preset in ("btx", "specialise"):
        done = upcycle.finetune(
            str(moe), tmp_path / preset, preset=preset, data="+".join(mix.values()), steps=2,
            **SHORT,
        )  # fmt: skip
        assert done.groups["experts"]["trained"] == done.groups["experts"]["parameters"]
    record = read_json(tmp_path / "btx" / "upcycle.json")
    assert [expert["model"] for expert in record["plan"]["merge"]["experts"]] == ["m1", "m2"]
    assert record["training"][0]["settings"]["weight_decay"] == 0.1
    assert not (tmp_path / "btx" / "router_domains.safetensors").exists()
    upcycle.finetune(
        str(moe), tmp_path / "experts", preset="btx", train="experts", data=mix["m1"], steps=1,
        **SHORT,
    )  # fmt: skip
    kept = [(p / "router_domains.safetensors").read_bytes() for p in (moe, tmp_path / "experts")]
    assert kept[0] == kept[1]


def test_a_merge_has_no_teacher_unless_one_is_named(merged, mix, tmp_path):
    moe = merged("m1", "m2", router="normal")
    with pytest.raises(UpcycleError, match="name it by `teacher=DENSE`"):
        upcycle.finetune(str(moe), tmp_path / "out", preset="heal", data=mix["m1"], steps=1)
