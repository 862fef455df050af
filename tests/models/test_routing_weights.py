"""What an expert counts by its router: the plan's weights against what each native class of
transformers adds up, with the dense model's own neurons."""

import pytest
import torch
from hosting import DECODER_TARGETS as TARGETS
from reference import experts, ffn_of, load, logits, moe_layers, neurons, router_weights
from tiny import PLAIN_SPLIT

import upcycle

FAMILY = {
    "qwen3_moe": "qwen3",
    "flex_olmo": "olmo2",
    "granitemoeshared": "granite",
    "granitemoe_swa": "smollm3",
    "ernie4_5_moe": "ernie4_5",
    "laguna": "qwen3",
    "deepseek_v3": "youtu",
    "qwen3_5_moe": "qwen3_5_text",
    "gemma4": "gemma4_text",
    "lfm2_moe": "lfm2",
    "granitemoehybrid": "granitemoehybrid",
    "nemotron_h": "nemotron_h",
}
"""Of a dense model that the target takes; else llama."""
SPREAD = 0.3
SPLITS = [
    {"experts": 8, "top_k": 3, "shared": 0},
    {"experts": 8, "top_k": 1, "shared": 0},
    {"experts": 8, "top_k": 8, "shared": 0},
]
COPIES = [
    {"method": "copy", "experts": 4, "top_k": 2},
    {"method": "copy", "experts": 4, "granularity": 2, "top_k": 4},
    {"method": "copy", "experts": 4, "top_k": 1},
]


def converted(dense, moe, name, settings):
    """The plan, the dense model and the converted one."""
    source = dense(FAMILY.get(name, "llama"))
    wanted = {"target": name, "router_spread": SPREAD} | settings
    out = moe(source, **wanted)
    plan = upcycle.plan(str(source), **(PLAIN_SPLIT | wanted))
    return plan, load(source), load(out), out


@torch.no_grad()
def seen_by_experts(model):
    """Layer by layer: what the experts get, x [T, D], and what they add together, y [T, D]."""
    seen, hooks = [], []
    factor = getattr(model.config, "moe_routed_scaling_factor", 1.0)  # laguna's, of y
    for stacked in experts(model):
        hooks.append(
            stacked.register_forward_hook(
                lambda _, args, y: seen.append((args[0].flatten(0, -2), factor * y.flatten(0, -2)))
            )
        )
    logits(model)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("settings", SPLITS, ids=str)
@pytest.mark.parametrize("name", sorted(TARGETS))
@torch.no_grad()
def test_a_splits_experts_count_what_the_plan_weighs(dense, moe, name, settings):
    plan, source, model, out = converted(dense, moe, name, settings)
    layers = zip(seen_by_experts(model), router_weights(model), moe_layers(out), strict=True)
    spreads = []
    for (x_TD, y_TD), router_ED, record in layers:
        logits_TE = x_TD @ router_ED.T
        weight_TE = plan.design.weigh(logits_TE)
        assert ((weight_TE > 0).sum(1) == plan.design.geometry.top_k).all()
        h_TF, down_DF = neurons(ffn_of(source.model.layers[record["layer"]]), x_TD)
        members_EM = torch.tensor(record["permutation"]).view(plan.design.geometry.num_experts, -1)
        expected_TD = sum(
            weight_TE[:, e, None] * (h_TF[:, members_M] @ down_DF[:, members_M].T)
            for e, members_M in enumerate(members_EM)
        )
        torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-5 * y_TD.std().item())
        spreads.append(logits_TE.std(1).mean().item())
        assert 0.5 < weight_TE[weight_TE > 0].mean() < 2
    assert sum(spreads) / len(spreads) == pytest.approx(SPREAD, rel=0.5)


@pytest.mark.parametrize("settings", COPIES, ids=str)
@pytest.mark.parametrize("name", sorted(TARGETS))
@torch.no_grad()
def test_copies_count_what_the_plan_weighs(dense, moe, name, settings):
    if settings["top_k"] == 1 and TARGETS[name].routing.renormalises == "always":
        settings = settings | {"allow_frozen_router": True}
    plan, source, model, out = converted(dense, moe, name, settings)
    geometry = plan.design.geometry
    blocks = [source.model.layers[record["layer"]] for record in moe_layers(out)]
    layers = zip(seen_by_experts(model), router_weights(model), blocks, strict=True)
    for (x_TD, y_TD), router_ED, block in layers:
        weight_TE = plan.design.weigh(x_TD @ router_ED.T)
        shards_TG = weight_TE.view(len(x_TD), geometry.copies, geometry.granularity).sum(1)
        h_TF, down_DF = neurons(ffn_of(block), x_TD)
        count_TF = shards_TG.repeat_interleave(geometry.expert_size, dim=1)
        expected_TD = (h_TF * count_TF) @ down_DF.T
        torch.testing.assert_close(y_TD, expected_TD, rtol=1e-4, atol=1e-5 * y_TD.std().item())
        # Each neuron counts once in all; where weights are not renormalised, nearly.
        torch.testing.assert_close(count_TF, torch.ones_like(count_TF), rtol=1e-3, atol=0)
