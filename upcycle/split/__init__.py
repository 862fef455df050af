"""One file, one way to split; one line here registers it."""

import upcycle.split.coactivation
import upcycle.split.coactivation_graph
import upcycle.split.common_neurons
import upcycle.split.contiguous
import upcycle.split.parameter_clustering
import upcycle.split.predictability
import upcycle.split.random
import upcycle.split.ranked
import upcycle.split.sharing_inner
import upcycle.split.spectral
import upcycle.split.token_clusters
from upcycle.split.base import SPLITS

__all__ = ["SPLITS"]
