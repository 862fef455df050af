"""How many of everything: granules, shared ones and top_k, from what was asked for."""

from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.types import Geometry

ALIGNMENT = 8  # grouped_mm wants strides of 16 bytes
EXPERT_SIZE = 256
FEWEST, MOST = 32, 64
"""A split's default granules hold about 256 neurons, but there are 32 to 64 of them. Finer ones
lose less and are slower to serve (benchmarks/granules.py)."""
ACTIVE = 0.5
COPIES, COPIES_PER_TOKEN = 8, 2
GPU_ALIGNMENT = 64
"""Of pruned copies, where that takes less than a sixteenth of them away."""


def geometry_of(
    recipe: Recipe, num_neurons: int, layers: int, num_dense: int, *, min_routed: int | None = None
) -> Geometry:
    """What the recipe asks for, with what it leaves open.

    Args:
        num_neurons: F.
        num_dense: how many of the layers stay dense; the others make up for it in the active share.
        min_routed: what a target with a shared expert leaves to route at least; None where there
            can be no shared experts but those that the recipe names.

    Raises:
        UpcycleError: the FFN can't be cut like this.
    """
    if recipe.copies:
        experts = recipe.experts or COPIES
        top_k = recipe.top_k or COPIES_PER_TOKEN * recipe.granularity
        geometry = Geometry(experts, top_k, 0, recipe.granularity, copies=True)
    elif recipe.prunes:
        kept = _kept(recipe, num_neurons, layers, num_dense)
        geometry = Geometry(recipe.experts or COPIES, recipe.top_k or 1, kept=kept / num_neurons)
    else:
        experts = recipe.experts or default_granules(num_neurons)
        _check_cut(experts, "--experts", num_neurons)
        if recipe.top_k is None:
            geometry = _within(recipe, experts, layers, num_dense, min_routed=min_routed)
        else:
            shared = recipe.shared_experts
            if shared is None:
                shared = 0 if min_routed is None else _eighth(experts, recipe.top_k, min_routed)
            geometry = Geometry(experts, recipe.top_k, shared)
    _check(geometry, num_neurons)
    return geometry


def default_granules(num_neurons: int) -> int:
    """The legal number of granules nearest to the one wanted, as a ratio."""
    wanted = min(max(num_neurons // EXPERT_SIZE, FEWEST), MOST)
    legal = legal_granules(num_neurons) or [1]
    return min(legal, key=lambda n: max(n, wanted) / min(n, wanted))


def moe_share(active: float, layers: int, num_dense: int) -> float:
    """The active share of the converted layers that makes `active` over all layers; those kept
    dense count as 1."""
    return (active * layers - num_dense) / (layers - num_dense)


def _within(
    recipe: Recipe, experts: int, layers: int, num_dense: int, *, min_routed: int | None
) -> Geometry:
    """As many granules on as the active share allows, half of them shared, but no more than a
    quarter of all. (At 50 % active, in two layers of one model, sharing an eighth to a third of
    all made next to no difference; other shares were not measured.)"""
    active = recipe.active or ACTIVE
    share = moe_share(active, layers, num_dense)
    on = int(share * experts + 1e-9)
    shared = recipe.shared_experts
    if shared is None:
        shared = 0 if min_routed is None else min(experts // 4, on // 2, experts - min_routed)
    if on <= shared < experts:
        dense = f", with {num_dense} of {layers} layers dense," if num_dense else ""
        raise UpcycleError(
            f"--active {active:g}{dense} leaves {max(on, 0)} of {experts} parts to a token, "
            f"{shared} of them shared, so none to route: raise --active"
            + (" or lower --shared-experts" if recipe.shared_experts else "")
        )
    return Geometry(experts, on - shared, shared)


def _kept(recipe: Recipe, num_neurons: int, layers: int, num_dense: int) -> int:
    """As many neurons as the active share allows a pruned copy."""
    active = recipe.active or ACTIVE
    share = moe_share(active, layers, num_dense)
    wanted = int(share * num_neurons + 1e-9)
    step = GPU_ALIGNMENT if wanted >= 16 * GPU_ALIGNMENT else ALIGNMENT
    kept = wanted // step * step
    if kept <= 0:
        dense = f", with {num_dense} of {layers} layers dense," if num_dense else ""
        raise UpcycleError(
            f"--active {active:g}{dense} leaves less than {step} of {num_neurons} neurons to a "
            "token: raise --active"
        )
    return kept


def least_share(recipe: Recipe, geometry: Geometry, num_neurons: int) -> float:
    """What must remain active of the layers that are converted."""
    if recipe.prunes:
        return ALIGNMENT / num_neurons
    if recipe.top_k is not None:
        return 0.0
    return ((recipe.shared_experts or 0) + 1) / geometry.num_experts


def _eighth(experts: int, top_k: int, min_routed: int) -> int:
    """The default beside an explicit top_k: neurons that every token needs are better not routed
    (CMoE, arXiv:2502.04416)."""
    return max(0, min(max(1, experts // 8), experts - max(top_k, min_routed)))


def legal_granules(num_neurons: int) -> list[int]:
    """Numbers of equal parts whose size suits grouped matrix products."""
    return [n for n in range(1, num_neurons + 1) if num_neurons % (n * ALIGNMENT) == 0]


def _check_cut(parts: int, flag: str, num_neurons: int) -> None:
    if num_neurons % (parts * ALIGNMENT) == 0:
        return
    legal = legal_granules(num_neurons)
    near = [n for n in legal if n < parts][-1:] + [n for n in legal if n > parts][:1]
    nearest = " or ".join(map(str, near)) or "none"
    raise UpcycleError(
        f"{flag} {parts} does not cut {num_neurons} neurons into equal parts that are a "
        f"multiple of {ALIGNMENT}, which grouped matrix products need; nearest: {nearest}"
    )


def _check(geometry: Geometry, num_neurons: int) -> None:
    experts, shared, top_k = geometry.num_experts, geometry.shared_experts, geometry.top_k
    granularity = geometry.granularity
    if granularity > 1:
        _check_cut(granularity, "--granularity", num_neurons)
    if not geometry.copies and shared >= experts:
        raise UpcycleError(
            f"--shared-experts {shared} of {experts} leaves none to route: "
            f"give at most {experts - 1}"
        )
    if top_k > geometry.routed_experts:
        less = f" ({experts} less {shared} shared)" if shared else ""
        raise UpcycleError(
            f"--top-k {top_k} is more than the {geometry.routed_experts} routed experts{less}"
        )
    if top_k % granularity:
        whole = max(top_k // granularity, 1) * granularity
        raise UpcycleError(
            f"--top-k {top_k} is no multiple of --granularity {granularity}, so tokens would get "
            f"parts of a copy; nearest: --top-k {whole}"
        )
