"""Models that no target hosts are refused in one sentence that says why."""

import json

import pytest
from tiny import FAMILIES as FAMILY_FIELDS
from tiny import SIZES
from transformers import CONFIG_MAPPING

import upcycle
from upcycle.core.errors import UpcycleError
from upcycle.models.families import FAMILIES

UNGATED = "ungated FFN"
REASONS = {
    "gemma2": "caps its attention logits",
    "gemma3": "multimodal",
    "gemma3_text": "sandwich norms",
    "gpt2": UNGATED,
    "gpt_neox": UNGATED,
    "opt": UNGATED,
    "phi": UNGATED,
    "falcon": UNGATED,
    "starcoder2": UNGATED,
    "bert": "encoder",
    "cohere": "not a dense family that upcycle knows",
    "stablelm": "not a dense family that upcycle knows",
    "mamba": "not a dense family that upcycle knows",
}
MIXTURES = """
    mixtral qwen2_moe qwen3_moe glm4_moe granitemoe granitemoeshared olmoe flex_olmo gpt_oss
    deepseek_v2 deepseek_v3 phimoe jamba dbrx
""".split()


@pytest.fixture
def refusal(tmp_path):
    """The sentence with which a plan refuses a config; no weights are needed."""

    def refuse(model_type, **fields):
        config = CONFIG_MAPPING[model_type]().to_dict() | fields
        if model_type in FAMILY_FIELDS:
            config = config | SIZES | FAMILY_FIELDS[model_type] | fields
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UpcycleError) as caught:
            upcycle.plan(str(tmp_path))
        sentence = str(caught.value)
        assert "\n" not in sentence
        assert "Error" not in sentence
        return sentence

    return refuse


@pytest.mark.parametrize("model_type", sorted(REASONS))
def test_architecture_that_no_moe_hosts(refusal, model_type):
    sentence = refusal(model_type)
    assert model_type in sentence
    assert REASONS[model_type] in sentence
    assert f"(supported: {', '.join(sorted(FAMILIES))})" in sentence


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("t5", {"feed_forward_proj": "relu"}),
        ("t5", {"feed_forward_proj": "gated-gelu"}),
        ("umt5", {}),
        ("bart", {}),
        ("m2m_100", {}),
    ],
)
def test_an_encoder_decoder_is_refused_whatever_its_ffn(refusal, model_type, fields):
    """Of T5, version 1.0 has no gate and 1.1 has one."""
    assert refusal(model_type, **fields) == (
        f"{model_type} is an encoder-decoder, and upcycle converts decoders alone "
        f"(supported: {', '.join(sorted(FAMILIES))})"
    )


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixture_as_source(refusal, model_type):
    assert (
        refusal(model_type)
        == f"the source is a {model_type} model, which is a Mixture-of-Experts already"
    )


def test_mixture_of_a_class_that_may_be_dense(refusal):
    sentence = refusal("granitemoehybrid", num_local_experts=4, num_experts_per_tok=2)
    assert sentence == (
        "the source is a granitemoehybrid model, which is a Mixture-of-Experts already"
    )


def test_mixture_among_layers_of_other_kinds(refusal):
    kinds = ["linear_attention", "moe", "full_attention", "mlp"]
    sentence = refusal("nemotron_h", layers_block_type=kinds)
    assert sentence == "the source is a nemotron_h model, which is a Mixture-of-Experts already"


def test_finished_conversion_as_source(dense, moe):
    hybrid = "granitemoehybrid"
    for family, name in (("llama", "mixtral"), ("olmo2", "flex_olmo"), (hybrid, hybrid)):
        out = moe(dense(family), method="copy", experts=2, top_k=2, target=name)
        with pytest.raises(UpcycleError, match="Mixture-of-Experts already"):
            upcycle.plan(str(out))


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_biases_in_the_ffn(dense, family):
    source = dense(family, mlp_bias=True)
    with pytest.raises(UpcycleError, match="no native MoE architecture hosts") as caught:
        upcycle.plan(str(source))
    assert "biases in the FFN (mlp_bias=true)" in str(caught.value)


def test_two_kinds_of_layers_with_norms_on_q_and_k(dense):
    source = dense("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(UpcycleError, match=r"a sliding window on some layers \(sliding_window=8\)"):
        upcycle.plan(str(source))


def test_asked_target_that_can_not_names_those_that_can(dense):
    sentence = r"--target mixtral: .*biases on q, k and v.*\(reachable: glm4_moe, granitemoeshared"
    with pytest.raises(UpcycleError, match=sentence):
        upcycle.plan(str(dense("qwen2")), target="mixtral")


def test_config_field_without_a_home(refusal):
    sentence = refusal("gemma", use_bidirectional_attention=True)
    assert "use_bidirectional_attention=True" in sentence
    assert "changes the forward pass of gemma" in sentence


def test_partial_rotary_in_a_family_that_ignores_it(refusal):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "partial_rotary_factor=0.5" in refusal("llama", rope_parameters=rope)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_weights(refusal, method):
    sentence = refusal("llama", quantization_config={"quant_method": method, "bits": 4})
    assert "quantization_config" in sentence
    assert "unquantised checkpoint" in sentence
