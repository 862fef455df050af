"""How exact a split and copies are, and that a router's selections survive in every dtype."""

import pytest
import torch
from reference import (
    dense_logits,
    load,
    load_all_on,
    logits,
    read_json,
    routers,
    selected,
    weights,
)
from tiny import PLAIN_SPLIT

import upcycle
from upcycle.conversion import run as conversion
from upcycle.conversion.check import LOW_PRECISION_TOLERANCE
from upcycle.conversion.converted import scaled
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.evaluation.result import TOLERANCE

DTYPES = ["float32", "bfloat16", "float16"]
TARGETS = ["qwen2_moe", "glm4_moe", "granitemoeshared", "mixtral"]
SPLIT = {"experts": 8, "top_k": 3, "shared": 0}
COPY = {"method": "copy", "experts": 4, "top_k": 2}
TEXT = {"calibration": "builtin", "calibration_tokens": 1024, "seq_len": 64}
MANY_TOKENS = torch.randint(0, 256, (32, 128), generator=torch.Generator().manual_seed(2))
SAME_SELECTION = 0.98
"""The least share of the tokens that a rounded router must send to the same experts."""
TORN_COPIES = 0.01
"""The largest share of the tokens whose experts may not be whole copies, below float32."""

targets = pytest.mark.parametrize("target", TARGETS)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def relative_error(actual, expected):
    """Root mean square difference over the standard deviation, as the check measures it."""
    return float((actual - expected).square().mean().sqrt() / expected.std())


@targets
def test_error_is_proportional_to_the_spread(dense, moe, target):
    expected = dense_logits(dense())
    out = moe(dense(), target=target, **SPLIT)
    error = {factor: error_at(out, factor, expected) for factor in (1, 10, 100)}
    assert error[10] / error[1] == pytest.approx(10, rel=0.1)
    assert error[100] / error[1] == pytest.approx(100, rel=0.3)


def error_at(out, factor, expected):
    """With all experts on and the routers' rows multiplied by the factor."""
    model = load_all_on(out)
    for router in routers(model):
        router.weight.data *= factor
    return relative_error(logits(model), expected)


@targets
@dtypes
def test_split_with_experts_alike_is_within_the_documented_tolerance(dense, moe, target, dtype):
    source = dense(dtype=getattr(torch, dtype))
    out = moe(source, target=target, router_spread=0.3, **SPLIT)
    assert error_at(out, 0, dense_logits(source)) < documented_tolerance(dtype)
    assert error_at(out, 1, dense_logits(source)) > 0.01  # which the spread alone would exceed


@targets
@dtypes
def test_copy_is_within_the_documented_tolerance(dense, moe, target, dtype):
    source = dense(dtype=getattr(torch, dtype))
    error = relative_error(logits(load(moe(source, target=target, **COPY))), dense_logits(source))
    assert error < documented_tolerance(dtype)


def documented_tolerance(dtype):
    return TOLERANCE if dtype == "float32" else LOW_PRECISION_TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [SPLIT, SPLIT | {"router_spread": 1e-4}, {"method": "prune", "top_k": 1}],
    ids=["split", "narrow", "prune"],
)
@dtypes
def test_logits_of_a_token_have_the_spread_that_is_asked_for(dense, moe, settings, dtype):
    """Over its experts, on average over the tokens that were fitted on."""
    source = dense(dtype=torch.bfloat16)
    wanted = {"router_spread": 0.1, "dtype": dtype, "check": "none"} | settings
    plan = upcycle.plan(str(source), **(PLAIN_SPLIT | TEXT | wanted))
    fit_BL = conversion._tokens(plan, lambda *_: None).fit_BL
    stored = routers(load(moe(source, **(TEXT | wanted))))
    for x_TD, router in zip(ffn_inputs(source, fit_BL), stored, strict=True):
        logits_TE = x_TD @ router.weight.detach().T
        spread = float(logits_TE.std(1, correction=0).mean())
        assert spread == pytest.approx(wanted["router_spread"], rel=0.01)


@targets
@dtypes
@pytest.mark.parametrize("router", ["normal", "ridge", "centroid", "kmeans", "representative"])
def test_stored_router_selects_as_the_exact_one(dense, moe, target, dtype, router):
    """A source in bfloat16, so that all three dtypes are converted from the same weights."""
    source = dense(dtype=torch.bfloat16)
    settings = {**SPLIT, "target": target, "router": router}
    exact = routers(load(moe(source, dtype="float32", **settings)))
    stored = routers(load(moe(source, dtype=dtype, **settings), getattr(torch, dtype)))
    for x_TD, exact_router, stored_router in zip(ffn_inputs(source), exact, stored, strict=True):
        selected_TK = select(stored_router, x_TD)
        assert agreement(selected_TK, select_exactly(exact_router, x_TD)) >= SAME_SELECTION


def test_what_all_rows_have_in_common_costs_no_precision():
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(4096, 64, generator=generator)
    router_ED = torch.randn(8, 64, generator=generator) + 15 * torch.randn(64, generator=generator)
    stored_ED = scaled(router_ED, x_TD, 0.1).bfloat16()
    logits_TE = x_TD.bfloat16() @ stored_ED.T
    selected_TK = logits_TE.float().softmax(-1).topk(3).indices
    expected_TK = (x_TD.double() @ router_ED.double().T).topk(3).indices
    assert agreement(selected_TK, expected_TK) >= SAME_SELECTION


@targets
@pytest.mark.parametrize(("granularity", "top_k"), [(2, 4), (4, 8)])
@dtypes
def test_tokens_get_whole_copies(dense, moe, target, granularity, top_k, dtype):
    """Where two copies' logits tie, a token may get one shard of each: rare, and never in float32
    or with glm4_moe, whose router computes in it."""
    grid = {"experts": 8, "granularity": granularity, "top_k": top_k}
    out = moe(dense(), method="copy", target=target, dtype="float32", **grid)
    stored = routers(load(out, getattr(torch, dtype)))
    for x_TD, router in zip(ffn_inputs(dense()), stored, strict=True):
        shards_TK = select(router, x_TD) % granularity
        count_TG = torch.nn.functional.one_hot(shards_TK, granularity).sum(1)
        torn = (count_TG != top_k // granularity).any(1).float().mean()
        exact = dtype == "float32" or target == "glm4_moe"
        assert torn <= (0 if exact else TORN_COPIES)


def ffn_inputs(source, tokens=MANY_TOKENS):
    """What each layer's FFN sees of these tokens in the dense model, x [T, D] in float32."""
    model, seen = load(source), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    logits(model, tokens)
    return seen


@torch.no_grad()
def select(router, x_TD):
    """The experts that transformers' router selects [T, K], in its own dtype."""
    return selected(router(x_TD.to(router.weight.dtype)))


def select_exactly(router, x_TD):
    """The experts with the largest logits [T, K]: in float64 a small spread costs nothing."""
    return (x_TD.double() @ router.weight.double().T).topk(router.top_k).indices


def agreement(selected_TK, expected_TK):
    """The share of the tokens with the same set of experts."""
    same_T = (selected_TK.sort(1).values == expected_TK.sort(1).values).all(1)
    return float(same_T.float().mean())


@pytest.mark.parametrize("method", ["split", "copy"])
@dtypes
def test_the_check_measures_the_same(dense, moe, monkeypatch, method, dtype):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)
    source = dense(dtype=getattr(torch, dtype))
    settings = SPLIT | {"router_spread": 0.1} if method == "split" else COPY
    out = moe(source, check="fast", calibration="builtin", target="mixtral", **settings)
    measured = read_json(out / "upcycle.json")["check"]
    model = load_all_on(out) if method == "split" else load(out)
    for router in routers(model):
        router.weight.data *= method == "copy"  # a split's experts count the same then
    assert measured["exact_error"] < measured["exact_tolerance"]
    expected = relative_error(logits(model, MANY_TOKENS), logits(load(source), MANY_TOKENS))
    assert measured["exact_error"] == pytest.approx(expected, rel=0.5, abs=1e-6)


@dtypes
def test_the_shared_gate_is_half_even_as_silu_over_its_input(dense, moe, dtype):
    """As llama.cpp computes the sigmoid: of exactly zero that is not a number."""
    source = dense(dtype=getattr(torch, dtype))
    model = load(moe(source, target="qwen2_moe", **(SPLIT | {"shared": 0.25})))
    seen = []
    for layer in model.model.layers:
        gate = layer.mlp.shared_expert_gate
        gate.register_forward_hook(lambda module, inputs, z: seen.append(z.float()))
    logits(model)
    assert len(seen) == len(model.model.layers)
    for z in seen:
        half = torch.nn.functional.silu(z) / z
        torch.testing.assert_close(half, torch.full_like(half, 0.5), rtol=1e-4, atol=0)


@pytest.mark.parametrize("settings", [SPLIT, COPY, SPLIT | {"keep_dense": "1"}])
def test_qwen2_moe_has_all_tensors_that_vllm_always_reads(dense, moe, settings):
    """Biases of q, k and v, which it leaves uninitialised where they are missing, and a shared
    expert, which it can't load where it has no neurons."""
    out = moe(dense(), target="qwen2_moe", **settings)
    config, tensors = read_json(out / "config.json"), weights(out)
    assert config["qkv_bias"] is True
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        biases = [tensors[f"{prefix}self_attn.{name}_proj.bias"] for name in "qkv"]
        assert not torch.cat(biases).any()
        if layer not in config["mlp_only_layers"]:
            silent = [t for n, t in tensors.items() if n.startswith(f"{prefix}mlp.shared_expert.")]
            assert len(silent) == 3
            assert all(t.numel() and not t.any() for t in silent)


def test_qwen2_moe_keeps_the_biases_of_the_source(dense, moe):
    name = "model.layers.1.self_attn.k_proj.bias"
    source = dense("qwen2")
    stored = weights(moe(source, target="qwen2_moe", **SPLIT))[name]
    assert stored.any()
    torch.testing.assert_close(stored, weights(source)[name], rtol=0, atol=0)
