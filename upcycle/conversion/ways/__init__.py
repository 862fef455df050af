"""Ways of making experts of a dense FFN, by the name of their method."""

import upcycle.conversion.ways.copy
import upcycle.conversion.ways.merge
import upcycle.conversion.ways.prune
import upcycle.conversion.ways.split
from upcycle.conversion.ways.base import WAYS, Room, Way

__all__ = ["WAYS", "Room", "Way"]
