"""One file, one way to make copies differ; one line here registers it."""

import upcycle.perturb.drop
import upcycle.perturb.noise
from upcycle.perturb.base import PERTURBS

__all__ = ["PERTURBS"]
