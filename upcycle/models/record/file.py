"""What upcycle leaves beside a model's weights, upcycle.json: one schema, by which it is written
and read.

What a version adds has a default, which is what older records mean; what is not known here is kept
and handed on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import first_problem, read_json
from upcycle.core.json_text import json_text
from upcycle.models.record.check import Check
from upcycle.models.record.conversion import ConversionResult, LayerPart
from upcycle.models.record.merging import AddedPart
from upcycle.models.record.part import Part
from upcycle.models.record.training import TrainingRun

RECORD = "upcycle.json"
DOMAINS = "router_domains.safetensors"
"""By which gate `domain` of a merge makes the rows of experts that come later."""
TEXTUAL = ("text", "loss", "perplexity", "domain")
"""Routers of merges that are fitted to prompts or texts."""
OURS = "what upcycle writes"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a run is known by, in its journal and in the record of its result."""

    fingerprint: str
    """Of everything that its bytes depend on."""
    threads: int
    """Of torch, by which sums in floating point differ; part of the fingerprint."""


class Source(Part):
    """The dense checkpoint that a model was made from."""

    name: str
    """A hub id, or the way from the folder of the record."""
    revision: str | None = None
    fingerprint: str | None = None

    def place(self, folder: Path) -> Path | None:
        """Where the dense model lies here, if it is not on the hub; `folder` holds the record."""
        found = folder.resolve() / self.name
        return found.resolve() if self.revision is None and found.exists() else None

    def model(self, folder: Path) -> str | None:
        """The dense model by the name that finds it from anywhere; None if nothing does."""
        if self.revision is not None:
            return self.name
        place = self.place(folder)
        return None if place is None else str(place)


class Trained(Part):
    """upcycle.json of a model that upcycle trained but did not make."""

    check: Check | None = None
    training: list[TrainingRun] = []
    run: Identity | None = None
    """The last one."""


class Made(ConversionResult):
    """upcycle.json of a model that upcycle made, and may have trained since.

    It is published, so a local source is named by its way from the folder, and other files by
    their names alone.
    """

    versions: dict[str, str]
    source: Source
    run: Identity | None = None
    """The last one."""
    layers: list[LayerPart] = []
    training: list[TrainingRun] = []
    added: list[AddedPart] = []
    """Experts that came later, in their order."""

    @property
    def router_texts(self) -> list[str]:
        """The texts of a merge's experts, if a router was fitted to them."""
        routers = [self.plan.recipe.router, *(each.router for each in self.added)]
        if self.plan.merge is None or not any(r and r.name in TEXTUAL for r in routers):
            return []
        return [expert.text for expert in self.plan.merge.experts if expert.text]


Record = Made | Trained


def record_text(record: Record) -> str:
    """An upcycle.json."""
    return json_text(record.plain()) + "\n"


def read_record(path: Path) -> Record:
    """An upcycle.json.

    Raises:
        UpcycleError: it is something else.
    """
    return record_of(read_json(path, OURS), path)


def record_of(fields: Any, path: Path) -> Record:
    """The values of an upcycle.json as what they are.

    Raises:
        UpcycleError: they are something else; the sentence names the field.
    """
    trained = isinstance(fields, dict) and "training" in fields and "plan" not in fields
    kind: type[Record] = Trained if trained else Made
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise UpcycleError(
            f"{path} is not {OURS}: {first_problem(error)}: restore or delete it"
        ) from error
