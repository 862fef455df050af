"""One file, one way to make up for what is switched off; one line here registers it."""

import upcycle.conversion.compensate.descent
import upcycle.conversion.compensate.least_squares
import upcycle.conversion.compensate.none
from upcycle.conversion.compensate.base import COMPENSATIONS

__all__ = ["COMPENSATIONS"]
