"""Damage: against the whole model with one FFN cut."""

from itertools import pairwise

import pytest
import torch
from reference import load, logits
from tiny import SIZES

import upcycle
from upcycle.conversion.damage import measure_damage, strongest
from upcycle.core.types import DenseFFN

F, LAYERS = SIZES["intermediate_size"], SIZES["num_hidden_layers"]
TOKENS_BL = torch.randint(0, 256, (5, 60), generator=torch.Generator().manual_seed(3))


def quiet(stage, done, total):
    pass


def planned(folder, **settings):
    return upcycle.plan(str(folder), calibration="builtin", keep_dense="auto", **settings)


def divergence(dense_BLV, cut_BLV):
    """KL in nats per token, in float64."""
    dense, cut = (each.double().log_softmax(-1) for each in (dense_BLV, cut_BLV))
    return float((dense.exp() * (dense - cut)).sum(-1).mean())


def naive_damage(folder, tokens_BL, kept):
    """Layer by layer, the whole model with the weaker neurons of this layer silenced where they
    enter down_proj."""
    model, hidden = load(folder), {}
    layers = list(model.model.layers)
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, i=i: hidden.__setitem__(i, args[0].flatten(0, 1))
        )
        for i, block in enumerate(layers)
    ]
    dense_BLV = logits(model, tokens_BL)
    for hook in hooks:
        hook.remove()
    damage = []
    for i, block in enumerate(layers):
        down_DF = block.mlp.down_proj.weight.detach()
        energy = [
            float(hidden[i][:, n].square().mean() * down_DF[:, n].square().sum()) for n in range(F)
        ]
        mask_F = torch.zeros(F)
        mask_F[sorted(range(F), key=lambda n, energy=energy: -energy[n])[:kept]] = 1
        hook = block.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, mask_F=mask_F: (args[0] * mask_F,)
        )
        damage.append(divergence(dense_BLV, logits(model, tokens_BL)))
        hook.remove()
    return damage


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma", "granite", "olmo2", "phi3"])
def test_damage_is_that_of_the_whole_model_with_one_ffn_cut(dense, family, tied):
    folder = dense(family, tie_word_embeddings=tied)
    plan = planned(folder, experts=8, top_k=3, shared=0)
    expected = naive_damage(folder, TOKENS_BL, kept=3 * F // 8)
    assert min(expected) > 1e-3
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx(expected, rel=1e-3)


def test_shared_neurons_count_as_kept(dense):
    plan = planned(dense(), experts=5, top_k=2, shared=0.375)
    expected = naive_damage(dense(), TOKENS_BL, kept=5 * F // 8)
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx(expected, rel=1e-3)


def test_weights_below_float32_are_measured_too(dense):
    folder = dense("olmo2", dtype=torch.bfloat16)  # a family of exact rotary angles
    plan = planned(folder, experts=8, top_k=3, shared=0)
    expected = naive_damage(folder, TOKENS_BL, kept=3 * F // 8)
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx(expected, rel=0.02)


def test_no_neuron_cut_is_no_damage(dense):
    plan = planned(dense(), experts=8, top_k=8, shared=0)
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx([0] * LAYERS, abs=1e-5)


def test_fewer_neurons_do_more_damage(dense):
    totals = [
        sum(measure_damage(planned(dense(), experts=8, top_k=k), TOKENS_BL, quiet))
        for k in (1, 3, 6)
    ]
    assert all(more > less for more, less in pairwise(totals))


def test_every_layer_is_announced(dense):
    seen = []
    measure_damage(planned(dense()), TOKENS_BL, lambda *step: seen.append(step))
    assert seen == [("measuring layers", i, LAYERS) for i in range(LAYERS + 1)]


def test_strongest_are_those_that_put_out_most():
    rng = torch.Generator().manual_seed(0)
    gate_FD, up_FD = torch.randn(2, 16, 4, generator=rng)
    down_DF = torch.randn(4, 16, generator=rng)
    ffn = DenseFFN(gate_FD, up_FD, down_DF, torch.nn.functional.silu)
    x_TD = torch.randn(9, 4, generator=rng)
    alone = [float(ffn.take(torch.tensor([n]))(x_TD).square().sum()) for n in range(16)]
    best = sorted(sorted(range(16), key=lambda n: -alone[n])[:5])
    assert torch.equal(strongest(ffn, x_TD, 5).gate_FD, gate_FD[best])
    assert torch.equal(strongest(ffn, x_TD, 5).down_DF, down_DF[:, best])
