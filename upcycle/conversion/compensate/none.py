"""None: the experts keep the dense FFN's weights, so that all of them together are the FFN."""

from torch import Tensor

from upcycle.conversion.compensate.base import compensation
from upcycle.core.registry import Params
from upcycle.core.types import DenseFFN, LayerActivations, Selection


@compensation("none", summary="keep the dense weights", paper="baseline")
def keep(
    activations: LayerActivations,
    selection: Selection,
    y_TD: Tensor,
    weight_T: Tensor,
    params: Params,
) -> DenseFFN:
    return activations.ffn
