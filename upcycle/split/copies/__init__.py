"""One file, one way to make copies differ; one line here registers it."""

import upcycle.split.copies.drop
import upcycle.split.copies.noise
from upcycle.split.copies.base import PERTURBS

__all__ = ["PERTURBS"]
