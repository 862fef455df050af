"""The routers of a merge that are made from text: what the base makes of it, layer by layer."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from upcycle.conversion.gating import Gating
from upcycle.conversion.merging.passages import gated_experts, passages
from upcycle.conversion.merging.sources import Sources
from upcycle.conversion.plan import Plan
from upcycle.core.progress import Progress
from upcycle.core.rng import generator
from upcycle.models.passages import Grouped, losses_of_models, next_token_losses
from upcycle.models.tokens import open_reader


@dataclass(frozen=True)
class Gates:
    """Makes each layer's router of what a stream of `tokens` sees there."""

    gating: Gating
    seed: int
    beside: dict[str, Tensor] = field(default_factory=dict)
    """What the rows of later experts can be made by, if the gate leaves it."""

    @property
    def tokens(self) -> list[Tensor]:
        """Token ids, [B, L] of each length."""
        return self.gating.grouped.groups

    def rows(self, layer: int, entering_TD: Tensor, x_TD: Tensor) -> Tensor:
        """A layer's rows, [E, D], of what enters it and what its FFN reads."""
        made = self.gating.rows(entering_TD, x_TD, generator(self.seed, "router", layer))
        named = {f"model.layers.{layer}.{name}": t.cpu() for name, t in made.beside.items()}
        self.beside.update(named)
        return made.rows_ED


def make_gates(plan: Plan, embed_VD: Tensor, progress: Progress) -> Gates | None:
    """What makes the routers; None where text does not.

    Raises:
        UpcycleError: a text can't be read, or holds nothing.
    """
    gate, sources = plan.design.methods.gate, plan.sources
    if gate is None or sources is None:
        return None
    reader = open_reader(plan.source.folder, plan.source.config.vocab_size)
    grouped = Grouped(passages(sources.merge, plan.recipe, reader, gate.name))
    reads_losses = "losses" in gate.method.reads
    losses = _losses(plan, sources, grouped, progress) if reads_losses else []
    rows = len(gated_experts(sources.merge, gate.name))
    return Gates(Gating(gate, rows, grouped, embed_VD, losses), plan.design.seed)


def _losses(plan: Plan, sources: Sources, grouped: Grouped, progress: Progress) -> list[Tensor]:
    """Of every expert's model on the next tokens of the passages, [L - 1, E] each."""

    def step(place: int) -> Callable[[int, int], None]:
        """Tells of a model's layers among those of all."""
        models = len(sources.routed)
        return lambda done, total: progress("reading texts", place * total + done, models * total)

    return losses_of_models(
        next_token_losses(model, grouped, plan.device, step(place))
        for place, model in enumerate(sources.routed)
    )
