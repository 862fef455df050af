"""Passages: the text, as tokens, that tells the experts of a merge apart."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt, or a window of a text."""

    ids_L: Tensor
    expert: int
    """Whose it is."""
    negative: bool = False
    """Whether it should rather be the others'."""
    front: int = 0
    """How many of the tokens stand before the text: the beginning-of-sequence token."""
