"""The vocabulary between dense families and MoE targets: neither names the other."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from upcycle.models.holders import HOLDERS


class Trait(StrEnum):
    """What a forward pass may do besides plain llama; a target accepts a trait or refuses it."""

    BIDIRECTIONAL = "attention to both sides"
    ENCODER = "an encoder that its decoder looks at"
    RELATIVE_POSITIONS = "learned biases of attention by distance"
    QKV_BIAS = "biases on q, k and v"
    O_BIAS = "a bias on the attention output"
    QK_NORM = "a norm per head on q and k"
    QK_NORM_FULL = "a norm over all heads on q and k"
    POST_NORM = "norms after attention and FFN"
    SANDWICH_NORM = "norms before and after attention and FFN"
    SLIDING_WINDOW = "a sliding window on every layer"
    MIXED_WINDOW = "a sliding window on some layers"
    SINKS = "attention sinks"
    PARTIAL_ROTARY = "rotary embedding on a part of each head"
    LAYERS_WITHOUT_ROTARY = "layers without a rotary embedding"
    LAYER_ROTARY = "a rotary base per layer"
    QUERY_SCALING = "queries scaled by their position"
    INTERLEAVED_ROTARY = "rotary embedding of neighbouring channels"
    EMBEDDING_MULTIPLIER = "scaled embeddings"
    RESIDUAL_MULTIPLIER = "scaled residual branches"
    ATTENTION_MULTIPLIER = "its own attention scale"
    LOGITS_SCALING = "scaled logits"
    CONVOLUTIONS = "convolutions in place of attention"
    MAMBA = "Mamba in place of attention"
    LONE_BLOCKS = "Mamba, attention or an FFN alone in a layer"
    UNGATED = "an FFN without a gate"
    UNSQUARED = "another activation than relu² in an FFN without a gate"
    LATENT_ATTENTION = "keys and values made from a latent (MLA)"
    MLP_BIAS = "biases in the FFN"
    DELTA_NET = "gated DeltaNet layers"
    GEMMA4 = "Gemma 4's norms, rotary bases and scaled layers"


@dataclass(frozen=True)
class Architecture:
    """A dense model in the vocabulary that targets understand."""

    family: str
    fields: Mapping[str, Any]
    """Config fields in the common vocabulary."""
    traits: Mapping[Trait, str]
    """What a target must accept, with the config field and value that asks for it."""
    intermediate_size: int
    bare_layers: tuple[int, ...] = ()
    """Layers without an FFN."""
    whole: str = ""
    """The model_type of the model that it is the text model of, if that has other parts, too."""
    head: bool = True
    """Whether it makes logits of hidden states; some encoders are stored without what does."""
    encoder_layers: int = 0
    """Of an encoder-decoder, how many of the layers are the encoder's, which come first."""

    @property
    def encoder(self) -> bool:
        """Whether every token sees all others, so that hidden states are what it is for."""
        return Trait.BIDIRECTIONAL in self.traits

    @property
    def goes_on(self) -> bool:
        """Whether it goes on from a text with nothing beside it, as decoders do."""
        return not self.encoder and not self.encoder_layers

    @property
    def loader(self) -> str:
        """The class of transformers that loads it by its folder, or its host."""
        if self.encoder:
            return "AutoModel"
        if self.encoder_layers:
            return "AutoModelForSeq2SeqLM"
        return "AutoModelForImageTextToText" if self.whole in HOLDERS else "AutoModelForCausalLM"

    @property
    def task(self) -> str:
        """What the hub calls what it does."""
        if self.encoder:
            return "feature-extraction"
        return "text2text-generation" if self.encoder_layers else "text-generation"

    @property
    def output(self) -> str:
        """What it puts out at last."""
        return "logits" if self.head else "hidden states"

    @property
    def hidden_size(self) -> int:
        return int(self.fields["hidden_size"])

    @property
    def head_dim(self) -> int:
        """Channels of a head's queries and keys. (Where these are made from a latent, the field of
        this name is what transformers rotates of them.)"""
        if Trait.LATENT_ATTENTION in self.traits:
            return int(self.fields["qk_nope_head_dim"] + self.fields["qk_rope_head_dim"])
        return int(self.fields["head_dim"])

    @property
    def cached(self) -> int:
        """Values that a layer keeps of every token: keys and values, or the latent that they are
        made from and what all heads rotate."""
        if Trait.LATENT_ATTENTION in self.traits:
            return int(self.fields["kv_lora_rank"] + self.fields["qk_rope_head_dim"])
        return 2 * int(self.fields["num_key_value_heads"]) * self.head_dim

    @property
    def num_layers(self) -> int:
        return int(self.fields["num_hidden_layers"])

    @property
    def ffn_layers(self) -> list[int]:
        """Those that have an FFN."""
        return [i for i in range(self.num_layers) if i not in self.bare_layers]

    @property
    def ffn_params(self) -> int:
        """Weights of a dense FFN."""
        matrices = 2 if Trait.UNGATED in self.traits else 3
        return matrices * self.hidden_size * self.intermediate_size

    @property
    def tied(self) -> bool:
        return bool(self.fields["tie_word_embeddings"])

    def untied(self) -> "Architecture":
        """The same with output embeddings of its own."""
        return replace(self, fields={**self.fields, "tie_word_embeddings": False})

    @property
    def sliding_window(self) -> int | None:
        """The window of the layers that have one; None if every layer sees everything."""
        sliding = "sliding_attention" in self.fields["layer_types"]
        return self.fields["sliding_window"] if sliding else None
