"""One file, one rule for the shared expert; one line here registers it."""

import upcycle.split.shared.consensus
import upcycle.split.shared.energy
import upcycle.split.shared.rate
import upcycle.split.shared.taylor
from upcycle.split.shared.base import SHARED

__all__ = ["SHARED"]
