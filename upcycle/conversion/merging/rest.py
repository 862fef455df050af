"""All but the FFNs of a merge, read a tensor of one model at a time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upcycle.conversion.merging.sources import Sources, is_ffn
from upcycle.conversion.rest.registry import Run
from upcycle.core.binding import Bound
from upcycle.core.errors import UpcycleError
from upcycle.core.registry import Method
from upcycle.core.rng import generator
from upcycle.evaluation.distance import Meter
from upcycle.models.source import DenseSource

Rest = Bound[Method[Run]]


def read_merged(
    sources: Sources, rest: Rest, names: Sequence[str], seed: int, meter: Meter | None = None
) -> dict[str, Tensor]:
    """The base's tensors of these names, those that are no FFN's merged with the experts' models'.

    Args:
        meter: is shown every model's tensors but FFNs', those that no rule asks for, too.

    Raises:
        UpcycleError: a tensor can't be read, or the rule can't take the models.
    """
    found = sources.base.read(list(names))
    for name, base in found.items():
        if (rest.name == "base" and meter is None) or _is_ffn(sources, name):
            continue
        seen = _Seeing(name, base, meter)
        if rest.name != "base":
            rng = generator(seed, f"rest {name}", 0)
            found[name] = rest.run(base, seen.read(sources.routed), rest.params, rng)
        seen.read_others(sources.apart.values())
    return found


def see_rest(sources: Sources, names: Iterable[str], meter: Meter) -> None:
    """Show a meter the models' tensors of these names that are no FFN's, beside the base's."""
    for name in names:
        if not _is_ffn(sources, name):
            base = sources.base.read([name])[name]
            _Seeing(name, base, meter).read_others(sources.apart.values())


@dataclass(frozen=True)
class _Seeing:
    """Reads one tensor of each model, and shows it to a meter."""

    name: str
    base: Tensor
    meter: Meter | None

    def read(self, models: Iterable[DenseSource]) -> Iterator[Tensor]:
        for model in models:
            tensor = model.read([self.name])[self.name]
            if self.meter is not None:
                self.meter.see("rest", self.name, model.label, self.base, tensor)
            yield tensor

    def read_others(self, models: Iterable[DenseSource]) -> None:
        """Those that the meter has not seen; a model that lacks the tensor counts as the base."""
        if self.meter is None:
            return
        for model in models:
            if self.name in model.tensors and self.meter.awaits("rest", self.name, model.label):
                for _ in self.read([model]):
                    pass
        self.meter.close()


def _is_ffn(sources: Sources, name: str) -> bool:
    return name.startswith("model.layers.") and is_ffn(sources.base, name)


def check_rest(sources: Sources, rest: Rest) -> None:
    """The models' tensors are of one shape, where they are merged, and the rule takes so many.

    Raises:
        UpcycleError: one has more or fewer rows, of embeddings, or the rule has settings for
            another number of models.
    """
    if rest.name == "base":
        return
    number = torch.zeros(1)  # on which a rule says what it has against its settings
    rest.run(number, iter([number] * len(sources.routed)), rest.params, torch.Generator())
    for model in sources.routed:
        for name, info in sources.base.tensors.items():
            other = model.tensors[name]
            if other.shape != info.shape:
                raise UpcycleError(
                    f"`rest={rest.name}` merges tensors of one shape, but {name} is "
                    f"{list(info.shape)} in {sources.base.label} and {list(other.shape)} in "
                    f"{model.label}: `rest=base` takes the base's"
                )
