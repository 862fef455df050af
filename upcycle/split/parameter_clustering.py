"""Parameter clustering: neurons with similar input weights share an expert.

Zhang et al., MoEfication, Findings of ACL 2022, arXiv:2110.01786; LLaMA-MoE's
Independent-Clustering, arXiv:2406.16554. Both run size-constrained k-means on unit rows of one
input matrix, as we do; which one is `rows`.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from upcycle.core.clustering import balanced_kmeans
from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN
from upcycle.split.base import split_from_weights


class ClusterParams(Params):
    rows: Literal["gate", "up"] = "gate"


@split_from_weights(
    "parameter_clustering",
    summary="balanced k-means on the unit rows of gate_proj (or up_proj)",
    paper="arXiv:2110.01786",
    params=ClusterParams,
)
def split(ffn: DenseFFN, num_experts: int, params: ClusterParams, rng: torch.Generator) -> Tensor:
    rows_FD = ffn.rows_FD if params.rows == "gate" else ffn.up_FD
    members_EM, _ = balanced_kmeans(normalize(rows_FD.float(), dim=1), num_experts, rng)
    return members_EM
