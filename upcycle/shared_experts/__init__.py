"""One file, one rule for the shared expert; one line here registers it."""

import upcycle.shared_experts.consensus
import upcycle.shared_experts.energy
import upcycle.shared_experts.rate
from upcycle.shared_experts.base import SHARED

__all__ = ["SHARED"]
