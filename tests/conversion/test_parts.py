"""Models of several parts: the text model becomes an MoE, and nothing else is lost.

Two families have an MoE of several parts of their own; of the others, whose class takes any text
model, an MoE takes the dense one's place. Plain transformers loads both as before.
"""

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
    naive_sum,
    noise,
    read_json,
    weights,
)
from safetensors.torch import load_file, save_file
from tiny import HOLDERS, PLAIN_SPLIT, edited, make_moved
from transformers import AutoModelForImageTextToText

import upcycle
from upcycle.core.errors import UpcycleError
from upcycle.evaluation.run import evaluate
from upcycle.models.holders import HOLDERS as KNOWN

SPLIT = {"experts": 8, "top_k": 3}
COPY = {"method": "copy", "experts": 4, "top_k": 2}
TARGET = {"qwen3_5": "qwen3_5_moe", "gemma4-31b": "gemma4", "gemma4-e4b": "gemma4"}
TARGETS = {
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
}
"""Of a model that takes any text model."""
TEXT = ("model.language_model.", "language_model.", "model.text_model.", "lm_head.")
"""What names of text models' tensors begin with, in files."""
TILES = {"idefics3": 4, "smolvlm": 4, "internvl": 4, "llava": 16, "llava_next": 36, "mistral3": 4}
"""How many tokens a picture takes."""
QUICK = PLAIN_SPLIT | SPLIT | {"split": "random", "calibration_tokens": 256, "seq_len": 64}
families = pytest.mark.parametrize("family", TARGET)
holders = pytest.mark.parametrize("family", HOLDERS)
both_ways = pytest.mark.parametrize("settings", [SPLIT, COPY], ids=["split", "copy"])


def load_whole(folder, dtype=torch.float32):
    """With all its parts; fails unless every tensor finds its place."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model.eval()


def parts(folder):
    """All tensors that are neither the text model's nor of what drafts tokens."""
    outside = (*TEXT, "mtp.")
    return {name: t for name, t in weights(folder).items() if not name.startswith(outside)}


def test_every_holder_is_tested():
    assert KNOWN.keys() == HOLDERS.keys()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((family, settings) for family in TARGET for settings in (SPLIT, COPY)),
        *((family, COPY) for family in HOLDERS),
    ],
)
def test_other_parts_keep_every_bit_and_the_text_model_is_rounded(whole, moe, family, settings):
    source, dtype = whole(family, dtype=torch.bfloat16), torch.bfloat16
    out = moe(source, **settings)
    expected, found = parts(source), parts(out)
    assert found.keys() == expected.keys()
    assert len(found) > 20
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    loaded = load_all_on(out, dtype) if settings is SPLIT else load(out, dtype)
    assert gap(logits(loaded), dense_logits(source, dtype)) < NOISE * noise(source, dtype)


@families
def test_copies_are_the_dense_model_by_both_of_its_classes(whole, moe, family):
    source = whole(family)
    out = moe(source, **COPY)
    assert gap(logits(load(out)), dense_logits(source)) < TOLERANCE["mean"]
    assert gap(logits(load_whole(out)), logits(load_whole(source))) < TOLERANCE["mean"]
    assert gap(logits(load_whole(out)), dense_logits(source)) < TOLERANCE["mean"]


@families
def test_a_split_is_the_sum_of_its_experts(whole, moe, family):
    source = whole(family)
    out = moe(source, **SPLIT)
    assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]
    actual, expected = naive_sum(source, out)
    assert gap(actual, expected) < TOLERANCE["sum"]
    assert gap(logits(load_whole(out)), actual) < TOLERANCE["mean"]


@pytest.mark.parametrize("target", TARGETS)
@both_ways
def test_every_target_fits_in_mistral_3(whole, moe, target, settings):
    source = whole("mistral3")
    if settings is SPLIT and target == "mixtral":
        settings = SPLIT | {"shared": 0}
    out = moe(source, target=target, **settings)
    text = read_json(out / "config.json")["text_config"]
    assert (text["model_type"], text["architectures"]) == (target, [TARGETS[target]])
    if settings is COPY:
        assert gap(logits(load(out)), dense_logits(source)) < TOLERANCE["mean"]
    else:
        assert gap(*naive_sum(source, out)) < TOLERANCE["sum"]


def test_all_experts_of_a_split_are_the_dense_model(whole, moe):
    """In a text model that always renormalises."""
    source = whole("mistral3")
    out = moe(source, target="mixtral", **SPLIT)
    assert "norm_topk_prob" not in read_json(out / "config.json")["text_config"]
    assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]


# --- pictures --------------------------------------------------------------------------------


@families
def test_it_sees_pictures_as_the_dense_model_does(whole, moe, family):
    source = whole(family)
    models = load_whole(source), load_whole(moe(source, **COPY))
    expected, actual = (picture_logits(model, family) for model in models)
    text_alone = logits(models[0], picture_tokens(models[0]))
    assert gap(actual, expected) < TOLERANCE["mean"]
    assert gap(expected, text_alone) > 0.1


def picture_tokens(model):
    """One picture that takes the place of four tokens of a text."""
    tokens = TOKENS[:1].clone()
    tokens[:, 4:8] = model.config.image_token_id
    return tokens


@torch.no_grad()
def picture_logits(model, family):
    tokens = picture_tokens(model)
    size = 3 * 4 * 4 * (2 if family == "qwen3_5" else 1)
    pixels = torch.rand(16, size, generator=torch.Generator().manual_seed(2))
    picture = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]])}
    if family != "qwen3_5":
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        picture = {"pixel_values": pixels[None], "image_position_ids": places[None]}
    kinds = (tokens == model.config.image_token_id).long()
    return model(input_ids=tokens, mm_token_type_ids=kinds, **picture).logits


@holders
def test_copies_see_text_and_pictures_as_the_dense_model_does(whole, moe, family):
    source = whole(family)
    out = moe(source, **COPY)
    dense, made = load(source), load(out)
    assert gap(logits(made), logits(dense)) < TOLERANCE["mean"]
    expected = held_picture_logits(dense, family)
    assert gap(held_picture_logits(made, family), expected) < TOLERANCE["mean"]
    assert gap(expected, held_picture_logits(made.to(expected).apply(_blind), family)) > 0.01


def _blind(module):
    """Take away what a tower sees."""
    if "Projector" in type(module).__name__ or "Connector" in type(module).__name__:
        for parameter in module.parameters():
            parameter.data.zero_()


@torch.no_grad()
def held_picture_logits(model, family):
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


# --- configs and files ------------------------------------------------------------------------


@families
def test_its_config_is_that_of_the_dense_model_with_another_text_model(whole, moe, family):
    source = whole(family)
    before, after = (read_json(f / "config.json") for f in (source, moe(source, **COPY)))
    assert after["model_type"] == TARGET[family]
    for field in ("image_token_id", "video_token_id", "tie_word_embeddings"):
        assert after[field] == before[field]
    kept = {k: v for k, v in before["vision_config"].items() if k != "model_type"}
    assert after["vision_config"].items() >= kept.items()


@holders
def test_a_holders_config_changes_its_text_model_alone(whole, moe, family):
    source = whole(family, dtype=torch.bfloat16)
    before, after = (read_json(f / "config.json") for f in (source, moe(source, **COPY)))
    del after["vision_config"]["dtype"]  # which is the whole model's
    kept = before.keys() - {"text_config", "dtype", "transformers_version"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_fields_that_other_runtimes_read_are_kept(whole, moe):
    source = whole("qwen3_5")
    before, after = (
        read_json(f / "config.json")["text_config"] for f in (source, moe(source, **COPY))
    )
    for field in (
        *("attn_output_gate", "full_attention_interval", "mamba_ssm_dtype", "rope_parameters"),
        *("layer_types", "linear_num_value_heads", "mtp_use_dedicated_embeddings"),
    ):
        assert after[field] == before[field]


@families
def test_files_for_pictures_go_along(whole, moe, family):
    source = whole(family)
    out = moe(source, **COPY)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_what_drafts_becomes_copies_like_the_layers(whole, moe):
    source = whole("qwen3_5")
    out = moe(source, **COPY)
    dense, routed = weights(source), weights(out)
    drafts = {name for name in routed if name.startswith("mtp.")}
    place = "model.language_model.layers.3."
    layer = {name for name in routed if name.startswith(place)}
    inside = {name.removeprefix("mtp.layers.0.") for name in drafts if ".layers." in name}
    assert inside == {name.removeprefix(place) for name in layer}
    for name in dense.keys() & drafts:
        assert torch.equal(routed[name], dense[name])
    for expert in range(COPY["experts"]):
        copied = routed["mtp.layers.0.mlp.experts.gate_up_proj"][expert]
        rows = [dense[f"mtp.layers.0.mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
        assert torch.equal(copied, torch.cat(rows))
    assert read_json(out / "config.json")["text_config"]["mtp_num_hidden_layers"] == 1


def test_a_split_leaves_out_what_drafts_and_says_so(whole, moe):
    source = whole("qwen3_5")
    plan = upcycle.plan(str(source), **(PLAIN_SPLIT | SPLIT))
    assert any("15 tensors (mtp.fc.weight, …) are left out" in note for note in plan.warnings)
    out = moe(source, **SPLIT)
    assert not [name for name in weights(out) if name.startswith("mtp.")]
    assert read_json(out / "config.json")["text_config"]["mtp_num_hidden_layers"] == 0


def test_an_unknown_part_is_refused_by_name(whole, tmp_path):
    source = whole("qwen3_5")
    edited(source, tmp_path, lambda tensors: tensors | {"model.audio.weight": torch.zeros(3)})
    with pytest.raises(UpcycleError, match=r"holds model\.audio\.weight, which qwen3_5 does not"):
        upcycle.plan(str(tmp_path))
    edited(source, tmp_path, lambda t: {k: t[k] for k in t if "pos_embed" not in k})
    with pytest.raises(UpcycleError, match=r"lacks the tensor model\.visual\.pos_embed\.weight"):
        upcycle.plan(str(tmp_path))


def test_towers_under_their_older_names_are_read(whole, moe, tmp_path):
    def older(tensors):
        tower = ("vision_tower.", "vision_tower.vision_model.")
        return {name.replace(*tower): tensor for name, tensor in tensors.items()}

    source = whole("llava")
    out = moe(edited(source, tmp_path, older), **COPY)
    assert gap(logits(load(out)), dense_logits(source)) < TOLERANCE["mean"]


def test_runtimes_that_take_no_such_model_are_named(whole):
    plan = upcycle.plan(str(whole("mistral3")), **(PLAIN_SPLIT | SPLIT))
    assert "the text model of a mistral3 can't be an MoE" in str(plan.runtimes["llama.cpp"])
    assert "mistral3" not in str(plan.runtimes["vLLM"])


def test_matrices_that_nobody_uses_are_kept(whole, moe):
    source = whole("gemma4-e4b")
    kept = weights(moe(source, **COPY))
    unused = [n for n in weights(source) if ".layers.4.self_attn.k" in n]
    assert len(unused) == 2
    assert all(torch.equal(kept[name], weights(source)[name]) for name in unused)


def test_ffns_of_two_widths_are_refused(whole):
    source = whole("gemma4-e4b", use_double_wide_mlp=True)
    with pytest.raises(UpcycleError, match="FFNs twice as wide as the others, and no native MoE"):
        upcycle.plan(str(source))


# --- check, training and merging ---------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4-e4b", "mistral3"])
def test_the_check_finds_it_exact(whole, tmp_path, text, family):
    source, out = str(whole(family)), tmp_path / "out"
    done = upcycle.convert(source, out, **(QUICK | {"calibration": str(text)}))
    assert done.check.exact_error < 1e-3
    if family == "mistral3":
        found = evaluate(str(out), [str(text)], against=source, tokens=64, seq_len=64)
        assert found.texts[0].kl < 1
        assert "AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", ["qwen3_5", "mistral3"])
def test_trained_it_keeps_every_part(whole, moe, tmp_path, text, family):
    """transformers loads qwen3_5's text model alone, and so knows no other part when it writes."""
    out = moe(whole(family), **COPY)
    done = upcycle.finetune(
        str(out), tmp_path / "trained", data=str(text), steps=2, seq_len=64, validation_tokens=128
    )
    before, after = weights(out), weights(done.out)
    assert before.keys() == after.keys()
    outside = [name for name in before if not name.startswith(TEXT)]
    assert all(torch.equal(before[name], after[name]) for name in outside)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".experts." in name for name in changed)
    assert gap(logits(load_whole(done.out)), logits(load(done.out))) < TOLERANCE["mean"]


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4-e4b"])
def test_an_expert_comes_to_a_merge_of_whole_models(whole, tmp_path, family):
    """Other parts stay the base's; where one drafts tokens, each expert is its own model's, but of
    a model that was saved without that part."""
    base, quick = whole(family), {"check": "none", "router": "uniform_random"}
    moved, bare = (make_moved(tmp_path / f"m{seed}", base, seed) for seed in (1, 2))
    path = bare / "model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "mtp." not in n}, path)
    upcycle.merge([str(base), str(bare)], tmp_path / "two", **quick)
    upcycle.merge(tmp_path / "two", tmp_path / "out", add=str(moved), check="none")
    expected, found = parts(base), parts(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert gap(logits(load_whole(tmp_path / "out")), logits(load(tmp_path / "out"))) < 1e-5
    two, out = weights(tmp_path / "two"), weights(tmp_path / "out")
    drafts = [name for name in out if name.startswith("mtp.") and ".experts." in name]
    assert bool(drafts) == (family == "qwen3_5")
    for name in drafts:
        assert torch.equal(out[name][:2], two[name])
        assert torch.equal(out[name][0], out[name][1])
        assert not torch.equal(out[name][1], out[name][2])
    if drafts:
        down = weights(moved)["mtp.layers.0.mlp.down_proj.weight"]
        assert torch.equal(out["mtp.layers.0.mlp.experts.down_proj"][2], down)


@families
def test_a_finished_conversion_is_no_source(whole, moe, family):
    with pytest.raises(UpcycleError, match="Mixture-of-Experts already"):
        upcycle.plan(str(moe(whole(family), **COPY)))
