"""What tensors are called in checkpoints, and what transformers calls them."""

import re
from collections.abc import Collection, Iterable, Mapping

from upcycle.core.errors import UpcycleError

WRAPPER = r"(^|\.)(?:(?:_orig_mod|module)\.)+"
KEY_MAPPING = {WRAPPER: r"\1"}
"""For `from_pretrained`: torch.compile and DistributedDataParallel put names of their own around a
model's, which are gone from what its own `save_pretrained` writes, but not from its state."""
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plain_names(
    stored: Iterable[str], expected: Collection[str], base: str, begun: Mapping[str, str]
) -> dict[str, str]:
    """The names in a checkpoint by the names that the model has for them; those that it has none
    for stay as they are.

    Args:
        expected: the model's names.
        base: what they begin with outside the head. A checkpoint of the model without its head
            leaves it out.
        begun: what names begin with in checkpoints, with what the model puts in its place.

    Raises:
        UpcycleError: two names are one tensor's.
    """
    found: dict[str, str] = {}
    for name in stored:
        plain = re.sub(WRAPPER, r"\1", name)
        for old, new in begun.items():
            plain = re.sub(rf"^{re.escape(old)}", new, plain)
        if plain not in expected and f"{base}.{plain}" in expected:
            plain = f"{base}.{plain}"
        if plain in found:
            raise UpcycleError(
                f"the source holds {plain} twice, as {found[plain]} and as {name}: delete one"
            )
        found[plain] = name
    return found
