"""One file, one way to merge all but the FFNs; one line here registers it."""

import upcycle.conversion.rest.base
import upcycle.conversion.rest.dare
import upcycle.conversion.rest.linear
import upcycle.conversion.rest.mean
import upcycle.conversion.rest.ties
from upcycle.conversion.rest.registry import RESTS

__all__ = ["RESTS"]
