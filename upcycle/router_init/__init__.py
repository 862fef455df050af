"""One file, one router; one line here registers it."""

import upcycle.router_init.centroid
import upcycle.router_init.kmeans
import upcycle.router_init.low_rank
import upcycle.router_init.membership
import upcycle.router_init.normal
import upcycle.router_init.random
import upcycle.router_init.representative
import upcycle.router_init.ridge
import upcycle.router_init.static
import upcycle.router_init.uniform_random
from upcycle.router_init.base import ROUTERS

__all__ = ["ROUTERS"]
