"""What a section of the page gives to the template."""

from typing import Any

Section = dict[str, Any] | None
"""What the template shows; None where there is nothing to show."""
