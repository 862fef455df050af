"""What a merge's experts are told apart by, as tokens: their prompts and windows of their texts."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from upcycle.conversion.merging.request import PROMPTED, Expert, Merge
from upcycle.conversion.recipe import Recipe
from upcycle.core.passages import Passage
from upcycle.models.passages import prompt_passage, text_passages
from upcycle.models.record.file import TEXTUAL
from upcycle.models.tokens import Reader

PROMPT_TOKENS = 32
"""Of a prompt, by which memory is estimated before it is tokenised."""


def gated_experts(merge: Merge, router: str) -> tuple[Expert, ...]:
    """The experts that get a row: the shared one too, where it has a gate of its own."""
    return merge.all if merge.gates_shared(router) else merge.experts


def passage_tokens(merge: Merge, recipe: Recipe) -> int:
    """How many tokens `passages` makes, of prompts roughly."""
    texts = _windows(merge, recipe) * recipe.seq_len * sum(bool(e.text) for e in merge.experts)
    prompts = [len(expert.prompts) + len(expert.negatives) for expert in merge.all]
    return texts + PROMPT_TOKENS * sum(prompts)


def passages(merge: Merge, recipe: Recipe, reader: Reader, router: str) -> list[Passage]:
    """The passages of all experts, in their order; of gates that are made from prompts, no texts.

    Raises:
        UpcycleError: a text can't be read, or holds nothing.
    """
    found: list[Passage] = []
    windows = fitted_windows(merge, recipe, router)
    for place, expert in enumerate(gated_experts(merge, router)):
        found += _prompts(reader, expert, place)
        if expert.text is not None and windows:
            found += text_passages(
                reader,
                expert.text,
                place,
                windows=windows,
                length=recipe.seq_len,
                seed=recipe.seed,
            )
    return found


def fitted_windows(merge: Merge, recipe: Recipe, router: str) -> int:
    """How many windows of each text `passages` has."""
    return _windows(merge, recipe) if router in TEXTUAL else 0


def added_passages(
    merge: Merge, recipe: Recipe, reader: Reader, router: str, unknown: Sequence[int]
) -> list[Passage]:
    """What the last expert is told from the others by: its own passages, and those of the others
    if the gate looks at them.

    Args:
        unknown: the others of which there are none, for whom builtin text stands.

    Raises:
        UpcycleError: a text can't be read, or holds nothing.
    """
    new = len(merge.experts) - 1
    found = passages(replace(merge, shared=None), recipe, reader, router)
    if router in PROMPTED or router == "domain":
        return [passage for passage in found if passage.expert == new]
    if unknown:
        windows = _windows(merge, recipe)
        drawn = text_passages(
            reader, "builtin", new, windows=windows, length=recipe.seq_len, seed=recipe.seed
        )
        found += [replace(passage, negative=True) for passage in drawn]
    return found


def _prompts(reader: Reader, expert: Expert, place: int) -> Iterator[Passage]:
    for texts, negative in ((expert.prompts, False), (expert.negatives, True)):
        for text in texts:
            yield prompt_passage(reader, text, place, negative=negative)


def _windows(merge: Merge, recipe: Recipe) -> int:
    """Of each expert's text, so that all together are as many tokens as a conversion is fitted
    on."""
    texts = sum(bool(expert.text) for expert in merge.experts)
    return max(1, recipe.calibration_tokens // recipe.seq_len // max(1, texts))
