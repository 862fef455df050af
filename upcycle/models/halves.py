"""What a model is given of windows of text.

A decoder or an encoder gets all of it. Of an encoder-decoder the encoder gets the first half, and
the decoder goes on with the second, after the token with which it begins whatever it writes; it is
told the right tokens before each that it predicts, as in training.
"""

from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig


def halves(config: PreTrainedConfig, ids_BL: Tensor) -> tuple[Tensor, ...]:
    """Token ids [B, L] as each stack of a model gets them, the one that predicts tokens last."""
    if not config.is_encoder_decoder:
        return (ids_BL,)
    given = getattr(config, "decoder_start_token_id", None)
    start = config.pad_token_id if given is None else given
    middle = ids_BL.shape[1] // 2
    return ids_BL[:, :middle], pad(ids_BL[:, middle:], (1, 0), value=start)
