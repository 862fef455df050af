"""GGUF files: what their model computes, how they are joined, and what is refused.

They are made by the gguf package from a model of transformers, which is the reference.
"""

import json
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import yaml
from gguf_files import write_gguf
from reference import dense_logits, gap, load, logits
from safetensors.torch import load_file
from tiny import QUICK
from transformers import AutoTokenizer

import upcycle
from upcycle import UpcycleError
from upcycle.conversion.inspection import inspect_model
from upcycle.models import weights
from upcycle.models.loading import load_model
from upcycle.models.opening import open_source

IDS = torch.arange(3, 259)[None]


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    return load_model(folder, torch.float32, torch.device("cpu"))(IDS).logits


def assert_same_model(path: Path, folder: Path) -> None:
    opened = open_source(str(path))
    torch.testing.assert_close(logits_of(opened.folder), logits_of(folder), rtol=1e-4, atol=1e-4)


def refusal(path: Path) -> str:
    with pytest.raises(UpcycleError) as caught:
        open_source(str(path))
    message = str(caught.value)
    assert path.name.split("-0000")[0] in message
    assert "\n" not in message
    return message


@pytest.fixture
def tiny(dense):
    return dense(num_hidden_layers=2)


# --- what is read ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 16}),
        ("llama", {"tie_word_embeddings": True, "rope_theta": 500.0}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_model_of_a_gguf_computes_what_it_was_made_from(dense, tmp_path, family, fields):
    folder = dense(family, num_hidden_layers=2, **fields)
    assert_same_model(write_gguf(tmp_path / "tiny.gguf", folder), folder)


@pytest.mark.parametrize("window", [None, 16])
def test_phi3_with_its_window(dense, tmp_path, window):
    folder = dense("phi3", num_hidden_layers=2, sliding_window=window)
    keys = {
        "phi3.attention.sliding_window": window,
        "phi3.rope.scaling.original_context_length": 64,
    }
    assert_same_model(write_gguf(tmp_path / "tiny.gguf", folder, keys=keys), folder)


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "keys"),
    [
        (LINEAR, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
        (LINEAR, {"rope.scale_linear": 4.0}),
        (
            YARN,
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.finetuned": True,
            },
        ),
        (
            YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.attn_factor": 1.0,
            },
        ),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotary_embedding(dense, tmp_path, family, rope, keys):
    rope = {"rope_theta": 10000.0} | rope
    folder = dense(family, num_hidden_layers=2, max_position_embeddings=256, rope_parameters=rope)
    keys = {f"{family}.{key}": value for key, value in keys.items()}
    path = write_gguf(tmp_path / "tiny.gguf", folder, keys=keys)
    assert_same_model(path, folder)
    assert open_source(str(path)).arch.fields["rope_parameters"]["rope_type"] == rope["rope_type"]


def llama3_divisors(original: int) -> np.ndarray:
    """As llama.cpp's converter works them out, for heads of 12 channels."""
    divisors = []
    for i in range(0, 12, 2):
        wavelength = 2 * np.pi * 10000.0 ** (i / 12)
        smooth = (original / wavelength - 1.0) / (4.0 - 1.0)
        divisors.append(1 / ((1 - min(1, max(0, smooth))) / 8.0 + min(1, max(0, smooth))))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("original", [256, 8192])
def test_rotary_embedding_of_llama_3(dense, tmp_path, original):
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": original,
    }  # fmt: skip
    folder = dense(num_hidden_layers=2, max_position_embeddings=16384, rope_parameters=rope)
    tensors = {"rope_freqs.weight": llama3_divisors(original)}
    path = write_gguf(tmp_path / "tiny.gguf", folder, tensors=tensors)
    assert_same_model(path, folder)
    assert dict(open_source(str(path)).arch.fields["rope_parameters"]) == rope


def test_rotary_embedding_of_long_phi3(dense, tmp_path):
    short, long = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long,
    }  # fmt: skip
    folder = dense(
        "phi3", num_hidden_layers=2, rope_parameters=rope, original_max_position_embeddings=64
    )
    path = write_gguf(
        tmp_path / "tiny.gguf",
        folder,
        keys={
            "phi3.attention.sliding_window": 16,
            "phi3.rope.scaling.original_context_length": 64,
            "phi3.rope.scaling.attn_factor": float(np.sqrt(1 + np.log(1024 / 64) / np.log(64))),
        },
        tensors={
            "rope_factors_short.weight": np.array(short, dtype=np.float32),
            "rope_factors_long.weight": np.array(long, dtype=np.float32),
        },
    )
    assert_same_model(path, folder)


def test_divisors_of_one_scale_nothing(tiny, tmp_path):
    tensors = {"rope_freqs.weight": np.ones(6, dtype=np.float32)}
    assert_same_model(write_gguf(tmp_path / "tiny.gguf", tiny, tensors=tensors), tiny)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16])
def test_quantised_weights_are_near_the_models(dense, tmp_path, kind):
    folder = dense(hidden_size=64, num_hidden_layers=1)
    opened = open_source(str(write_gguf(tmp_path / "tiny.gguf", folder, quantise=kind)))
    found, expected = opened.read(list(opened.tensors)), load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        step = float(expected[name].abs().max()) / 127  # of Q8_0, at most
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0.55 * step)


def test_gguf_yields_the_tokenizer(tiny, tmp_path):
    opened = open_source(str(write_gguf(tmp_path / "tiny.gguf", tiny)))
    assert opened.fingerprint() == open_source(str(tmp_path / "tiny.gguf")).fingerprint()
    text = "def cab(): # 5"
    tokenizer = AutoTokenizer.from_pretrained(opened.folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    config = json.loads((opened.folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)


def test_gguf_converts_and_leaves_no_temporary_folder(tiny, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    conversion = upcycle.convert(str(path), tmp_path / "out", **QUICK)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert list(temporary.iterdir()) == [conversion.plan.source.folder]
    del conversion
    assert list(temporary.iterdir()) == []


def test_plan_dequantises_nothing(tiny, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, quantise=gguf.GGMLQuantizationType.F16)
    monkeypatch.setattr(weights, "_put_together", lambda *_: pytest.fail("weights were read"))
    folder = upcycle.plan(str(path), **QUICK).source.folder
    assert not list(folder.glob("*.safetensors"))
    assert inspect_model(str(path))["params_total"] == inspect_model(str(tiny))["params_total"]


def test_gguf_that_changes_after_the_fingerprint_is_noticed(tiny, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    opened = open_source(str(path))
    before = opened.fingerprint()
    with path.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\x01")
    assert open_source(str(path)).fingerprint() != before
    with pytest.raises(UpcycleError, match="changed while it was read"):
        opened.read(list(opened.tensors))


LICENCE = {"license": "other", "license__name": "mine", "license__link": "https://l.org/mine"}
HUB = "https://huggingface.co/"


@pytest.mark.parametrize(
    ("general", "expected"),
    [
        (
            LICENCE | {"languages": ["en", "no"]},
            {
                "license": "other", "license_name": "mine", "license_link": "https://l.org/mine",
                "language": ["en", "no"],
            },
        ),
        (
            {"base_model__1__repo_url": HUB + "org/b", "base_model__0__repo_url": HUB + "org/a"},
            {"base_model": ["org/a", "org/b"]},
        ),
        (
            {"base_model__0__repo_url": HUB + "org/parent", "source__url": HUB + "org/itself"},
            {"base_model": ["org/itself"]},
        ),
        ({"source__huggingface__repository": "org/itself"}, {"base_model": ["org/itself"]}),
        ({"url": "https://example.org/a/b", "repo_url": "a/b", "name": "a/b"}, {}),
    ],
)  # fmt: skip
def test_card_of_a_gguf_hands_on_what_its_metadata_states(dense, tmp_path, general, expected):
    keys = {"general." + key.replace("__", "."): value for key, value in general.items()}
    path = write_gguf(tmp_path / "tiny.gguf", dense(num_hidden_layers=1), keys=keys)
    upcycle.convert(str(path), tmp_path / "out", **QUICK)
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    made = ("library_name", "pipeline_tag", "tags", "base_model_relation", "model-index")
    assert {key: value for key, value in front.items() if key not in made} == expected


# --- parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [0, 1, -1])
def test_parts_are_joined_whichever_is_named(tiny, tmp_path, named):
    write_gguf(tmp_path / "tiny.gguf", tiny, part_size=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) == 3
    assert_same_model(parts[named], tiny)


def test_missing_part_is_named(tiny, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny, part_size=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    parts[1].unlink()
    for part in (parts[0], parts[2]):
        assert "one of 3 parts, and tiny-00002-of-00003.gguf is not beside it" in refusal(part)


def test_part_under_another_name(tiny, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny, part_size=8)
    first = sorted(tmp_path.glob("tiny-*.gguf"))[0].rename(tmp_path / "tiny.gguf")
    assert "is part 1 of 3: name all of them as llama.cpp does" in refusal(first)


def test_parts_that_have_changed_places(tiny, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny, part_size=8)
    second, third = sorted(tmp_path.glob("tiny-*.gguf"))[1:]
    second.rename(tmp_path / "aside")
    third.rename(second)
    (tmp_path / "aside").rename(third)
    assert "says that it is part 3 of 3, but its name says 2 of 3" in refusal(second)


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("without", "words"),
    [
        (["blk.0.ffn_gate.weight"], "lacks blk.0.ffn_gate.weight,"),
        (["token_embd.weight"], "lacks token_embd.weight,"),
        (["output_norm.weight", "blk.1.attn_q.weight"], "blk.1.attn_q.weight, output_norm.weight,"),
    ],
)
def test_missing_tensors_are_named(tiny, tmp_path, without, words):
    assert words in refusal(write_gguf(tmp_path / "tiny.gguf", tiny, without=without))


def test_missing_layers_are_named(tiny, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, keys={"llama.block_count": 2**31})
    assert "lacks blk.2.*: it holds 2 of the 2147483648 layers" in refusal(path)


def test_header_without_tensors(tiny, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    content = bytearray(path.read_bytes())
    content[8:16] = bytes(8)  # their number
    path.write_bytes(content)
    assert "lacks blk.0.*" in refusal(path)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "context_length"])
def test_missing_key_is_named(tiny, tmp_path, key):
    path = write_gguf(tmp_path / "tiny.gguf", tiny, keys={f"llama.{key}": None})
    assert f"lacks the key llama.{key}" in refusal(path)


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate.scale", "blk.0.attn_q.bias_x", "v_head.weight", "blk.7.attn_q.weight"]
)
def test_tensor_that_is_not_understood_is_named(tiny, tmp_path, name):
    tensors = {name: np.ones(4, dtype=np.float32)}
    path = write_gguf(tmp_path / "tiny.gguf", tiny, tensors=tensors)
    assert f"holds {name}, which llama does not have: it would be lost" in refusal(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("llama.attention.clamp_kqv", 8.0, "sets llama.attention.clamp_kqv=8.0, which"),
        ("llama.logit_scale", 0.5, "sets llama.logit_scale=0.5, which"),
        ("llama.attention.sliding_window", 16, "sets llama.attention.sliding_window=16, which"),
        ("llama.expert_count", 8, "llama.expert_count=8: the source is a Mixture-of-Experts"),
        ("llama.attention.causal", False, "sets llama.attention.causal=False, which"),
        ("llama.attention.value_length", 16, "keys of 12 and values of 16 channels per head"),
        ("llama.attention.head_count_kv", [2, 1], "head_count_kv=[2, 1], where upcycle"),
        ("llama.attention.head_count", 0, "head_count=0, where upcycle understands one number"),
        ("llama.feed_forward_length", "wide", "feed_forward_length=wide, where upcycle"),
        ("llama.rope.dimension_count", 6, "rope.dimension_count=6 for heads of 12 channels"),
        ("llama.rope.scaling.type", "odd", "rotary embedding in a way that upcycle does not"),
        ("llama.rope.scaling.attn_factor", 2.0, "sets llama.rope.scaling.attn_factor=2.0, which"),
        ("llama.vocab_size", 300, "token_embd.weight in"),
        ("general.type", "adapter", "holds no model: general.type is adapter"),
    ],
)
def test_key_that_is_not_understood_is_named(tiny, tmp_path, key, value, words):
    assert words in refusal(write_gguf(tmp_path / "tiny.gguf", tiny, keys={key: value}))


def test_keys_without_effect_are_passed_over(tiny, tmp_path):
    keys = {
        "llama.expert_count": 0,
        "llama.attention.causal": True,
        "general.file_type": 0,
        "quantize.imatrix.file": "x.dat",
        "somebody.note": "hello",
    }
    assert_same_model(write_gguf(tmp_path / "tiny.gguf", tiny, keys=keys), tiny)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 1.5, 2.5, 4.0, 8.0, 8.0], "by rope_freqs.weight, whose values are not those of"),
        ([1.0, 8.0], "rope_freqs.weight in"),
    ],
)
def test_divisors_that_are_not_understood(tiny, tmp_path, values, words):
    tensors = {"rope_freqs.weight": np.array(values, dtype=np.float32)}
    assert words in refusal(write_gguf(tmp_path / "tiny.gguf", tiny, tensors=tensors))


def test_divisors_beside_another_scaling(tiny, tmp_path):
    tensors = {"rope_freqs.weight": llama3_divisors(8192)}
    keys = {"llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "tiny.gguf", tiny, tensors=tensors, keys=keys)
    assert "rope.scaling.type linear and rope_freqs.weight" in refusal(path)


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("chatglm", "of the architecture chatglm, whose text transformers splits in another way"),
        ("gemma3", "gemma3_text can't become a native MoE: it has sandwich norms"),
        ("gptneox", "gpt_neox can't become a native MoE: it has an ungated FFN"),
        ("qwen2moe", "a Mixture-of-Experts already"),
        ("mamba", "mamba can't become a native MoE: it has no FFN"),
    ],
)
def test_other_architectures(tiny, tmp_path, family, words):
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), family)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert words in refusal(path)


@pytest.mark.parametrize("kept", [0, 4, 60, 1000, -100])
def test_gguf_that_is_cut_short(tiny, tmp_path, kept):
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    path.write_bytes(path.read_bytes()[:kept])
    assert "is not a whole GGUF file" in refusal(path)


def test_other_file_by_the_name_of_a_gguf(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file")
    assert "bad.gguf is not a whole GGUF file" in refusal(tmp_path / "bad.gguf")


def test_missing_gguf(tmp_path):
    assert "none.gguf does not exist" in refusal(tmp_path / "none.gguf")


def test_gguf_files_are_merged(tiny, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny)
    upcycle.merge([str(path)] * 2, tmp_path / "out", check="none")
    assert gap(logits(load(tmp_path / "out")), dense_logits(tiny)) < 2e-5
