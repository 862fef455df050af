"""A language model in two halves: its decoder is run once, its head as often as wanted.

A window's logits are as many as its tokens times the vocabulary, its hidden states a hundredth of
that. So hidden states are what is kept of a model, with the head that makes logits of them again.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upcycle.models.halves import halves


@dataclass(frozen=True)
class Decoded:
    """What a model's decoder says of one window of tokens."""

    model: Any
    output: Any
    """What its decoder returns, of the class that its head expects: last_hidden_state [1, T, D],
    in the model's dtype, on the CPU."""
    tokens_T: Tensor
    """That the decoder was given, each of which tells the next: of a decoder alone, the window."""

    @torch.no_grad()
    def logits(self, rows: slice) -> Tensor:
        """Logits [T, V], in float32, of some of the window's tokens.

        They come from the model's own forward, with a decoder that knows the answer: what else is
        done to logits, such as scaling or soft caps, is transformers' own.
        """
        decoder, hidden_BTD = _decoder(self.model), self.output.last_hidden_state[:, rows]
        known = type(self.output)(last_hidden_state=hidden_BTD.to(self.model.device))
        decoder.forward = lambda *_, **__: known
        ids_BT = torch.zeros(hidden_BTD.shape[:2], dtype=torch.int64, device=self.model.device)
        if self.model.config.is_encoder_decoder:
            # What the encoder put out no longer matters either.
            asked = {"decoder_input_ids": ids_BT, "encoder_outputs": known}
        else:
            asked = {"input_ids": ids_BT}
        try:
            logits_BTV: Tensor = self.model(**asked, use_cache=False).logits
        finally:
            del decoder.forward
        return logits_BTV[0].float()


@torch.no_grad()
def decode(model: Any, window_L: Tensor) -> Decoded:
    """Run a model's decoder over a window of tokens [L], or its second half after the encoder."""
    asked = given(model, window_L)
    tokens_T = asked.pop("decoder_input_ids", asked["input_ids"])
    if model.config.is_encoder_decoder:
        asked = {"encoder_hidden_states": model.get_encoder()(**asked).last_hidden_state}
    output = _decoder(model)(**asked | {"input_ids": tokens_T}, use_cache=False)
    last = type(output)(last_hidden_state=output.last_hidden_state.cpu())
    return Decoded(model, last, tokens_T[0].cpu())


def given(model: Any, window_L: Tensor) -> dict[str, Tensor]:
    """What a model is called with for a window of tokens [L]."""
    parts = halves(model.config, window_L[None].to(model.device))
    return dict(zip(("input_ids", "decoder_input_ids"), parts, strict=False))


def drop_layers(model: Any) -> None:
    """Free everything of a model but its head, which then still makes logits of what was decoded
    before; the model itself can't be run any more."""
    both = [_decoder(model)]
    both += [model.get_encoder()] if model.config.is_encoder_decoder else []
    for stack in both:
        for name, _ in list(stack.named_children()):
            setattr(stack, name, None)


def _decoder(model: Any) -> Any:
    """The module that the model's forward gets its hidden states from."""
    # Families that derive from an encoder and decoder, such as opt, skip the module around both.
    return getattr(model.base_model, "decoder", model.base_model)
