"""One file, one way to learn a layer's split, router or weights; one line here registers it."""

import upcycle.conversion.fit.distillation
import upcycle.conversion.fit.none
import upcycle.conversion.fit.prior_approximate
import upcycle.conversion.fit.transport
from upcycle.conversion.fit.base import FITS

__all__ = ["FITS"]
