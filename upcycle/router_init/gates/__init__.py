"""One file, one gate; one line here registers it."""

import upcycle.router_init.gates.cheap_embed
import upcycle.router_init.gates.domain
import upcycle.router_init.gates.hidden
import upcycle.router_init.gates.hidden_avg
import upcycle.router_init.gates.hidden_last
import upcycle.router_init.gates.loss
import upcycle.router_init.gates.perplexity
import upcycle.router_init.gates.text
from upcycle.router_init.gates.base import GATES

__all__ = ["GATES"]
