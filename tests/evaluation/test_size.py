"""Parameters, FLOPs and similarity: counted by hand on tiny models."""

import itertools

import pytest
import torch
from hosting import DECODER_TARGETS as TARGETS
from reference import experts, load, read_json
from tiny import SIZES
from torch import nn

from upcycle.evaluation.size import expert_similarity, flops, measure_size
from upcycle.models.blocks import moe_blocks

FAMILIES = {
    "qwen3_moe": "qwen3",
    "granitemoeshared": "granite",
    "granitemoe_swa": "granite_swa",
    "flex_olmo": "olmo2",
    "ernie4_5_moe": "ernie4_5",
    "laguna": "qwen3",
    "deepseek_v3": "youtu",
    "qwen3_5_moe": "qwen3_5_text",
    "gemma4": "gemma4_text",
    "granitemoehybrid": "granitemoehybrid",
    "lfm2_moe": "lfm2",
    "nemotron_h": "nemotron_h",
}


def linear_weights(model):
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def test_flops_of_a_dense_model_are_those_of_its_linears(dense):
    model = load(dense())
    size = measure_size(model)
    assert flops(size.matmul_active) == flops(size.matmul_total) == 2 * linear_weights(model)


def test_flops_of_llama_by_hand(dense):
    hidden, heads = SIZES["hidden_size"], SIZES["num_attention_heads"]
    kv = hidden // heads * SIZES["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * SIZES["intermediate_size"]
    head = hidden * SIZES["vocab_size"]
    size = measure_size(load(dense()))
    assert flops(size.matmul_active) == 2 * (SIZES["num_hidden_layers"] * layer + head)


def test_tied_head_counts_as_a_multiplication_and_once_as_a_parameter(dense):
    apart, tied = measure_size(load(dense())), measure_size(load(dense(tie_word_embeddings=True)))
    embedding = SIZES["hidden_size"] * SIZES["vocab_size"]
    assert tied.matmul_total == apart.matmul_total
    assert tied.total == apart.total - embedding


@pytest.mark.parametrize("target", TARGETS)
def test_parameters_are_the_plans(dense, moe, target):
    folder = moe(dense(FAMILIES.get(target, "llama")), experts=8, top_k=2, target=target)
    plan, size = read_json(folder / "upcycle.json")["plan"], measure_size(load(folder))
    assert (size.total, size.active) == (plan["params_total"], plan["params_active"])


def test_idle_experts_are_not_active(dense, moe):
    model = load(moe(dense(), experts=8, top_k=2, target="mixtral"))
    size = measure_size(model)
    expert = 3 * SIZES["hidden_size"] * SIZES["intermediate_size"] // 8
    idle = SIZES["num_hidden_layers"] * (8 - 2) * expert
    routers = SIZES["num_hidden_layers"] * 8 * SIZES["hidden_size"]
    stacked = SIZES["num_hidden_layers"] * 8 * expert
    assert size.total - size.active == idle
    assert size.matmul_total - size.matmul_active == idle
    assert size.matmul_total == linear_weights(model) + routers + stacked


def naive_similarity(stacked):
    flat = [
        torch.cat([gate_up.flatten(), down.flatten()]).double()
        for gate_up, down in zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True)
    ]
    cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in itertools.combinations(flat, 2)]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": 8, "top_k": 2},
        {"method": "drop", "experts": 4, "top_k": 2, "router": "normal"},
    ],
)
def test_similarity_is_that_of_loops(dense, moe, settings):
    model = load(moe(dense(), **settings))
    for block, stacked in zip(moe_blocks(model), experts(model), strict=True):
        assert expert_similarity(block) == pytest.approx(naive_similarity(stacked), abs=1e-6)


def test_copies_are_alike_and_split_experts_are_not(dense, moe):
    copies = load(moe(dense(), method="copy", experts=4, top_k=2))
    split = load(moe(dense(), experts=8, top_k=2))
    assert [expert_similarity(b) for b in moe_blocks(copies)] == [pytest.approx(1)] * 3
    assert all(abs(expert_similarity(b)) < 0.1 for b in moe_blocks(split))


def test_expert_of_zeros_is_like_none(dense, moe):
    block = moe_blocks(load(moe(dense(), method="copy", experts=4, top_k=2)))[0]
    block.experts.gate_up_proj.data[0] = block.experts.down_proj.data[0] = 0
    assert expert_similarity(block) == pytest.approx(3 / 6)  # the pairs of the other three
