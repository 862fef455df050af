"""The report page: facts about a model in, one self-contained HTML page out.

Each section is a function from facts to what the template shows of them.
"""

from importlib.metadata import version

import jinja2

from upcycle.evaluation.page import (
    advice,
    header,
    layers,
    merging,
    origin,
    quality,
    routing,
    samples,
    tables,
    training,
)
from upcycle.evaluation.page.facts import Facts, Measured
from upcycle.evaluation.page.words import digits, public_name


def render(facts: Facts, measured: Measured) -> str:
    """The page. The template escapes everything that comes from the facts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("upcycle.evaluation", "page"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["digits"] = digits
    evaluation = measured.evaluation
    return environment.get_template("report.html.jinja").render(
        name=public_name(facts.model),
        kind=header.kind(facts),
        verdict=header.verdict(evaluation),
        shape=header.shape(facts),
        tiles=header.tiles(facts.made, evaluation),
        basis=quality.basis(evaluation),
        texts=quality.texts(evaluation, facts.made),
        merge=merging.merged(facts.made),
        samples=samples.written(measured.samples),
        damage=layers.damage(facts.made),
        similarity=layers.similarity(evaluation.similarity),
        load=routing.load(evaluation.routing, layers.likeness(evaluation.similarity)),
        by_text=routing.by_text(evaluation),
        pairs=routing.pairs(evaluation, facts.inspection.top_k),
        training=training.curves(facts.log),
        tables=[sheet for sheet in (tables.speed(evaluation), tables.tasks(evaluation)) if sheet],
        made=origin.conversion(facts.made),
        advice=advice.advice(facts, evaluation),
        version=version("upcycle"),
    )
