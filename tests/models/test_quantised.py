"""Quantised sources: each is converted as the checkpoint that it dequantises to.

They are quantised here, with the plainest code, and dequantised by hand for comparison.
"""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PLAIN_SPLIT

import upcycle
from upcycle import UpcycleError
from upcycle.models import weights
from upcycle.models.loading import load_model
from upcycle.models.opening import open_source
from upcycle.models.shards import INDEX, SINGLE
from upcycle.models.weights import fingerprint

FP8 = torch.float8_e4m3fn
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
CPU = torch.device("cpu")
QUICK = PLAIN_SPLIT | {"split": "contiguous", "router": "centroid", "experts": 4}
QUICK |= {"calibration_tokens": 128, "seq_len": 64, "check": "none"}


def quantise_blocks(weight, rows, columns):
    """FP8 with a scale for each block of so many rows and columns; smaller ones at the edges."""
    parts, matrix = torch.zeros(weight.shape).to(FP8), torch.zeros(weight.shape)
    scales = torch.zeros(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[place].abs().max() / 448
            block = (weight[place] / scales[i, j]).to(FP8)
            parts[place] = block
            matrix[place] = block.float() * scales[i, j]
    return parts, scales, matrix


def published_blocks(weight):
    parts, scales, matrix = quantise_blocks(weight, 128, 128)
    return {"weight": parts, "weight_scale_inv": scales}, matrix


def one_scale(weight):
    parts, scales, matrix = quantise_blocks(weight, *weight.shape)
    state = {"weight": parts, "weight_scale": scales[0, 0], "input_scale": torch.tensor(0.5)}
    return state, matrix


def row_scales(weight):
    parts, scales, matrix = quantise_blocks(weight, 1, weight.shape[1])
    return {"weight": parts, "weight_scale": scales}, matrix


def eight_bits(weight):
    scales = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scales).round()
    return {"weight": whole.to(torch.int8), "weight_scale": scales}, whole * scales


def in_words(values, order=range(8)):
    """Eight numbers of four bits in every 32 bits of a row, the first of `order` lowest."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for place, which in enumerate(order):
        words |= values[:, which::8].long() << (4 * place)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def four_bits(weight):
    """Groups of 16 with a scale each."""
    groups = weight.unflatten(1, (-1, 16))
    scales = groups.abs().amax(2) / 7
    whole = (groups / scales[..., None]).round().clamp(-8, 7) + 0.0  # whole numbers have no -0
    state = {
        "weight_packed": in_words(whole.flatten(1) + 8),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return state, (whole * scales[..., None]).flatten(1)


def awq(weight):
    """Inputs by outputs, in groups of 16 inputs with a scale and a zero each."""
    groups = weight.T.unflatten(0, (-1, 16))
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    whole = ((groups / scales[:, None].float()).round() + zeros[:, None]).clamp(0, 15)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    state = {
        "qweight": in_words(whole.flatten(0, 1), order),
        "qzeros": in_words(zeros, order),
        "scales": scales,
    }
    matrix = ((whole - zeros[:, None]) * scales[:, None].float()).flatten(0, 1).T
    return state, matrix.half().float()


def nvfp4(weight):
    """Groups of 16 with a scale in FP8, which are all divided by one of the matrix."""
    overall = 448 * 6 / weight.abs().max()
    groups = weight.unflatten(1, (-1, 16))
    scales = (groups.abs().amax(2) / 6 * overall).to(FP8)
    sized = groups / (scales.float() / overall)[..., None]
    codes = (sized[..., None] - E2M1).abs().argmin(-1)
    flat = codes.flatten(1)
    state = {
        "weight_packed": (flat[:, ::2] | flat[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scales,
        "weight_global_scale": overall.reshape(1),
    }
    return state, (E2M1[codes] * (scales.float() / overall)[..., None]).flatten(1)


def compressed(form, **weights):
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}
    return said | {"ignore": ["lm_head"], "quantization_status": "compressed"}


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
KINDS = {
    "fp8 blocks": (published_blocks, BLOCKS),
    "fp8": (one_scale, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 rows": (row_scales, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}),
    "modelopt": (one_scale, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "float-quantized": (
        row_scales,
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "int-quantized": (
        eight_bits,
        compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "pack-quantized": (
        four_bits,
        compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16),
    ),
    "nvfp4": (
        nvfp4,
        compressed(
            "nvfp4-pack-quantized",
            num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
            scale_dtype="torch.float8_e4m3fn",
        ),
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
    ),
}  # fmt: skip


@pytest.fixture
def quantised(dense, tmp_path):
    """Makes a folder of quantised weights and the one that it is dequantised to by hand."""

    def make(kind, family="qwen3"):
        quantise, said = KINDS[kind]
        tiny = dense(family, dtype=torch.bfloat16, num_hidden_layers=2)
        packed, plain = {}, {}
        for name, tensor in load_file(tiny / SINGLE).items():
            if not name.endswith("_proj.weight"):
                packed[name] = plain[name] = tensor
                continue
            state, matrix = quantise(tensor.float())
            module = name.removesuffix(".weight")
            packed |= {f"{module}.{key}": part.contiguous() for key, part in state.items()}
            plain[name] = matrix.bfloat16()
        folders = [shutil.copytree(tiny, tmp_path / name) for name in ("packed", "plain")]
        for folder, state in zip(folders, (packed, plain), strict=True):
            save_file(state, folder / SINGLE, metadata={"format": "pt"})
        path = folders[0] / "config.json"
        config = json.loads(path.read_text()) | {"quantization_config": said}
        path.write_text(json.dumps(config))
        return folders

    return make


def contents(out):
    """What is published, less what names the source or says when it was made."""
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    return {n: b for n, b in files.items() if n not in ("upcycle.json", "README.md")}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_matrices_are_those_that_were_dequantised_by_hand(quantised, kind):
    packed, plain = map(open_source, map(str, quantised(kind)))
    assert packed.dtype == torch.bfloat16
    shapes = [
        {n: (i.shape, i.dtype, i.nbytes) for n, i in o.tensors.items()} for o in (packed, plain)
    ]
    assert shapes[0] == shapes[1]
    found, expected = (opened.read(list(opened.tensors)) for opened in (packed, plain))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("kind", ["fp8 blocks", "pack-quantized"])
def test_result_is_that_of_the_dequantised_checkpoint(quantised, tmp_path, kind):
    packed, plain = quantised(kind)
    for folder in (packed, plain):
        upcycle.convert(str(folder), tmp_path / f"out {folder.name}", **QUICK)
    found, expected = (contents(tmp_path / f"out {name}") for name in ("packed", "plain"))
    assert found == expected
    assert b"quantization" not in found["config.json"]


def test_dense_model_is_loaded_as_it_is_converted(quantised):
    packed, plain = quantised("fp8 blocks")
    found, expected = (load_model(folder, torch.float32, CPU) for folder in (packed, plain))
    ids_BL = torch.arange(64)[None]
    with torch.no_grad():
        assert torch.equal(found(ids_BL).logits, expected(ids_BL).logits)


def test_check_compares_with_the_dequantised_model(quantised, tmp_path):
    packed, _ = quantised("fp8 blocks")
    copies = {"method": "copy", "experts": 2, "check": "fast", "seq_len": 64}
    report = upcycle.convert(str(packed), tmp_path / "out", **copies).check
    assert report.exact_error <= report.exact_tolerance
    assert [kind.ratio for kind in report.kinds] == pytest.approx([1.0] * len(report.kinds))


def test_quantised_experts_are_not_trained(quantised, tmp_path):
    packed, _ = quantised("fp8 blocks")
    with pytest.raises(UpcycleError, match="quantised weights, which are not trained"):
        upcycle.finetune(str(packed), tmp_path / "out", data="builtin", steps=1)


def test_plan_reads_no_weights_and_says_what_they_are(quantised, monkeypatch):
    packed, _ = quantised("awq")
    monkeypatch.setattr(weights, "_put_together", lambda *_: pytest.fail("weights were read"))
    made = upcycle.plan(str(packed), **QUICK)
    (note,) = [note for note in made.warnings if "quantised" in note]
    assert "14 of its tensors are dequantised to bfloat16" in note


@pytest.mark.parametrize("kind", ["fp8 blocks", "nvfp4"])
def test_fingerprint_is_of_all_parts(quantised, kind):
    packed, _ = quantised(kind)
    opened = open_source(str(packed))
    before = opened.fingerprint()
    assert fingerprint(packed) == before
    state = load_file(packed / SINGLE)
    name = next(n for n in state if n.endswith(("weight_scale", "weight_scale_inv")))
    state[name].view(torch.uint8)[-1, -1] ^= 1
    save_file(state, packed / SINGLE, metadata={"format": "pt"})
    assert open_source(str(packed)).fingerprint() != before
    with pytest.raises(UpcycleError, match="changed while it was read"):
        opened.read(list(opened.tensors))


def test_parts_may_lie_in_several_files(quantised):
    packed, plain = quantised("fp8 blocks")
    state = load_file(packed / SINGLE)
    (packed / SINGLE).unlink()
    scales = {name for name in state if name.endswith("scale_inv")}
    files = {"a.safetensors": scales, "b.safetensors": state.keys() - scales}
    for file, names in files.items():
        save_file({name: state[name] for name in names}, packed / file)
    places = {name: file for file, names in files.items() for name in names}
    (packed / INDEX).write_text(json.dumps({"weight_map": places}))
    found, expected = (open_source(str(folder)).read_layer(1) for folder in (packed, plain))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "without", "words"),
    [
        ("fp8 blocks", "mlp.up_proj.weight_scale_inv", "but no weight and its scale"),
        ("pack-quantized", "mlp.up_proj.weight_scale", "is not what config.json's"),
        ("awq", "mlp.up_proj.scales", "AWQ does not store"),
    ],
)
def test_matrix_that_lacks_a_part(quantised, kind, without, words):
    packed, _ = quantised(kind)
    state = load_file(packed / SINGLE)
    del state[f"model.layers.1.{without}"]
    save_file(state, packed / SINGLE)
    with pytest.raises(UpcycleError, match=words) as caught:
        upcycle.plan(str(packed))
    assert "model.layers.1.mlp.up_proj" in str(caught.value)


def test_scales_of_other_blocks_than_config_json_says(quantised):
    packed, _ = quantised("fp8 blocks")
    path = packed / "config.json"
    said = BLOCKS | {"weight_block_size": [64, 64]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    with pytest.raises(UpcycleError, match=r"weight_scale_inv .* in blocks of 64 × 64"):
        upcycle.plan(str(packed))


def test_fp8_without_a_word_in_config_json(quantised):
    packed, plain = quantised("fp8 blocks")
    shutil.copyfile(plain / "config.json", packed / "config.json")
    with pytest.raises(UpcycleError, match=r"where config\.json has a quant"):
        upcycle.plan(str(packed))


@pytest.mark.parametrize("kind", ["awq", "int-quantized"])
def test_library_that_is_not_installed(quantised, monkeypatch, kind):
    packed, _ = quantised(kind)
    for name in [name for name in sys.modules if name.startswith("compressed_tensors")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UpcycleError, match=r"needs `pip install upcycle\[quantised\]`"):
        upcycle.plan(str(packed))
