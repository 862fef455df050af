"""What the model card tells its reader to do, done, on each target."""

import re

import pytest
import torch
from hosting import DECODER_TARGETS as TARGETS
from peft import LoraConfig, get_peft_model
from reference import load, read_json
from torch import nn

from upcycle.models.blocks import moe_blocks
from upcycle.models.hosted import target_of

HOSTS = {
    "qwen2_moe": ("llama", {"shared": 0.25, "experts": 6}),
    "glm4_moe": ("llama", {"shared": 0.25, "experts": 6}),
    "granitemoeshared": ("llama", {"shared": 0.25, "experts": 6}),
    "granitemoe_swa": ("smollm3", {"shared": 0.25, "experts": 6}),
    "mixtral": ("llama", {}),
    "qwen3_moe": ("qwen3", {}),
    "flex_olmo": ("olmo2", {}),
    "gemma4": ("gemma4_text", {}),
    "qwen3_5_moe": ("qwen3_5_text", {"shared": 0.25, "experts": 6}),
    "ernie4_5_moe": ("ernie4_5", {"shared": 0.25, "experts": 6}),
    "laguna": ("qwen3", {"shared": 0.25, "experts": 6}),
    "deepseek_v3": ("youtu", {"shared": 0.25, "experts": 6}),
    "lfm2_moe": ("lfm2", {}),
    "nemotron_h": ("nemotron_h", {"shared": 0.25, "experts": 6}),
    "granitemoehybrid": ("granitemoehybrid", {"shared": 0.25, "experts": 6}),
}
LOAD, LORA, FREEZE = range(3)


@pytest.fixture(params=HOSTS)
def converted(request, dense, moe):
    family, settings = HOSTS[request.param]
    return moe(dense(family), target=request.param, **settings)


def run_card(folder, *parts):
    """The model that these parts of the card's code make."""
    card = (folder / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    for part in parts:
        exec(code[part].replace("path/to/this/folder", str(folder)), names)
    return names["model"]


def backward(model):
    tokens_BL = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()


def test_every_target_is_tested():
    assert HOSTS.keys() == dict(TARGETS).keys()


def reached_by(model):
    """The identities of the parameters that low-rank changes learn of."""
    backward(model)
    found = set()
    for module in model.modules():
        if hasattr(module, "lora_B") and hasattr(module, "parameter_name"):
            # The other factor has a gradient once this one is not zero.
            assert module.lora_B["default"].weight.grad.abs().sum() > 0
            found.add(id(getattr(module.get_base_layer(), module.parameter_name)))
    return found


def test_low_rank_changes_reach_all_experts(converted):
    model = run_card(converted, LOAD, LORA)
    blocks = moe_blocks(model)
    expected = {id(p) for block in blocks for p in block.experts.parameters()}
    assert len(expected) == 2 * len(blocks) == 6
    assert reached_by(model) == expected


def test_low_rank_changes_reach_routers(converted):
    model = load(converted)
    config = LoraConfig(target_parameters=[target_of(model.config).router])
    routers = {id(block.router.weight) for block in moe_blocks(model)}
    assert reached_by(get_peft_model(model, config)) == routers


def test_freezing_keeps_routers_and_gates_alone(converted):
    model = run_card(converted, LOAD, FREEZE)
    backward(model)
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    expected = {id(block.router.weight) for block in moe_blocks(model)}
    gates = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1]
    assert frozen == expected | {id(gate.weight) for gate in gates}
    assert all(block.experts.down_proj.grad.abs().sum() > 0 for block in moe_blocks(model))


def test_what_bitsandbytes_has_to_skip(converted):
    """It changes linear layers alone, on a CPU to 4 bits only where their rows come in 32s."""
    model = load(converted)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    routers = [block.router for block in moe_blocks(model) if isinstance(block.router, nn.Linear)]
    around = {name.split(".")[-2] for name, layer in linear.items() if layer in routers}
    for block in moe_blocks(model):
        assert not any(isinstance(part, nn.Linear) for part in block.experts.modules())
    rows = {name.rsplit(".", 1)[-1] for name, layer in linear.items() if layer.out_features == 1}
    card = (converted / "README.md").read_text()
    said = re.findall(r'llm_int8_skip_modules=\["lm_head", "(\w+)"\]', card)
    assert set(said) == rows | around


def test_saved_again_config_lacks_older_spellings(converted, tmp_path):
    load(converted).save_pretrained(tmp_path)
    config = read_json(converted / "config.json")
    lost = config.keys() - read_json(tmp_path / "config.json").keys()
    # Where rotary embeddings are by kinds of layers, or there are none, there is no older spelling.
    older = {"rope_theta", "rope_scaling"}
    assert lost & older == (older if "rope_theta" in config.get("rope_parameters", {}) else set())
    assert "hybrid_override_pattern" in lost or "hybrid_override_pattern" not in config


def test_advice_on_copies_differs(dense, moe):
    split = (moe(dense()) / "README.md").read_text()
    copies = (moe(dense(), method="copy", top_k=2) / "README.md").read_text()
    words = ("## Is it faster?", "ordinary learning rates are ordinary steps", "no balancing loss")
    assert [word in split for word in words] == [True, True, False]
    assert [word in copies for word in words] == [False, False, True]
