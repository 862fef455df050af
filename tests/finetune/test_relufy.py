"""ReLU in place of a dense model's activation, before a split."""

from functools import partial

import pytest
import torch
from reference import TOLERANCE, gap, load, load_all_on, logits, read_json, weights
from tiny import make_holder
from torch.nn import functional
from training import held_out

from upcycle import UpcycleError
from upcycle.finetune.activations import swap
from upcycle.finetune.data import Data
from upcycle.finetune.losses import square_hoyer_loss
from upcycle.finetune.preparing import Watch
from upcycle.models.loading import load_model
from upcycle.models.record.file import read_record
from upcycle.models.train_log import read_log

STEPS = 12


@pytest.fixture
def relufy(train):
    return partial(train, preset="relufy", steps=STEPS)


def naive_zeros(model, held: Data):
    """Share of the gates' outputs that are 0, by what the layers' FFNs are called with."""
    inputs, zeros, total = {}, 0, 0
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, _: inputs.__setitem__(m, args[0]))
    for tokens_L, mask_L in zip(held.tokens_BL, held.mask_BL, strict=True):
        logits(model, tokens_L[mask_L][None])
        for mlp, x_BLD in inputs.items():
            a_BLF = mlp.act_fn(functional.linear(x_BLD, mlp.gate_proj.weight))
            zeros, total = zeros + int((a_BLF == 0).sum()), total + a_BLF.numel()
    return zeros / total


# --- the swap --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma", "gemma4_text"])
def test_the_swapped_model_is_the_class_with_relu(dense, repeated, family):
    folder = dense(family)
    held = held_out(folder, repeated, steps=STEPS)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    tap = swap(model, "relu", held)
    name = "hidden_activation" if family == "gemma4_text" else "hidden_act"
    reference = load(folder, **{name: "relu"})
    assert gap(logits(model), logits(reference)) < 1e-6
    assert gap(logits(model), logits(load(folder))) > 1e-2
    assert getattr(model.config, name) == "relu"
    assert len(tap.modules) == 3
    assert tap.zeros_of_original < 0.05 < 0.3 < tap.zeros_before < 0.7


def test_zeros_are_counted_exactly(dense, repeated):
    folder = dense()
    held = held_out(folder, repeated, steps=STEPS)
    model = load_model(folder, torch.float32, torch.device("cpu"))
    tap = swap(model, "relu", held)
    assert tap.zeros_of_original == naive_zeros(load(folder), held) == 0
    assert tap.zeros_before == naive_zeros(load(folder, hidden_act="relu"), held)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("llama", {"hidden_act": "relu"}, "compute relu, whose zeros are exact already"),
        ("arcee", {}, "compute relu2, whose zeros are exact already"),
        ("lfm2", {}, "lfm2 computes silu whatever its config.json says"),
        ("qwen3_5_text", {}, "changes model.layers.0.linear_attn in Qwen3_5"),
    ],
)
def test_models_that_can_not_have_relu_are_refused(dense, relufy, family, fields, message):
    with pytest.raises(UpcycleError, match=f"`activation=relu`.*{message}") as caught:
        relufy(dense(family, **fields))
    assert "\n" not in str(caught.value)


def test_a_model_with_experts_is_refused(dense, moe, relufy):
    with pytest.raises(UpcycleError, match="`activation=relu` is for dense models before a split"):
        relufy(moe(dense(), target="qwen2_moe"))


# --- the loss --------------------------------------------------------------------------------


def test_square_hoyer_is_the_formula_and_so_is_its_gradient():
    rng = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 3, 5, generator=rng).relu().requires_grad_() for _ in range(2)]
    mask_BL = torch.tensor([[True, True, False], [True, True, True]])
    ratios = []
    expected = [torch.zeros(2, 3, 5) for _ in layers]
    for a_BLF, grad_BLF in zip(layers, expected, strict=True):
        for b, pos in mask_BL.nonzero().tolist():
            a_F = a_BLF[b, pos].tolist()
            one, two = sum(a_F), sum(a * a for a in a_F)
            ratios.append(one**2 / two)
            for f, a in enumerate(a_F):
                slope = 2 * one * (a > 0) / two - 2 * a * one**2 / two**2
                grad_BLF[b, pos, f] = slope / (5 * 2)
    loss = square_hoyer_loss(layers, mask_BL)
    loss.backward()
    assert loss.item() == pytest.approx(sum(ratios) / len(ratios), rel=1e-6)
    for a_BLF, grad_BLF in zip(layers, expected, strict=True):
        torch.testing.assert_close(a_BLF.grad, grad_BLF, rtol=1e-5, atol=1e-6)


def test_square_hoyer_of_nothing_is_nothing():
    silent = torch.zeros(1, 2, 4, requires_grad=True)
    loss = square_hoyer_loss([silent], torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert not silent.grad.any()


# --- training --------------------------------------------------------------------------------


def test_relufy_leaves_a_dense_model_that_transformers_loads_and_convert_splits(
    dense, moe, repeated, relufy
):
    source = dense()
    done = relufy(source, hoyer=0.2)
    held = held_out(source, repeated, steps=STEPS)
    assert done.after["loss"] < done.before["loss"] - 0.3
    assert done.zeros.original == 0
    assert done.zeros.after > done.zeros.before + 0.02
    assert done.zeros.after == pytest.approx(naive_zeros(load(done.out), held), abs=1e-9)
    before, after = read_json(source / "config.json"), read_json(done.out / "config.json")
    assert after == before | {"hidden_act": "relu"}
    assert all(not torch.equal(t, weights(source)[n]) for n, t in weights(done.out).items())
    assert read_record(done.out / "upcycle.json").training[-1].zeros == done.zeros
    assert f"{100 * done.zeros.after:.2f} % is exactly zero" in (done.out / "README.md").read_text()
    split = moe(done.out, target="qwen2_moe", shared=0.25)
    assert gap(logits(load_all_on(split)), logits(load(done.out))) < TOLERANCE["sum"]
    assert read_json(split / "config.json")["hidden_act"] == "relu"


def test_a_model_with_a_vision_tower_gets_relu_in_its_text_model_alone(relufy, tmp_path):
    source = make_holder(tmp_path / "llava", "llava")
    done = relufy(source, steps=2)
    before, after = read_json(source / "config.json"), read_json(done.out / "config.json")
    assert after == before | {"text_config": before["text_config"] | {"hidden_act": "relu"}}
    assert done.zeros.original == 0
    assert done.zeros.before > 0.3
    assert done.reload_error < 1e-6


def test_pressure_rises_over_the_steps_and_makes_more_zeros(dense, relufy, tmp_path):
    without = relufy(dense(), tmp_path / "without", hoyer=0)
    pressed = relufy(dense(), tmp_path / "pressed", hoyer=0.02)
    assert pressed.zeros.after > without.zeros.after
    for row in read_log(pressed.out / "train_log.jsonl"):
        if row.hoyer is not None:
            pressure = row.step / STEPS * 0.02 * row.hoyer
            assert row.loss == pytest.approx(row.next_token + row.distill + pressure, rel=1e-5)


def test_a_resumed_run_ends_in_the_same_bytes(dense, relufy, tmp_path):
    whole = relufy(dense(), tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(row, done, total):
        if row["step"] == 8 and "validation" not in row:
            raise Stop

    with pytest.raises(Stop):
        relufy(dense(), tmp_path / "cut", watch=Watch(row=stop))
    resumed = relufy(dense(), tmp_path / "cut", resume=True)
    assert resumed.zeros == whole.zeros
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert one == other
