"""Models with a vision tower whose class takes any text model: an MoE takes the dense one's place,
and plain transformers loads the whole as before."""

import pytest
import torch
from reference import (
    NOISE,
    TOKENS,
    TOLERANCE,
    dense_logits,
    gap,
    load,
    load_all_on,
    logits,
    naive_sum_logits,
    noise,
    read_json,
    selections,
    weights,
)
from safetensors.torch import save_file
from tiny import HOLDERS, PLAIN_SPLIT, make_holder
from transformers import AutoModelForImageTextToText

import upcycle
from upcycle.evaluation.run import evaluate
from upcycle.models.holders import HOLDERS as KNOWN

SPLIT = {"experts": 8, "top_k": 3}
COPY = {"method": "copy", "experts": 4, "top_k": 2}
TARGETS = {
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
}
TEXT = ("language_model.", "model.text_model.", "lm_head.")
"""What names of text models' tensors begin with, in files."""
TILES = {"idefics3": 4, "smolvlm": 4, "internvl": 4, "llava": 16, "llava_next": 36, "mistral3": 4}
"""How many tokens a picture takes."""


@pytest.fixture(scope="session")
def holder(tmp_path_factory):
    """The folder of a model, made once."""
    made = {}

    def make(name, **settings):
        key = (name, str(settings))
        if key not in made:
            made[key] = make_holder(tmp_path_factory.mktemp(name), name, **settings)
        return made[key]

    return make


def parts(folder):
    return {name: t for name, t in weights(folder).items() if not name.startswith(TEXT)}


@torch.no_grad()
def picture_logits(model, family):
    """Of one picture in the midst of a text."""
    tokens = TOKENS[:1].clone()
    tokens[:, 4 : 4 + TILES[family]] = model.config.image_token_id
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    given = {"pixel_values": pixels}
    if family in ("idefics3", "smolvlm"):
        given = {"pixel_values": pixels[None]}
    if family == "llava_next":
        given = {"pixel_values": pixels.expand(1, 2, 3, 16, 16)}
    if family in ("mistral3", "llava_next"):
        given["image_sizes"] = torch.tensor([[16, 16]])
    return model(input_ids=tokens, **given).logits


def test_every_holder_is_tested():
    assert KNOWN.keys() == HOLDERS.keys()


@pytest.mark.parametrize("family", HOLDERS)
def test_copies_see_text_and_pictures_as_the_dense_model_does(holder, moe, family):
    source = holder(family)
    out = moe(source, **COPY)
    dense, made = load(source), load(out)
    assert gap(logits(made), logits(dense)) < TOLERANCE["mean"]
    expected = picture_logits(dense, family)
    assert gap(picture_logits(made, family), expected) < TOLERANCE["mean"]
    assert gap(expected, picture_logits(made.to(expected).apply(_blind), family)) > 0.01


def _blind(module):
    """Take away what a tower sees."""
    if "Projector" in type(module).__name__ or "Connector" in type(module).__name__:
        for parameter in module.parameters():
            parameter.data.zero_()


@pytest.mark.parametrize("family", HOLDERS)
def test_other_parts_keep_every_bit_and_their_names(holder, moe, family):
    source = holder(family, dtype=torch.bfloat16)
    out = moe(source, **COPY)
    expected, found = parts(source), parts(out)
    assert len(expected) > 20
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert gap(logits(load(out, torch.bfloat16)), dense_logits(source, torch.bfloat16)) < (
        NOISE * noise(source, torch.bfloat16)
    )
    before, after = (read_json(folder / "config.json") for folder in (source, out))
    del after["vision_config"]["dtype"]  # which is the whole model's
    changing = {"text_config", "dtype", "transformers_version"}
    assert {name: after[name] for name in before.keys() - changing} == {
        name: before[name] for name in before.keys() - changing
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("settings", [SPLIT, COPY], ids=["split", "copy"])
def test_every_target_fits_in_mistral_3(holder, moe, target, settings):
    source = holder("mistral3")
    if settings is SPLIT and target == "mixtral":
        settings = SPLIT | {"shared": 0}
    out = moe(source, target=target, **settings)
    text = read_json(out / "config.json")["text_config"]
    assert (text["model_type"], text["architectures"]) == (target, [TARGETS[target]])
    if settings is COPY:
        assert gap(logits(load(out)), dense_logits(source)) < TOLERANCE["mean"]
        return
    model = load(out)
    with selections(model) as selected:
        actual = logits(model)
    assert gap(actual, naive_sum_logits(load(source), out, selected)) < TOLERANCE["sum"]


def test_all_experts_of_a_split_are_the_dense_model(holder, moe):
    source = holder("mistral3")
    out = moe(source, target="mixtral", **SPLIT)
    assert gap(logits(_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]


def _all_on(folder):
    """`load_all_on` of a text model that always renormalises."""
    model, config = load_all_on(folder), read_json(folder / "config.json")["text_config"]
    assert "norm_topk_prob" not in config
    return model


def test_the_check_and_eval_find_it_exact(holder, tmp_path, text):
    source = holder("mistral3")
    quick = {"split": "random", "calibration": str(text), "calibration_tokens": 256, "seq_len": 64}
    done = upcycle.convert(str(source), tmp_path / "out", **(PLAIN_SPLIT | SPLIT | quick))
    assert done.check.exact_error < 1e-3
    found = evaluate(str(tmp_path / "out"), [str(text)], against=str(source), tokens=64, seq_len=64)
    assert found.texts[0].kl < 1
    assert "AutoModelForImageTextToText.from_pretrained" in (tmp_path / "out/README.md").read_text()


def test_trained_it_keeps_every_part(holder, moe, tmp_path, text):
    out = moe(holder("mistral3"), **COPY)
    done = upcycle.finetune(
        str(out), tmp_path / "trained", data=str(text), steps=2, seq_len=64, validation_tokens=128
    )
    before, after = weights(out), weights(done.out)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in parts(out).items())
    assert any(not torch.equal(before[n], after[n]) for n in before if ".experts." in n)
    AutoModelForImageTextToText.from_pretrained(done.out)


def test_towers_under_their_older_names_are_read(holder, moe, tmp_path):
    source = holder("llava")
    tensors = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in weights(source).items()
    }
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert gap(logits(load(moe(tmp_path, **COPY))), dense_logits(source)) < TOLERANCE["mean"]


def test_runtimes_that_take_no_such_model_are_named(holder):
    plan = upcycle.plan(str(holder("mistral3")), **(PLAIN_SPLIT | SPLIT))
    assert "the text model of a mistral3 can't be an MoE" in str(plan.runtimes["llama.cpp"])
    assert "mistral3" not in str(plan.runtimes["vLLM"])
