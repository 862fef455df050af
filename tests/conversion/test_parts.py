"""Models of several parts: the text model becomes an MoE, and nothing else is lost."""

import pytest
import torch
from published import make_published
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
from safetensors.torch import load_file, save_file
from tiny import PLAIN_SPLIT, make_moved
from transformers import AutoModelForImageTextToText

import upcycle
from upcycle.core.errors import UpcycleError

SPLIT = {"experts": 8, "top_k": 3}
COPY = {"method": "copy", "experts": 4, "top_k": 2}
TARGET = {"qwen3_5": "qwen3_5_moe", "gemma4-31b": "gemma4", "gemma4-e4b": "gemma4"}
TEXT = "model.language_model."
families = pytest.mark.parametrize("family", TARGET)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """The folder of a published model, made once."""
    made = {}

    def make(name, **settings):
        key = (name, str(settings))
        if key not in made:
            made[key] = make_published(tmp_path_factory.mktemp(name), name, **settings)
        return made[key]

    return make


def load_whole(folder, dtype=torch.float32):
    """With all its parts; fails unless every tensor finds its place."""
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model.eval()


def parts(folder):
    """All tensors that are neither the text model's nor of what drafts tokens."""
    outside = (TEXT, "lm_head.", "mtp.")
    return {name: t for name, t in weights(folder).items() if not name.startswith(outside)}


@families
@pytest.mark.parametrize("settings", [SPLIT, COPY], ids=["split", "copy"])
def test_other_parts_keep_every_bit(published, moe, family, settings):
    source = published(family, dtype=torch.bfloat16)
    out = moe(source, **settings)
    expected, found = parts(source), parts(out)
    assert found.keys() == expected.keys()
    assert len(found) > 20
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@families
def test_copies_are_the_dense_model_by_both_of_its_classes(published, moe, family):
    source = published(family)
    out = moe(source, **COPY)
    assert gap(logits(load(out)), dense_logits(source)) < TOLERANCE["mean"]
    assert gap(logits(load_whole(out)), logits(load_whole(source))) < TOLERANCE["mean"]
    assert gap(logits(load_whole(out)), dense_logits(source)) < TOLERANCE["mean"]


@families
def test_a_split_is_the_sum_of_its_experts(published, moe, family):
    source = published(family)
    out = moe(source, **SPLIT)
    assert gap(logits(load_all_on(out)), dense_logits(source)) < TOLERANCE["sum"]
    model = load(out)
    with selections(model) as selected:
        actual = logits(model)
    assert gap(actual, naive_sum_logits(load(source), out, selected)) < TOLERANCE["sum"]
    assert gap(logits(load_whole(out)), actual) < TOLERANCE["mean"]


@families
@pytest.mark.parametrize("settings", [SPLIT, COPY], ids=["split", "copy"])
def test_in_bfloat16_the_gap_is_rounding(published, moe, family, settings):
    source, dtype = published(family, dtype=torch.bfloat16), torch.bfloat16
    out = moe(source, **settings)
    loaded = load_all_on(out, dtype) if settings is SPLIT else load(out, dtype)
    assert gap(logits(loaded), dense_logits(source, dtype)) < NOISE * noise(source, dtype)


@families
def test_it_sees_pictures_as_the_dense_model_does(published, moe, family):
    source = published(family)
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


@families
def test_its_config_is_that_of_the_dense_model_with_another_text_model(published, moe, family):
    source = published(family)
    before, after = (read_json(f / "config.json") for f in (source, moe(source, **COPY)))
    assert after["model_type"] == TARGET[family]
    for field in ("image_token_id", "video_token_id", "tie_word_embeddings"):
        assert after[field] == before[field]
    kept = {k: v for k, v in before["vision_config"].items() if k != "model_type"}
    assert after["vision_config"].items() >= kept.items()


def test_fields_that_other_runtimes_read_are_kept(published, moe):
    source = published("qwen3_5")
    before, after = (
        read_json(f / "config.json")["text_config"] for f in (source, moe(source, **COPY))
    )
    for field in (
        *("attn_output_gate", "full_attention_interval", "mamba_ssm_dtype", "rope_parameters"),
        *("layer_types", "linear_num_value_heads", "mtp_use_dedicated_embeddings"),
    ):
        assert after[field] == before[field]


@families
def test_files_for_pictures_go_along(published, moe, family):
    source = published(family)
    out = moe(source, **COPY)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_what_drafts_becomes_copies_like_the_layers(published, moe):
    source = published("qwen3_5")
    out = moe(source, **COPY)
    dense, routed = weights(source), weights(out)
    drafts = {name for name in routed if name.startswith("mtp.")}
    layer = {name for name in routed if name.startswith(f"{TEXT}layers.3.")}
    inside = {name.removeprefix("mtp.layers.0.") for name in drafts if ".layers." in name}
    assert inside == {name.removeprefix(f"{TEXT}layers.3.") for name in layer}
    for name in dense.keys() & drafts:
        assert torch.equal(routed[name], dense[name])
    for expert in range(COPY["experts"]):
        copied = routed["mtp.layers.0.mlp.experts.gate_up_proj"][expert]
        rows = [dense[f"mtp.layers.0.mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
        assert torch.equal(copied, torch.cat(rows))
    assert read_json(out / "config.json")["text_config"]["mtp_num_hidden_layers"] == 1


def test_a_split_leaves_out_what_drafts_and_says_so(published, moe):
    source = published("qwen3_5")
    plan = upcycle.plan(str(source), **(PLAIN_SPLIT | SPLIT))
    assert any("15 tensors (mtp.fc.weight, …) are left out" in note for note in plan.warnings)
    out = moe(source, **SPLIT)
    assert not [name for name in weights(out) if name.startswith("mtp.")]
    assert read_json(out / "config.json")["text_config"]["mtp_num_hidden_layers"] == 0


def test_an_unknown_part_is_refused_by_name(published, tmp_path):
    source = published("qwen3_5")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = weights(source) | {"model.audio.weight": torch.zeros(3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=r"holds model\.audio\.weight, which qwen3_5 does not"):
        upcycle.plan(str(tmp_path))
    tensors = {k: t for k, t in weights(source).items() if "pos_embed" not in k}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UpcycleError, match=r"lacks the tensor model\.visual\.pos_embed\.weight"):
        upcycle.plan(str(tmp_path))


def test_matrices_that_nobody_uses_are_kept(published, moe):
    source = published("gemma4-e4b")
    kept = weights(moe(source, **COPY))
    unused = [n for n in weights(source) if ".layers.4.self_attn.k" in n]
    assert len(unused) == 2
    assert all(torch.equal(kept[name], weights(source)[name]) for name in unused)


def test_ffns_of_two_widths_are_refused(published):
    source = published("gemma4-e4b", use_double_wide_mlp=True)
    with pytest.raises(UpcycleError, match="FFNs twice as wide as the others, and no native MoE"):
        upcycle.plan(str(source))


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4-e4b"])
def test_the_check_finds_it_exact(published, tmp_path, text, family):
    quick = {"split": "random", "calibration": str(text), "calibration_tokens": 256, "seq_len": 64}
    settings = PLAIN_SPLIT | SPLIT | quick
    done = upcycle.convert(str(published(family)), tmp_path / "out", **settings)
    assert done.check.exact_error < 1e-3


def test_trained_it_keeps_every_part(published, moe, tmp_path, text):
    """transformers loads the text model alone, and so knows no other part when it writes."""
    out = moe(published("qwen3_5"), **COPY)
    done = upcycle.finetune(
        str(out), tmp_path / "trained", data=str(text), steps=2, seq_len=64, validation_tokens=128
    )
    before, after = weights(out), weights(done.out)
    assert before.keys() == after.keys()
    outside = [name for name in before if not name.startswith((TEXT, "lm_head."))]
    assert all(torch.equal(before[name], after[name]) for name in outside)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(".mlp.experts." in name for name in changed)
    assert gap(logits(load_whole(done.out)), logits(load(done.out))) < TOLERANCE["mean"]


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4-e4b"])
def test_an_expert_comes_to_a_merge_of_whole_models(published, tmp_path, family):
    """Other parts stay the base's; where one drafts tokens, each expert is its own model's, but of
    a model that was saved without that part."""
    base, quick = published(family), {"check": "none", "router": "uniform_random"}
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
def test_a_finished_conversion_is_no_source(published, moe, family):
    with pytest.raises(UpcycleError, match="Mixture-of-Experts already"):
        upcycle.plan(str(moe(published(family), **COPY)))
