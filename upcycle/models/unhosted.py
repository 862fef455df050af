"""Families that no native MoE hosts, each with what is missing."""

REASONS = {
    "apertus": "has an ungated FFN with xIELU, a learned activation, which no native MoE has",
    "bamba": "mixes Mamba 2 with attention that rotates half of each head, as no native MoE does",
    "bert": "is an encoder with norms after its blocks, learned positions and an ungated FFN with "
    "biases, which no native MoE is",
    "bloom": "has an ungated FFN with biases and ALiBi positions, which no native MoE has",
    "clip": "is of images and texts with ungated FFNs with biases, and no native MoE hosts these",
    "codegen": "has an ungated FFN with biases in a parallel block, which no native MoE has",
    "distilbert": "is an encoder with norms after its blocks, learned positions and an ungated FFN "
    "with biases, which no native MoE is",
    "electra": "is an encoder with norms after its blocks, learned positions and an ungated FFN "
    "with biases, which no native MoE is",
    "exaone4": "has norms after its blocks and norms on q and k of each head, and the one native "
    "MoE with such blocks, flex_olmo, norms q and k over all heads at once",
    "falcon": "has an ungated FFN, which no native MoE with its attention has",
    "falcon_h1": "runs Mamba 2 and attention side by side in every layer, which no native MoE does",
    "falcon_mamba": "has no FFN, so there is nothing to make experts of",
    "gemma2": "caps its attention logits, which no native MoE does",
    "gemma3": "is multimodal, and its text model has sandwich norms, norms on q and k and two "
    "rotary bases, which no native MoE has together",
    "gemma3_text": "has sandwich norms, norms on q and k and two rotary bases, which no native MoE "
    "has together",
    "glm4": "has sandwich norms without norms on q and k, which no native MoE has",
    "gpt2": "has an ungated FFN with biases and learned positions, which no native MoE has",
    "gpt_bigcode": "has an ungated FFN with biases and learned positions, which no native MoE has",
    "gpt_neo": "has an ungated FFN with biases and learned positions, which no native MoE has",
    "gpt_neox": "has an ungated FFN with biases, which no native MoE decoder has",
    "gptj": "has an ungated FFN with biases in a parallel block, which no native MoE has",
    # Compared in transformers 5.23: the mask of the chosen experts is made one-hot twice, so that
    # expert_0 and expert_1 stand for "not chosen" and "chosen".
    "m2m_100": "is an encoder-decoder, and transformers' class of its kind, nllb_moe, runs only "
    "the first two of its experts, whichever its router selects",
    "mamba": "has no FFN, so there is nothing to make experts of",
    "mamba2": "has no FFN, so there is nothing to make experts of",
    "modernbert": "is an encoder with LayerNorms and two rotary bases, which no native MoE is",
    "mpt": "has an ungated FFN and ALiBi positions, which no native MoE has",
    "nomic_bert": "is an encoder with norms after its blocks, and transformers has no native MoE "
    "of that kind (llama.cpp has)",
    "olmo": "has LayerNorms without weights, which no native MoE has",
    "olmo3": "has norms after its blocks and a sliding window with rotary angles of its own on "
    "some layers, which no native MoE has together",
    "opt": "has an ungated FFN with biases and learned positions, which no native MoE has",
    "phi": "has an ungated FFN with biases in a parallel block, which no native MoE has",
    "roberta": "is an encoder with norms after its blocks, learned positions and an ungated FFN "
    "with biases, which no native MoE is",
    "starcoder2": "has an ungated FFN with biases, which no native MoE has",
    "vit": "is of images with ungated FFNs with biases, and no native MoE hosts these",
    "xlm-roberta": "is an encoder with norms after its blocks, learned positions and an ungated "
    "FFN with biases, which no native MoE is",
    "zamba": "uses one block of attention and FFN again and again between its Mamba layers, which "
    "no native MoE does",
    "zamba2": "uses a few blocks of attention and FFN again and again between its Mamba layers, "
    "which no native MoE does",
}

MOE_BY_ANOTHER_NAME = set(
    "mixtral dbrx flex_olmo gpt_oss deepseek_v2 deepseek_v3 jamba qwen3_next llama4_text "
    "switch_transformers".split()
)
