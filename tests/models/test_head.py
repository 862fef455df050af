"""A model's head, on what its decoder said before, gives the logits of the whole model."""

import pytest
import torch
from reference import TOKENS
from tiny import SIZES
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from upcycle.models.head import decode, drop_layers

WINDOW = TOKENS[0]
MODELS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "granite": {"logits_scaling": 2.0},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48, "pad_token_id": 1},
}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_logits_are_the_whole_models(family):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | MODELS[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = model(input_ids=WINDOW[None], use_cache=False).logits[0]
    decoded = decode(model, WINDOW)
    assert torch.equal(decoded.logits(slice(None)), expected)
    assert torch.equal(model(input_ids=WINDOW[None], use_cache=False).logits[0], expected)
    drop_layers(model)
    for rows in (slice(None), slice(0, 7), slice(7, 99)):
        torch.testing.assert_close(decoded.logits(rows), expected[rows])
    kept = sum(p.numel() for p in model.parameters())
    assert kept <= SIZES["vocab_size"] * (SIZES["hidden_size"] + 1)


@torch.no_grad()
def test_hidden_states_keep_the_models_dtype(dense):
    model = AutoModelForCausalLM.from_pretrained(dense(), dtype=torch.bfloat16)
    decoded = decode(model, WINDOW)
    assert decoded.output.last_hidden_state.dtype == torch.bfloat16
    assert decoded.logits(slice(3, 5)).dtype == torch.float32
    assert decoded.logits(slice(3, 5)).shape == (2, SIZES["vocab_size"])
