"""Whether a model can be merged with the base: its config, its vocabulary, its tokens."""

from collections.abc import Iterator
from pathlib import Path

from upcycle.core.errors import UpcycleError
from upcycle.core.paths import public_name
from upcycle.models.families import FAMILIES
from upcycle.models.source import DenseSource
from upcycle.models.tokens import load_tokenizer
from upcycle.models.traits import Trait

INERT = frozenset(
    "vocab_size max_position_embeddings initializer_range use_cache attention_dropout "
    "bos_token_id eos_token_id pad_token_id".split()
)
"""Fields in which models may differ: they change no layer's forward pass."""


Tokens = dict[int, str]


def compare(base: DenseSource, tokens: Tokens | None, other: DenseSource) -> list[str]:
    """What differs between the base and a model that can be merged with it, in sentences.

    Args:
        tokens: the base's, as `read_tokens` has them.

    Raises:
        UpcycleError: a field that the forward pass depends on differs, or a token has another id.
    """
    if other.folder == base.folder:
        return []
    _check_config(base, other)
    theirs = read_tokens(other.folder)
    if tokens is not None and theirs is not None:
        _check_tokens(base, tokens, other, theirs)
    return list(_notes(base, tokens, other, theirs))


def _check_config(base: DenseSource, other: DenseSource) -> None:
    """The model's FFNs mean in the base what they mean in the model."""
    ours, theirs = base.arch, other.arch
    if ours.family != theirs.family:
        raise UpcycleError(
            f"{base.label} is {ours.family}, but {other.label} is {theirs.family}: only models of "
            "one family can be merged"
        )
    pairs = {"intermediate_size": (ours.intermediate_size, theirs.intermediate_size)}
    pairs |= {n: (v, theirs.fields[n]) for n, v in ours.fields.items() if n not in INERT}
    pairs |= {str(t): (t in ours.traits, t in theirs.traits) for t in Trait}
    for name, (mine, its) in pairs.items():
        if mine != its:
            raise UpcycleError(
                f"{base.label} and {other.label} differ in {name}, {mine} and {its}: experts must "
                "be fine-tunes of one base"
            )


def _check_tokens(base: DenseSource, ours: Tokens, other: DenseSource, theirs: Tokens) -> None:
    moved = sorted(i for i in ours.keys() & theirs.keys() if ours[i] != theirs[i])
    if not moved:
        return
    rows = [_rows(source) for source in (base, other)]
    counts = f"{rows[0]} and {rows[1]} rows, and " if rows[0] != rows[1] else ""
    raise UpcycleError(
        f"{base.label} and {other.label} have other vocabularies: {counts}id {moved[0]} is another "
        f"token, {ours[moved[0]]!r} and {theirs[moved[0]]!r}"
    )


def _notes(
    base: DenseSource, ours: Tokens | None, other: DenseSource, theirs: Tokens | None
) -> Iterator[str]:
    """By names that may be published, as the result's record has them."""
    mine, its = public_name(base.label), public_name(other.label)
    if ours is None or theirs is None:
        without = mine if ours is None else its
        yield f"{without} has no tokenizer to compare, so its tokens may be others"
    elif added := sorted(theirs.keys() - ours.keys()):
        yield (
            f"{its} has {len(added)} tokens that {mine} has not, the first "
            f"{theirs[added[0]]!r}: embeddings, head and tokenizer are {mine}'s, so the result "
            "does not have them either"
        )
    elif _rows(base) != _rows(other):
        yield (
            f"{mine} and {its} have {_rows(base)} and {_rows(other)} rows of embeddings, of which "
            f"{mine}'s are kept"
        )
    if base.drafts and not other.drafts:
        yield f"{its} has no layers that draft tokens: there the FFNs of {mine} stand for its"
    if base.dtype != other.dtype:
        names = [str(source.dtype).removeprefix("torch.") for source in (base, other)]
        yield f"{its} is stored in {names[1]}, and {mine} in {names[0]}"


def _rows(source: DenseSource) -> int:
    embeddings = FAMILIES[source.arch.family].blocks.embeddings[0]
    return source.tensors[f"model.{embeddings}.weight"].shape[0]


def read_tokens(folder: Path) -> Tokens | None:
    """A tokenizer's tokens by their ids; None if the folder holds none that can be read."""
    try:
        vocabulary = load_tokenizer(folder).get_vocab()
    except UpcycleError:
        return None
    return {int(i): str(token) for token, i in vocabulary.items()}
