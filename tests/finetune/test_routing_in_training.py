"""Losses of routers and gating in the loop: they change the routers, and the result's class not."""

import math

import pytest
import torch
from reference import load, routers, weights

from upcycle import UpcycleError
from upcycle.finetune.preparing import Watch
from upcycle.finetune.run import finetune
from upcycle.models.workspace import partial_folder

QUICK = {
    "preset": "specialise", "steps": 3, "seq_len": 32, "batch_size": 4, "micro_batch": 2,
    "validation_tokens": 64, "router_lr": 3e-3, "balance": 0.0, "z_loss": 0.0, "keep_best": False,
}  # fmt: skip
LOSSES = ["cv2", "entropy", "separation", "erc", "adaptive_balance", "labels"]


@pytest.fixture(scope="module")
def two_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "one.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    (folder / "two.txt").write_text("0123456789 + 9876543210 = 9999999999; " * 35)
    return f"{folder / 'one.txt'}+{folder / 'two.txt'}"


@pytest.fixture(scope="module")
def model(dense, moe):
    return moe(dense(), target="glm4_moe", shared=0.25, router_spread=0.05)


@pytest.fixture
def train(two_texts, tmp_path):
    def run(folder, out="out", **settings):
        return finetune(str(folder), tmp_path / out, **(QUICK | {"data": two_texts} | settings))

    return run


def of_routers(folder):
    return {name: t for name, t in weights(folder).items() if "mlp.gate.weight" in name}


def layout(folder):
    return {name: (tuple(t.shape), t.dtype) for name, t in weights(folder).items()}


ROUTERS_ALONE = {"train": "router", "steps": 6, "warmup": 0.0, "router_lr": 0.03, "batch_size": 2}


@pytest.fixture(scope="module")
def without(model, two_texts, tmp_path_factory):
    """The same run, with losses that are watched and weigh nothing."""
    watched = {"router_losses": dict.fromkeys(LOSSES, 1e-9), "data": two_texts}
    out = tmp_path_factory.mktemp("without") / "out"
    return finetune(str(model), out, **(QUICK | ROUTERS_ALONE | watched))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_changes_the_routers_and_the_class_not(model, without, train, name):
    """It ends lower than where it weighs nothing."""
    done = train(model, router_losses={name: 1e3}, **ROUTERS_ALONE)
    assert done.log[1][name] == pytest.approx(without.log[1][name], rel=1e-5)
    assert done.last[name] < without.last[name]
    both = (of_routers(each.out).values() for each in (done, without))
    assert all(not torch.equal(*pair) for pair in zip(*both, strict=True))
    assert layout(done.out) == layout(model)
    config = (model / "config.json").read_bytes()
    assert (done.out / "config.json").read_bytes() == config
    assert len(routers(load(done.out))) == 3


def test_texts_come_to_their_own_experts(dense, moe, train):
    """−log of half of all scores is what experts alike in number get by chance."""
    source = moe(dense(), target="qwen2_moe", shared=0.25, router_spread=0.05)
    done = train(source, **ROUTERS_ALONE, router_losses={"labels": 10})
    assert done.log[1]["labels"] == pytest.approx(math.log(2), abs=0.1)
    assert done.last["labels"] < 0.3


@pytest.mark.parametrize("spread", [1e-4, 0.05])
def test_a_loss_weighs_the_same_whatever_the_routers_temperature(dense, moe, train, spread):
    source = moe(dense(), target="glm4_moe", shared=0.25, router_spread=spread)
    losses = {"cv2": 0.01, "entropy": 0.1, "erc": 0.01}
    done = train(source, router_losses=losses, gating="noisy_top_k")
    first = done.log[1]
    assert all(0 < first[name] < 30 for name in losses)
    assert first["grad_norm"] < 50


ALL = {"cv2": 0.1, "entropy": 0.1, "erc": 0.01, "adaptive_balance": 1, "labels": 0.1}


def test_micro_batches_change_no_loss_and_no_draw(model, train):
    settings = {"gating": "noisy_top_k", "router_losses": ALL, "steps": 2}
    parts = train(model, "parts", micro_batch=1, gradient_checkpointing=True, **settings)
    whole = train(model, "whole", micro_batch=4, **settings)
    for name in ("loss", "grad_norm", "imbalance", *ALL):
        one, other = ([row[name] for row in done.log if name in row] for done in (parts, whole))
        assert len(one) == 2
        assert other == pytest.approx(one, rel=1e-3), name


@pytest.mark.parametrize("gating", ["noisy_top_k", "sparse_mixer"])
def test_interrupted_and_resumed_is_the_same_as_never_stopped(model, train, tmp_path, gating):
    settings = {"steps": 4, "validate_every": 2, "gating": gating, "router_losses": ALL}

    def stop(row, done, total):
        if row["step"] == 3 and "validation" not in row:
            raise KeyboardInterrupt

    whole = train(model, "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(model, watch=Watch(row=stop), **settings)
    assert partial_folder(tmp_path / "out").is_dir()
    resumed = train(model, resume=True, **settings)
    files = (each.out / "model.safetensors" for each in (whole, resumed))
    assert len({path.read_bytes() for path in files}) == 1
    assert [row.get("loss") for row in whole.log] == [row.get("loss") for row in resumed.log]


# --- where they can't work ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_losses": {"cv3": 1}}, "unknown router loss 'cv3', did you mean 'cv2'"),
        ({"router_losses": {"balance": 1}}, "`router_losses.balance` is `balance=1`"),
        ({"router_losses": {"erc": {"weight": 1, "beta": 1}}}, "'erc' has no parameter 'beta'"),
        ({"router_losses": {"erc": {"alpha": 1}}}, "router_losses.erc.weight is missing"),
        ({"router_losses": {"erc": {"weight": 1, "alpha": -1}}}, "'erc': alpha=-1"),
        ({"router_losses": {"cv2": -1}}, "router_losses.cv2.weight=-1"),
        ({"router_losses": {"cv2": 1}, "train": "experts"}, "has no effect with `train=experts`"),
        (
            {"router_losses": {"labels": {"weight": 1, "experts": [[0]]}}},
            "no effect: `router_losses.labels.experts=…` is of 1 texts, but `data` of 2",
        ),
        (
            {"router_losses": {"erc": 1}, "lora": 2},
            "`router_losses.erc=1` has no effect on this model's",
        ),
        ({"gating": "noise"}, "unknown gating 'noise'"),
        ({"gating": {"name": "noisy_top_k", "noise": 0}}, "'noisy_top_k': noise=0"),
        ({"gating.noise": 1}, "name the gating itself first"),
        ({"lr.x": 1}, "'lr' has no parameters"),
        (
            {"gating": "sparse_mixer", "dense_router_gradient": True},
            "`gating=sparse_mixer` has a gradient of its own: give `dense_router_gradient=False`",
        ),
    ],
)
def test_what_can_not_work_is_refused_in_one_sentence(model, train, tmp_path, settings, message):
    with pytest.raises(UpcycleError) as caught:
        train(model, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_softmax_scores_are_not_separated_from_a_threshold(dense, moe, train):
    with pytest.raises(UpcycleError, match="separation=1` has no effect: its scores are a softmax"):
        train(moe(dense(), target="qwen2_moe", shared=0.25), router_losses={"separation": 1})


def test_parameters_are_set_one_by_one(model, train):
    done = train(
        model, **{
            "router_losses": {"erc": 0.5}, "router_losses.erc.alpha": 0.25, "router_losses.cv2": 2,
            "gating.noise": 0.5, "gating": "noisy_top_k", "steps": 1,
        }
    )  # fmt: skip
    settings = done.settings.settings()
    assert settings["router_losses"] == {
        "erc": {"weight": 0.5, "alpha": 0.25},
        "cv2": {"weight": 2.0},
    }
    assert settings["gating"] == {"name": "noisy_top_k", "noise": 0.5}


# --- published systems ----------------------------------------------------------------------------


PRESETS = {
    "llama-moe-pretraining": ("qwen2_moe", {"cv2"}),
    "sigma-moe": ("glm4_moe", {"entropy"}),
    "lte": ("glm4_moe", {"separation"}),
    "skywork": ("mixtral", {"adaptive_balance"}),
    "grin": ("mixtral", {"balance"}),
    "erc": ("mixtral", {"erc", "balance"}),
    "tomoe-routers": ("qwen2_moe", {"distill", "balance"}),
    "domains": ("mixtral", {"labels"}),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_what_they_are_for(dense, moe, two_texts, tmp_path, preset):
    target, logged = PRESETS[preset]
    copies = {"method": "copy", "experts": 4, "top_k": 2}
    made = copies if target == "mixtral" else {"shared": 0.25, "router_spread": 0.05}
    source = moe(dense(), target=target, **made)
    short = {"steps": 1, "seq_len": 32, "batch_size": 2, "validation_tokens": 64}
    done = finetune(str(source), tmp_path / "out", preset=preset, data=two_texts, **short)
    assert logged <= done.last.keys()
    assert layout(done.out) == layout(source)
