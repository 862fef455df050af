"""How well a layer's gate rows tell its experts apart."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

ALIKE = 0.999
"""Cosine from which on two rows choose their experts together."""


def gate_facts(rows_ED: Tensor) -> dict[str, Any]:
    """How well the rows tell experts apart, as plain values."""
    return {"condition": condition_number(rows_ED), "alike": inseparable(rows_ED)}


def condition_number(rows_ED: Tensor) -> float:
    """The largest over the smallest singular value of the rows: 1 if they are orthogonal and of one
    length, infinite if one is a combination of others. Opposite rows are that, too, though they
    route cleanly; `inseparable` tells."""
    values = torch.linalg.svdvals(rows_ED.double())
    least = values[-1] if len(rows_ED) <= rows_ED.shape[1] else values.new_zeros(())
    rounding = values[0] * max(rows_ED.shape) * torch.finfo(torch.float32).eps
    return math.inf if least <= rounding else float(values[0] / least)


def inseparable(rows_ED: Tensor) -> list[tuple[int, int]]:
    """Pairs of experts whose rows point the same way, so that only their lengths choose."""
    unit_ED = normalize(rows_ED.double(), dim=1)
    pairs = (unit_ED @ unit_ED.T > ALIKE).triu(1).nonzero().tolist()
    return [(i, j) for i, j in pairs]
