"""Models that no target hosts are refused in one sentence that says why."""

import json

import pytest
from tiny import ENCODER_DECODERS, SIZES
from tiny import FAMILIES as FAMILY_FIELDS
from transformers import CONFIG_MAPPING

import upcycle
from upcycle.core.errors import UpcycleError
from upcycle.models import unhosted
from upcycle.models.families import FAMILIES

SUPPORTED = f"supported: {', '.join(sorted(FAMILY_FIELDS | ENCODER_DECODERS))}"
UNGATED = "ungated FFN"
REASONS = {
    "apertus": "xIELU",
    "bamba": "rotates half of each head",
    "bert": UNGATED,
    "bloom": "ALiBi",
    "clip": UNGATED,
    "codegen": "parallel block",
    "distilbert": UNGATED,
    "electra": UNGATED,
    "exaone4": "norms on q and k of each head",
    "falcon": UNGATED,
    "falcon_h1": "side by side",
    "falcon_mamba": "has no FFN",
    "gemma2": "caps its attention logits",
    "gemma3": "multimodal",
    "gemma3_text": "sandwich norms, norms on q and k and two rotary bases",
    "glm4": "sandwich norms without norms on q and k",
    "gpt2": "learned positions",
    "gpt_bigcode": "learned positions",
    "gpt_neo": "learned positions",
    "gpt_neox": UNGATED,
    "gptj": "parallel block",
    "m2m_100": "runs only the first two of its experts",
    "mamba": "has no FFN",
    "mamba2": "has no FFN",
    "modernbert": "LayerNorms and two rotary bases",
    "mpt": "ALiBi",
    "nomic_bert": "transformers has no native MoE of that kind",
    "olmo": "LayerNorms without weights",
    "olmo3": "rotary angles of its own on some layers",
    "opt": "learned positions",
    "phi": "parallel block",
    "roberta": UNGATED,
    "starcoder2": UNGATED,
    "vit": UNGATED,
    "xlm-roberta": UNGATED,
    "zamba": "again and again",
    "zamba2": "again and again",
    "cohere": "'cohere' is not a dense family that upcycle knows",
    "stablelm": "'stablelm' is not a dense family that upcycle knows",
}


def test_every_reason_has_its_test():
    assert unhosted.REASONS.keys() <= REASONS.keys()
    assert not unhosted.REASONS.keys() & FAMILIES.keys()


MIXTURES = """
    mixtral qwen2_moe qwen3_moe glm4_moe granitemoe granitemoeshared olmoe flex_olmo gpt_oss
    deepseek_v2 deepseek_v3 phimoe jamba dbrx switch_transformers
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
    assert f"({SUPPORTED})" in sentence


@pytest.mark.parametrize(
    ("model_type", "fields", "why"),
    [
        ("t5", {"is_gated_act": True}, "no native MoE of these has gated experts"),
        ("umt5", {}, "no native MoE of these has gated experts"),
        ("bart", {}, "an encoder-decoder of a family that upcycle does not know"),
        ("pegasus", {}, "an encoder-decoder of a family that upcycle does not know"),
    ],
)
def test_encoder_decoder(refusal, model_type, fields, why):
    sentence = refusal(model_type, **fields)
    assert why in sentence
    assert "encoder-decoder" in sentence


@pytest.mark.parametrize(("model_type", "nearest"), [("quen2", "qwen2"), ("lama", "llama")])
def test_unknown_family_names_the_nearest(tmp_path, model_type, nearest):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UpcycleError) as caught:
        upcycle.plan(str(tmp_path))
    assert f"upcycle knows; the nearest is '{nearest}' ({SUPPORTED})" in str(caught.value)


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
        upcycle.plan(str(source), target="qwen3_moe")


def test_asked_target_that_can_not_names_those_that_can(dense):
    sentence = r"`target=mixtral`: .*biases on q, k and v.*\(reachable: glm4_moe, granitemoeshared"
    with pytest.raises(UpcycleError, match=sentence):
        upcycle.plan(str(dense("qwen2")), target="mixtral")


def test_config_field_without_a_home(refusal):
    sentence = refusal("gemma", use_bidirectional_attention=True)
    assert "use_bidirectional_attention=True" in sentence
    assert "changes the forward pass of gemma" in sentence


BETA = {"llama_4_scaling_beta": 0.1}
ROPE = {"rope_type": "default", "rope_theta": 1e4}


def test_queries_that_grow_with_their_position_are_hosted_as_far_as_they_do_not(dense):
    rope = ROPE | BETA | {"original_max_position_embeddings": 512}
    sentence = (
        r"queries scaled by their position \(llama_4_scaling_beta=0.1 from position 512 on: "
        "with max_position_embeddings=512 in config.json the model is hosted exactly up to there"
    )
    with pytest.raises(UpcycleError, match=sentence):
        upcycle.plan(str(dense("ministral3", rope_parameters=rope)))
    shorter = dense("ministral3", rope_parameters=rope, max_position_embeddings=512)
    assert upcycle.plan(str(shorter)).config["rope_parameters"] == ROPE


@pytest.mark.parametrize("rope", [ROPE, ROPE | BETA], ids=["no beta", "no original length"])
def test_queries_without_a_scale(refusal, rope):
    sentence = refusal("ministral3", rope_parameters=rope)
    assert "transformers can't run it" in sentence
    assert "set llama_4_scaling_beta to 0" in sentence


def test_norms_before_and_after(dense):
    sentence = r"norms before and after attention and FFN \(use_post_norm=true\)"
    with pytest.raises(UpcycleError, match=sentence):
        upcycle.plan(str(dense("hyperclovax", use_post_norm=True)))


def test_logits_of_nothing(refusal):
    assert "logits_scaling=0.0" in refusal("hyperclovax", logits_scaling=0.0)


def test_window_of_no_length(refusal):
    assert "no sliding_window" in refusal("ministral", sliding_window=None)


def test_plain_model_on_a_target_made_for_others(dense):
    sentence = "granitemoe_swa is only for models with .*layers without a rotary embedding"
    with pytest.raises(UpcycleError, match=sentence):
        upcycle.plan(str(dense()), target="granitemoe_swa")


def test_partial_rotary_in_a_family_that_ignores_it(refusal):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert "partial_rotary_factor=0.5" in refusal("llama", rope_parameters=rope)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "hqq", "quanto"])
def test_weights_that_nothing_here_dequantises(refusal, method):
    sentence = refusal("llama", quantization_config={"quant_method": method, "bits": 4})
    assert f"a quantization_config of {method}, which can't be dequantised here" in sentence
    assert sentence.endswith(
        "start from the unquantised checkpoint, which the card of this one names as base_model"
    )


def test_weights_that_are_quantised_in_a_rotated_basis(refusal):
    said = {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}}
    assert "rotates or thins out the weights" in refusal("llama", quantization_config=said)
