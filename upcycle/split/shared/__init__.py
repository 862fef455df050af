"""One file, one rule for the shared expert; one line here registers it."""

import upcycle.split.shared.consensus
import upcycle.split.shared.energy
import upcycle.split.shared.rate
from upcycle.split.shared.base import SHARED

__all__ = ["SHARED"]
