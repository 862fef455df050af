"""Which group each parameter of a model is in, and what trains of models of several parts."""

import pytest
from published import make_published
from reference import load
from tiny import make_holder
from torch import nn

from upcycle import UpcycleError
from upcycle.finetune.routers import Scale
from upcycle.finetune.settings import Training
from upcycle.finetune.trainable import add_lora, freeze_all_but, members, summary, trained
from upcycle.models.blocks import moe_blocks

COPY = {"method": "copy", "experts": 4, "top_k": 2}
TOWERS = (
    "vision_tower.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
    "multi_modal_projector.",
)


def known(model):
    blocks = moe_blocks(model)
    return members(model, blocks, [Scale(1.0, 1.0)] * len(blocks))


def groups(model):
    return {member.name: member.group for member in known(model).values()}


def test_delta_net_is_attention(dense, moe):
    found = groups(load(moe(dense("qwen3_5_text"), **COPY)))
    place = "model.layers.0.linear_attn."
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"):
        assert found[f"{place}{name}.weight"] == "attention"
    # A convolution has a few weights for each channel.
    assert found[f"{place}conv1d.weight"] == "norms, embeddings"


@pytest.fixture(scope="module", params=["gemma4-e4b", "mistral3"])
def several(request, tmp_path_factory, moe):
    """An MoE with a vision tower, and perhaps an audio tower."""
    make = make_holder if request.param == "mistral3" else make_published
    source = make(tmp_path_factory.mktemp("several"), request.param)
    return load(moe(source, **COPY))


def test_towers_are_parts_that_text_does_not_pass(several):
    found = groups(several)
    towers = {name for name in found if name.startswith(tuple(f"model.{t}" for t in TOWERS))}
    assert len(towers) > 20
    assert {name for name, group in found.items() if group == "other parts"} == towers
    assert found["model.language_model.layers.0.self_attn.q_proj.weight"] == "attention"
    assert found["model.language_model.embed_tokens.weight"] == "norms, embeddings"


def test_all_is_all_that_text_passes(several):
    model, table = several, known(several)
    freeze_all_but(model, table, Training(train="all"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad and p.numel()}
    assert frozen == {name for name, group in groups(model).items() if group == "other parts"}
    shown = summary(table, trained(model, table))
    assert shown["other parts"]["trained"] == 0
    assert shown["attention"]["trained"] == shown["attention"]["parameters"]


def test_a_part_that_starts_after_the_last_step_is_frozen(several):
    model, table = several, known(several)
    starts = {"embeddings": 1.0, "attention": 1.0}
    freeze_all_but(model, table, Training(train="all", starts=starts))
    parts = {item.member.part for item in trained(model, table)}
    assert parts == {"router", "norms", "ffn"}
    changed = add_lora(model, table, Training(train="all", lora=2, starts={"attention": 1.0}))
    assert {item.member.part for item in trained(changed, table)} == {"router", "ffn"}


def test_parts_that_never_begin_are_not_said_to_be_missing(several):
    frozen = Training(train="experts", starts={"ffn": 1.0})
    for train in (freeze_all_but, add_lora):
        settings = frozen.model_copy(update={"lora": 2 if train is add_lora else None})
        with pytest.raises(UpcycleError, match="nothing begins to move before the last step"):
            train(several, known(several), settings)


def test_low_rank_changes_leave_towers_alone(several):
    table = known(several)
    changed = add_lora(several, table, Training(train="all", lora=2))
    reached = {item.member.group for item in trained(changed, table)}
    assert {"attention", "experts", "router"} <= reached
    assert "other parts" not in reached
    assert any(isinstance(module, nn.Linear) for module in changed.modules())
