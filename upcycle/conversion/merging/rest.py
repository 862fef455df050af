"""All but the FFNs of a merge, read a tensor of one model at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from upcycle.conversion.design import Bound
from upcycle.conversion.merging.sources import Sources, is_ffn
from upcycle.conversion.rest.registry import Run
from upcycle.core.errors import UpcycleError
from upcycle.core.registry import Method
from upcycle.core.rng import generator
from upcycle.models.source import DenseSource

Rest = Bound[Method[Run]]


def read_merged(sources: Sources, rest: Rest, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """The base's tensors of these names, those that are no FFN's merged with the experts' models'.

    Raises:
        UpcycleError: a tensor can't be read, or the rule can't take the models.
    """
    found = sources.base.read(list(names))
    if rest.name == "base":
        return found
    models = sources.routed
    for name, tensor in found.items():
        if not _is_ffn(sources, name):
            rng = generator(seed, f"rest {name}", 0)
            found[name] = rest.run(tensor, _read(models, name), rest.params, rng)
    return found


def _read(models: Sequence[DenseSource], name: str) -> Iterator[Tensor]:
    return (model.read([name])[name] for model in models)


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
                    f"--rest {rest.name} merges tensors of one shape, but {name} is "
                    f"{list(info.shape)} in {sources.base.label} and {list(other.shape)} in "
                    f"{model.label}: --rest base takes the base's"
                )
