"""Hidden, last: mergekit-moe's other name for `hidden`."""

from upcycle.router_init.gates.base import gate
from upcycle.router_init.gates.hidden import last_states

gate(
    "hidden_last",
    summary="the same as `hidden`",
    paper="mergekit-moe",
    reads=("entering",),
)(last_states)
