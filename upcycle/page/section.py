"""What a section of the page is made from, and what it gives to the template."""

from collections.abc import Mapping
from typing import Any

Facts = Mapping[str, Any]
"""What `upcycle.facts.gather` gives, or a part of it."""
Section = dict[str, Any] | None
"""What the template shows; None where there is nothing to show."""
