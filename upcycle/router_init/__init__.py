"""One file, one router; one line here registers it."""

import upcycle.router_init.centroid
import upcycle.router_init.kmeans
import upcycle.router_init.membership
import upcycle.router_init.normal
import upcycle.router_init.representative
import upcycle.router_init.ridge
import upcycle.router_init.static
from upcycle.router_init.base import ROUTERS

__all__ = ["ROUTERS"]
