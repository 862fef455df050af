"""What the plan says will be written is what is written."""

from math import isclose

import pytest
import torch
from reference import load, weights
from safetensors import safe_open

import upcycle
from upcycle.evaluation.inspection import is_routed
from upcycle.models.shards import DTYPES

QUICK = {"calibration_tokens": 64, "seq_len": 64, "check": "none"}
WRITTEN = {
    "split": ("llama", {}),
    "split with dense layers": ("llama", {"keep_dense": "1"}),
    "fused experts": ("granite", {"shared": 0.25}),
    "fused source": ("phi3", {"dtype": "bfloat16"}),
    "sigmoid": ("qwen3", {"target": "glm4_moe", "keep_dense": "0"}),
    "copies": ("llama", {"method": "copy", "experts": 4}),
    "granular copies": ("olmo2", {"method": "drop", "experts": 2, "granularity": 2, "top_k": 4}),
    "tied": ("gemma", {"experts": 4, "top_k": 2}),
    "shards": ("qwen2", {"max_shard_size": "50KB"}),
}


@pytest.fixture(scope="module", params=WRITTEN)
def written(request, dense, tmp_path_factory):
    """A plan, and the folder that its conversion wrote."""
    family, settings = WRITTEN[request.param]
    out = tmp_path_factory.mktemp("out")
    conversion = upcycle.convert(str(dense(family)), out, **QUICK, split="contiguous", **settings)
    return conversion.plan, out


def test_written_headers_are_the_planned_ones(written):
    plan, out = written
    headers = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                part = shard.get_slice(name)
                headers[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])
    assert headers == {spec.name: (spec.shape, spec.dtype) for spec in plan.specs}
    assert sum(tensor.nbytes for tensor in weights(out).values()) == plan.bytes


def test_parameters_are_those_of_the_loaded_model(written):
    plan, out = written
    model, dense = load(out, plan.design.dtype), load(plan.source.folder)
    bias = [b for name, b in model.named_buffers() if "e_score_correction_bias" in name]
    total = sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in bias)
    assert plan.params_total == total
    assert plan.params_dense == sum(p.numel() for p in dense.parameters())
    routed = sum(t.numel() for name, t in weights(out).items() if is_routed(name))
    idle = routed * (1 - plan.design.geometry.top_k / plan.design.geometry.num_experts)
    assert plan.params_active == total - round(idle)


def test_active_ratio_is_that_of_the_loaded_model(written):
    plan, out = written
    ffn = 3 * plan.source.arch.hidden_size * plan.source.arch.intermediate_size
    outside = plan.params_dense - ffn * plan.source.arch.num_layers
    tensors = weights(out)
    beside = ("router", "gate.weight", "e_score", "proj.bias")
    others = sum(t.numel() for n, t in tensors.items() if any(part in n for part in beside))
    source = sum(t.numel() for n, t in weights(plan.source.folder).items() if "proj.bias" in n)
    active = (plan.params_active - outside - others + source) / (ffn * plan.source.arch.num_layers)
    assert isclose(active, plan.active_ffn_ratio)


def test_tensor_that_is_float32_whatever_the_dtype(dense, tmp_path):
    """Selection biases: rounded to bfloat16, small steps of balancing would be lost."""
    upcycle.convert(
        str(dense()), tmp_path / "out", target="glm4_moe", dtype="bfloat16", split="random", **QUICK
    )
    stored = weights(tmp_path / "out")
    wide = {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16}
    assert wide == {f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(3)}
    for name in wide:
        assert torch.equal(stored[name], torch.zeros(len(stored[name]), dtype=torch.float32))
