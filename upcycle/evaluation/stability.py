"""Stability: how alike two splits of one model cut its FFNs, as by two seeds."""

from pathlib import Path

from upcycle.core.errors import UpcycleError
from upcycle.core.paths import local_path
from upcycle.models.record.file import Made, read_record


def partition_agreement(model: str, other: str) -> dict[int, float]:
    """The adjusted Rand index of the two partitions of a layer's neurons, by layer: 1 where they
    are the same, whatever the experts' numbers, and 0 on average where one knows nothing of the
    other (Hubert and Arabie, 1985). The neurons that are always on are a part like an expert.

    Args:
        model, other: folders that `convert` wrote, of the same dense model.

    Raises:
        UpcycleError: one is no split, gives a neuron to several experts, or has FFNs of another
            width than the other; or no layer is split in both.
    """
    from sklearn.metrics import adjusted_rand_score

    ours, theirs = _parts(model), _parts(other)
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        raise UpcycleError(f"{model} and {other} have no layer that is split in both")
    if any(len(ours[layer]) != len(theirs[layer]) for layer in both):
        raise UpcycleError(f"{model} and {other} were made from models of other FFN widths")
    return {layer: float(adjusted_rand_score(ours[layer], theirs[layer])) for layer in both}


def _parts(model: str) -> dict[int, list[int]]:
    """By layer, the part that each neuron of the dense FFN is in."""
    path = local_path(model) / "upcycle.json"
    if not path.is_file():
        raise UpcycleError(f"{model} holds no upcycle.json: give the folder of a split")
    made = read_record(path)
    if not isinstance(made, Made):
        raise UpcycleError(f"{model} was not made by upcycle, so its neurons' origin is unknown")
    return {
        layer.layer: _labels(made, layer.permutation, path)
        for layer in made.layers
        if not layer.dense
    }


def _labels(made: Made, permutation: list[int] | None, path: Path) -> list[int]:
    neurons = made.plan.intermediate_size
    if permutation is None or sorted(permutation) != list(range(neurons)):
        raise UpcycleError(
            f"{path} is of {made.plan.method}, which gives neurons to several experts: only splits "
            "that give each to one are compared"
        )
    labels = [0] * neurons
    for place, neuron in enumerate(permutation):
        routed = place - made.plan.shared_size
        labels[neuron] = 0 if routed < 0 else 1 + routed // made.plan.expert_size
    return labels
