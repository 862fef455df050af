"""What becomes of the tensors beside a text model's: other parts, and layers that draft tokens.

All are kept as they are, but layers that draft: other runtimes want experts in them as in the
others. They become copies alike. Nothing can be fitted on what they see, as the calibration tokens
do not go through them, so a split leaves them out, with all that is only there for them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from upcycle.models.families import FAMILIES
from upcycle.models.source import DenseSource


@dataclass(frozen=True)
class Beside:
    """Tensors of a source that are not its text model's."""

    drafts: tuple[str, ...]
    """What the names begin with of each layer that drafts tokens and is converted as the others
    are."""
    kept: tuple[str, ...]
    """Names of those that are written as they are."""
    left_out: tuple[str, ...]
    count: dict[str, int]
    """The config field that says how many layers draft, where there is one."""

    @classmethod
    def of(cls, source: DenseSource, *, fitted: bool) -> "Beside":
        """
        Args:
            fitted: whether layers are fitted on calibration tokens.
        """
        family = FAMILIES[source.arch.family].drafts
        drafts = () if fitted else source.drafts
        left_out = tuple(source.draft_names()) if fitted else ()
        kept = (n for n in sorted(source.parts.difference(left_out)) if not n.startswith(drafts))
        stated = family is not None and family.count in source.arch.fields
        count = {family.count: len(drafts)} if family is not None and stated else {}
        return cls(drafts, tuple(kept), left_out, count)

    def notes(self) -> Iterator[str]:
        """What is lost."""
        if self.left_out:
            yield (
                f"{len(self.left_out)} tensors ({self.left_out[0]}, …) are left out, with which "
                "other runtimes draft tokens: nothing can be fitted on what they see, so the "
                "result computes the same without them, but can't draft for itself (copies keep "
                "them)"
            )
