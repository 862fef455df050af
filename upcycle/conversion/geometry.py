"""How many of everything: experts, their width, the shared expert's and top_k, from what was
asked for."""

import math
from dataclasses import replace

from upcycle.conversion.recipe import Recipe
from upcycle.core.errors import UpcycleError
from upcycle.core.flags import setting
from upcycle.core.types import Geometry
from upcycle.models.targets import SharedWidth

ALIGNMENT = 8  # grouped_mm wants strides of 16 bytes
WIDTH_STEPS = (64, 16)
"""Widths that kernels like, the better first; the shared expert takes what they cut off."""
EXPERT_SIZE = 256
FEWEST, MOST = 32, 64
"""A split's default experts hold about 256 neurons, but 32 to 64 of them would fill the FFN. Finer
ones lose less and are slower to serve (benchmarks/granules.py)."""
TOLERANCE = 1.25  # by which a default width may differ from that, for a better step
CUT_OFF = 1 / 16  # of an expert's neurons, at most, for a better step
ACTIVE = 0.5
SHARED = 0.25
"""Of the neurons: at 50 % active, in two layers of one model, sharing an eighth to a third of all
made next to no difference; other shares were not measured."""
COPIES, COPIES_PER_TOKEN = 8, 2


def active_ffn_ratio(geometry: Geometry, layers: int, num_dense: int) -> float:
    """Active FFN neurons over the dense model's; layers kept dense count as 1."""
    return (num_dense + (layers - num_dense) * geometry.active_ratio) / layers


def split_geometry(
    recipe: Recipe,
    num_neurons: int,
    layers: int,
    num_dense: int,
    *,
    shared_width: SharedWidth,
    min_experts: int,
    most_top_k: int | None = None,
) -> Geometry:
    """Of a split, what the recipe asks for, with what it leaves open.

    Args:
        num_neurons: F.
        num_dense: how many of the layers stay dense; the others make up for it in the active share.
        shared_width: what the target has place for.
        min_experts: that the target wants to route.
        most_top_k: experts that it gives a token at most, where it has such a limit.

    Raises:
        UpcycleError: the FFN can't be cut like this.
    """
    share = moe_share(recipe.active or ACTIVE, layers, num_dense)
    if most_top_k and not recipe.experts:
        recipe = recipe.model_copy(update={"experts": _fewest(num_neurons, share, most_top_k)})
    geometry = _split(recipe, num_neurons, share, shared_width, min_experts)
    if most_top_k and geometry.top_k > most_top_k:
        geometry = _with_fewer(geometry, recipe, most_top_k)
    if geometry.top_k < 1:
        raise _nothing_to_route(recipe, geometry, layers, num_dense)
    return _checked(geometry)


def pruned_geometry(recipe: Recipe, num_neurons: int, layers: int, num_dense: int) -> Geometry:
    """The same of pruned copies."""
    kept = _kept(recipe, num_neurons, layers, num_dense)
    return _checked(Geometry(num_neurons, recipe.experts or COPIES, recipe.top_k or 1, kept))


def copied_geometry(recipe: Recipe, num_neurons: int, most_top_k: int | None = None) -> Geometry:
    """The same of whole copies, or of their shards."""
    granularity = recipe.granularity
    if granularity > 1:
        _check_cut("granularity", granularity, num_neurons)
    _check_whole(num_neurons, "; `method=prune` keeps one that is")
    if most_top_k and granularity > most_top_k:
        raise UpcycleError(
            f"{setting('granularity', granularity)} cuts a copy into shards, but the target gives "
            f"a token no more than {most_top_k}, which is less than a copy: leave it out"
        )
    copies = recipe.experts or COPIES
    experts = copies * granularity
    top_k = recipe.top_k or min(copies, COPIES_PER_TOKEN) * granularity
    if most_top_k:
        top_k = min(top_k, most_top_k)
    size = num_neurons // granularity
    return _checked(Geometry(num_neurons, experts, top_k, size, granularity=granularity))


def merged_geometry(recipe: Recipe, num_neurons: int) -> Geometry:
    """The same of several models' FFNs, each whole, with perhaps one more that is always on."""
    _check_whole(num_neurons)
    experts = recipe.experts or 1
    top_k = recipe.top_k or min(experts, COPIES_PER_TOKEN)
    shared = num_neurons if recipe.shared else 0
    return _checked(Geometry(num_neurons, experts, top_k, num_neurons, shared))


def moe_share(active: float, layers: int, num_dense: int) -> float:
    """The active share of the converted layers that makes `active` over all layers; those kept
    dense count as 1."""
    return (active * layers - num_dense) / (layers - num_dense)


def _split(
    recipe: Recipe, num_neurons: int, share: float, shared_width: SharedWidth, min_experts: int
) -> Geometry:
    """As many experts on as the active share allows, beside shared neurons that take half of it,
    but no more than a quarter of all, or next to none if that leaves nothing to route."""
    asked = 0.0 if shared_width == "none" else recipe.shared
    default = SHARED if recipe.top_k else max(0.0, min(SHARED, share / 2))
    if asked == 0 and recipe.experts:
        _check_cut("experts", recipe.experts, num_neurons)
    for shared in (default, 0.0) if asked is None else (asked,):
        if asked == 0 or shared_width == "multiple":
            experts, size = _equal_parts(recipe.experts, num_neurons, shared, min_experts)
        else:
            experts, size = _parts_beside_shared(recipe, num_neurons, shared, min_experts)
        rest = num_neurons - experts * size
        # What is a whole number of experts is not to be cut by rounding.
        top_k = recipe.top_k or int((share * num_neurons - rest) / size + 1e-9)
        if top_k >= 1:
            break
    return Geometry(num_neurons, experts, top_k, size, rest)


def _fewest(num_neurons: int, share: float, top_k: int) -> int:
    """Experts of which so many are within the active share, and no more than that takes."""
    fitting = (n for n in legal_parts(num_neurons) if top_k / n <= share + 1e-9)
    found = next(fitting, 0)
    if not found:
        raise UpcycleError(
            f"`active={share:g}` leaves less than {ALIGNMENT} of {num_neurons} neurons to a token, "
            "which gets one expert: raise `active`"
        )
    return found


def _with_fewer(geometry: Geometry, recipe: Recipe, top_k: int) -> Geometry:
    """With as many experts per token as the target gives, unless a larger share is asked for."""
    if recipe.active is not None:
        raise UpcycleError(
            f"`active={recipe.active:g}` takes {geometry.top_k} of {geometry.num_experts} experts, "
            f"but the target gives a token {top_k}: leave one of `active` and `experts` out"
        )
    return replace(geometry, top_k=top_k)


def _equal_parts(
    experts: int | None, num_neurons: int, shared: float, min_experts: int
) -> tuple[int, int]:
    """Routed experts and their width, where the FFN must fall into parts of one width, of which the
    shared expert holds some."""
    if experts is None:
        parts = default_parts(num_neurons)
        _check_cut("experts", parts, num_neurons)
        experts = max(min(min_experts, parts), parts - round(shared * parts))
        return experts, num_neurons // parts
    parts = min(
        (n for n in legal_parts(num_neurons) if n >= experts),
        key=lambda n: abs((n - experts) / n - shared),
        default=0,
    )
    if not parts:
        _check_cut("experts", experts, num_neurons)
    return experts, num_neurons // parts


def _parts_beside_shared(
    recipe: Recipe, num_neurons: int, shared: float, min_experts: int
) -> tuple[int, int]:
    """Routed experts and their width, where the shared expert takes what they leave over."""
    routed = (1 - shared) * num_neurons
    if recipe.experts is None:
        size = default_width(num_neurons)
        experts = min(math.ceil(routed / size - 1e-9), num_neurons // size)
        return max(min_experts, 1, experts), size
    wanted = routed / recipe.experts
    named = (recipe.shared is not None or not shared) and abs(wanted - round(wanted)) < 1e-6
    if named and round(wanted) % ALIGNMENT == 0:
        return recipe.experts, round(wanted)
    for step in (*WIDTH_STEPS, ALIGNMENT):
        size = int(wanted + 1e-9) // step * step
        if size and (step == ALIGNMENT or wanted - size <= CUT_OFF * wanted):
            return recipe.experts, size
    most = int(routed + 1e-9) // ALIGNMENT
    raise UpcycleError(
        f"`experts={recipe.experts}` leaves less than {ALIGNMENT} of {num_neurons} neurons to an "
        "expert, which grouped matrix products need: "
        + (f"give at most {most}" if most else "lower `shared`")
    )


def default_width(num_neurons: int) -> int:
    """Of an expert, near 1/32 to 1/64 of the FFN, in the best step that comes near."""
    wanted = num_neurons / _wanted_parts(num_neurons)
    for step in WIDTH_STEPS:
        size = step * round(wanted / step)
        if size and max(size, wanted) <= TOLERANCE * min(size, wanted):
            return size
    return max(1, round(wanted / ALIGNMENT)) * ALIGNMENT


def default_parts(num_neurons: int) -> int:
    """The same where all parts must be equal: the legal number of them nearest to the one wanted,
    as a ratio."""
    wanted = _wanted_parts(num_neurons)

    def distance(parts: int) -> float:
        return max(parts, wanted) / min(parts, wanted)

    for step in (*WIDTH_STEPS, ALIGNMENT):
        nearest = min(legal_parts(num_neurons, step), key=distance, default=1)
        if step == ALIGNMENT or distance(nearest) <= TOLERANCE:
            break
    return nearest


def _wanted_parts(num_neurons: int) -> int:
    return min(max(num_neurons // EXPERT_SIZE, FEWEST), MOST)


def _kept(recipe: Recipe, num_neurons: int, layers: int, num_dense: int) -> int:
    """As many neurons as the active share allows a pruned copy."""
    active = recipe.active or ACTIVE
    share = moe_share(active, layers, num_dense)
    wanted = int(share * num_neurons + 1e-9)
    step = WIDTH_STEPS[0] if wanted * CUT_OFF >= WIDTH_STEPS[0] else ALIGNMENT
    kept = wanted // step * step
    if kept <= 0:
        raise UpcycleError(
            f"`active={active:g}`{_dense(layers, num_dense)} leaves less than {step} of "
            f"{num_neurons} neurons to a token: raise `active`"
        )
    return kept


def _nothing_to_route(
    recipe: Recipe, geometry: Geometry, layers: int, num_dense: int
) -> UpcycleError:
    active = recipe.active or ACTIVE
    on = max(0, int(moe_share(active, layers, num_dense) * geometry.num_neurons + 1e-9))
    shared = f", {geometry.shared_size} of them shared" if geometry.shared_size else ""
    # One expert alone would take an active share of 1, which is none.
    remedy = "raise `active`" if geometry.num_experts > 1 else "give more `experts`"
    return UpcycleError(
        f"`active={active:g}`{_dense(layers, num_dense)} leaves {on} of {geometry.num_neurons} "
        f"neurons to a token{shared}, so none of the experts of "
        f"{geometry.expert_size}: {remedy}" + (" or lower `shared`" if recipe.shared else "")
    )


def _dense(layers: int, num_dense: int) -> str:
    return f", with {num_dense} of {layers} layers dense," if num_dense else ""


def legal_parts(num_neurons: int, step: int = ALIGNMENT) -> list[int]:
    """Numbers of equal parts whose width is a multiple of `step`: of 8, grouped matrix products
    can take them."""
    return [n for n in range(1, num_neurons // step + 1) if num_neurons % (n * step) == 0]


def _check_cut(field: str, parts: int, num_neurons: int) -> None:
    if num_neurons % (parts * ALIGNMENT) == 0:
        return
    legal = legal_parts(num_neurons)
    near = [n for n in legal if n < parts][-1:] + [n for n in legal if n > parts][:1]
    nearest = " or ".join(map(str, near)) or "none"
    raise UpcycleError(
        f"{setting(field, parts)} does not cut {num_neurons} neurons into equal parts that are a "
        f"multiple of {ALIGNMENT}, which grouped matrix products need; nearest: {nearest}"
    )


def _check_whole(num_neurons: int, instead: str = "") -> None:
    if num_neurons % ALIGNMENT:
        raise UpcycleError(
            f"whole FFNs of {num_neurons} neurons can't be experts, for grouped matrix products "
            f"need a multiple of {ALIGNMENT}{instead}"
        )


def _checked(geometry: Geometry) -> Geometry:
    top_k = geometry.top_k
    if top_k > geometry.num_experts:
        raise UpcycleError(f"`top_k={top_k}` is more than the {geometry.num_experts} experts")
    return geometry
