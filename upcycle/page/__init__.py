"""The report page: facts about a model in, one self-contained HTML page out.

Each section is a function from facts to what the template shows of them.
"""

from importlib.metadata import version

import jinja2

from upcycle.page import header, layers, origin, quality, routing, tables, training
from upcycle.page.section import Facts
from upcycle.page.words import digits, public_name


def render(facts: Facts) -> str:
    """The page. The template escapes everything that comes from the facts."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("upcycle"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["digits"] = digits
    evaluation, made = facts["evaluation"], facts["made"]
    return environment.get_template("report.html.jinja").render(
        name=public_name(facts["model"]),
        kind=header.kind(facts),
        verdict=header.verdict(facts),
        shape=header.shape(facts),
        tiles=header.tiles(facts),
        texts=quality.texts(evaluation, made),
        damage=layers.damage(made),
        similarity=layers.similarity(evaluation["similarity"]),
        load=routing.load(evaluation["routing"]),
        pairs=routing.pairs(evaluation["routing"]),
        training=training.curves(facts["log"]),
        tables=[sheet for sheet in (tables.speed(evaluation), tables.tasks(evaluation)) if sheet],
        made=origin.conversion(made),
        version=version("upcycle"),
    )
