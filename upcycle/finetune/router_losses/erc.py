"""Expert-router coupling: an expert answers to its own router row more than to another's.

arXiv:2512.23447. Row Rᵢ, shaken within half its distance from the nearest other row, stands for
the tokens that it selects; Mᵢⱼ is the norm of what expert j's gate matrix makes of it. Where Mᵢⱼ or
Mⱼᵢ exceeds α Mᵢᵢ, the difference costs, the mean over pairs of different experts and E. It costs no
tokens, and moves routers and experts. Departure: rows are taken at ordinary temperature.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from upcycle.core.registry import Params
from upcycle.finetune.router_losses.base import Facts, Seen, router_loss
from upcycle.finetune.routers import untempered


class Coupling(Params):
    alpha: PositiveFloat = 1.0
    """Answers to other rows cost from this share of the answer to one's own."""


def of_shards(facts: Facts, params: Coupling) -> str:
    if not facts.sharded:
        return ""
    return "with FSDP no process holds whole experts beside a forward pass: use data parallelism"


def shaken(rows_ED: Tensor, rng: torch.Generator) -> Tensor:
    """Each coordinate times a number between 1 − ε and 1 + ε, with ε half the distance from the
    nearest other row over the row's own norm."""
    with torch.no_grad():
        apart_EE = torch.cdist(rows_ED, rows_ED)
        apart_EE.fill_diagonal_(torch.inf)
        reach_E1 = apart_EE.amin(-1, keepdim=True) / 2 / rows_ED.norm(dim=-1, keepdim=True)
        draw_ED = 2 * torch.rand(rows_ED.shape, generator=rng).to(rows_ED) - 1
        factor_ED: Tensor = 1 + reach_E1.nan_to_num(0, 0, 0) * draw_ED
    return rows_ED * factor_ED


def responses(rows_ED: Tensor, gate_EMD: Tensor) -> Tensor:
    """The norm of what each expert's gate makes of each row: [E rows, E experts]."""
    answers_EEM = torch.einsum("rd,emd->rem", rows_ED, gate_EMD)
    norm_EE: Tensor = torch.linalg.vector_norm(answers_EEM, dim=-1)
    return norm_EE


def coupling(response_EE: Tensor, alpha: float) -> Tensor:
    own_E1 = alpha * response_EE.diagonal()[:, None]
    excess_EE = (response_EE - own_E1).relu() + (response_EE.T - own_E1).relu()
    others = 1 - torch.eye(len(response_EE)).to(response_EE)
    mean: Tensor = (excess_EE * others).mean()
    return mean


@router_loss(
    "erc",
    summary="an expert answers to its own router row more than to another's",
    paper="arXiv:2512.23447",
    params=Coupling,
    refusal=of_shards,
)
def erc(seen: Seen, params: Coupling) -> Tensor:
    rows_ED = untempered(seen.block.router.weight.float(), seen.scale)
    gate_EMD = seen.block.first[:, : seen.block.experts.down_proj.shape[2]]
    response_EE = responses(shaken(rows_ED, seen.rng), gate_EMD.float())
    return coupling(response_EE, params.alpha)
