"""How much of what a split loses is its router's fault.

Cuts layers of a dense model into experts, by the default recipe and by MoEfication's, and lets
different routers choose among the same experts. MoEfication (arXiv:2110.01786) trains a tanh MLP
as wide as there are experts, which no native MoE architecture can hold, so it is measured here
only. Beside it: a linear router trained the same way, and a wide MLP, which costs too much to route
by, but tells what x says of the experts at all. The oracle knows the true energies.

Two numbers per layer, on the end of the text, which nothing was fitted to: the share of the routed
experts' output energy, Σ h² |down|², that the selected ones hold (mean over tokens), and the
layer's error |y_moe - y|² / |y|², shared neurons included, tokens weighted as in the refit of
down_proj by 1 / |residual stream|². Nothing is refit, and every layer sees the dense model's
hidden states.

    python benchmarks/routers.py --model MODEL --calibration FILE --layers 1 3 5
"""

import argparse
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, normalize
from transformers.activations import ACT2FN

from upcycle import plan
from upcycle.conversion.fit.base import hard_top_k
from upcycle.conversion.layer import convert_layer
from upcycle.conversion.plan import Plan
from upcycle.core.rng import generator
from upcycle.core.types import DenseFFN, ExpertLayout, LayerActivations
from upcycle.models.assemble import dense_ffn
from upcycle.models.calibration import calibration
from upcycle.models.source import DenseSource
from upcycle.models.stream import HiddenStream
from upcycle.router_init import ROUTERS
from upcycle.router_init.ridge import expert_energies

Router = Callable[[Tensor], Tensor]
"""Scores [T, E] for inputs x [T, D]; a token takes the experts that score highest."""

RECIPES: dict[str, dict[str, Any]] = {"default": {"keep_dense": "none"}, "moefication": {}}
# The package's own, by what the table calls them; `static` takes the same experts for every token.
CLOSED_FORM = {"static": "static", "centre": "centroid", "ridge": "ridge"}
BATCH = 512


@dataclass(frozen=True)
class Split:
    """A dense FFN cut into experts, top_k of which are on."""

    ffn: DenseFFN
    layout: ExpertLayout
    top_k: int

    def energies(self, x_TD: Tensor) -> Tensor:
        """Of every routed expert, [T, E]."""
        pairs = expert_energies(LayerActivations(self.ffn, x_TD), self.layout.experts_EM)
        return torch.cat([energy_tE for _, energy_tE in pairs])

    def kept(self, scores_TE: Tensor, energy_TE: Tensor) -> float:
        """The selected experts' share of the energy, mean over tokens."""
        chosen_TK = scores_TE.topk(self.top_k).indices
        return (energy_TE.gather(1, chosen_TK).sum(1) / energy_TE.sum(1)).mean().item()

    def error(self, scores_TE: Tensor, x_TD: Tensor, weight_T: Tensor) -> float:
        """|y_moe - y|² / |y|²."""
        eye_EE = torch.eye(scores_TE.shape[1]).to(x_TD)
        selection = self.layout.selection(eye_EE, partial(hard_top_k, top_k=self.top_k))
        h_TF, off_TF = self.ffn.hidden(x_TD), 1 - selection(scores_TE)
        missing_TD, y_TD = (linear(out_TF, self.ffn.down_DF) for out_TF in (h_TF * off_TF, h_TF))
        return (weight_T @ missing_TD.square().sum(1) / (weight_T @ y_TD.square().sum(1))).item()


def train(
    network: nn.Module, lr: float, split: Split, x_TD: Tensor, epochs: int, rng: torch.Generator
) -> tuple[Router, int]:
    """MoEfication's training on the first nine tenths of the tokens, up to the epoch after which
    the last tenth kept most energy.

    Departure: the paper's label is the sum of an expert's activations, which ReLU makes positive.
    Here it is the square root of its energy.
    """
    unit_TD, energy_TE, fit = normalize(x_TD), split.energies(x_TD), len(x_TD) * 9 // 10
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    most, best, best_epoch = 0.0, network, 0
    for epoch in range(1, epochs + 1):
        network.train()
        for batch in torch.randperm(fit, generator=rng).tensor_split(max(1, fit // BATCH)):
            label_tE = energy_TE[batch].sqrt()
            logits_tE = network(unit_TD[batch])
            loss = binary_cross_entropy_with_logits(logits_tE, label_tE / label_tE.max())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            kept = split.kept(network(unit_TD[fit:]), energy_TE[fit:])
        if kept > most:
            most, best, best_epoch = kept, deepcopy(network), epoch
    return lambda x_TD: best(normalize(x_TD)), best_epoch


def networks(centre_ED: Tensor) -> dict[str, tuple[nn.Module, float]]:
    """What is trained, with its learning rate; the first two begin as the centre router, and they
    and their rate are as in MoEfication's code."""
    experts, hidden = centre_ED.shape
    first, only = (nn.Linear(hidden, experts, bias=False) for _ in range(2))
    second = nn.Linear(experts, experts, bias=False)
    for layer, weight in ((first, centre_ED), (only, centre_ED), (second, torch.eye(experts))):
        layer.weight.data.copy_(weight)
    standardise = nn.BatchNorm1d(hidden, affine=False)
    wide = nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, experts)
    return {
        "trained linear": (nn.Sequential(only), 0.01),
        "trained MLP": (nn.Sequential(first, nn.Tanh(), second), 0.01),
        "wide MLP": (nn.Sequential(standardise, *wide), 0.001),
    }


def routers(
    split: Split, x_TD: Tensor, layer: int, epochs: int
) -> Iterator[tuple[str, Router, int | None]]:
    """What chooses among the experts, fitted on x; of a trained one also the epoch."""
    experts_EM, rng = split.layout.experts_EM, generator(0, "random", layer)
    yield "random", lambda x_TD: torch.rand(len(x_TD), len(experts_EM), generator=rng), None
    activations, rows = LayerActivations(split.ffn, x_TD), {}
    for label, name in CLOSED_FORM.items():
        params, rng_router = ROUTERS[name].params(), generator(0, "router", layer)
        rows[label] = ROUTERS[name].run(activations, experts_EM, params, rng_router).to(x_TD)
        yield label, partial(linear, weight=rows[label]), None
    torch.manual_seed(layer)
    for label, (network, lr) in networks(rows["centre"]).items():
        rng_train = generator(0, "train", layer)
        yield label, *train(network.to(x_TD.device), lr, split, x_TD, epochs, rng_train)
    yield "oracle", split.energies, None


def text(
    source: DenseSource, name: str, sequences: int, seq_len: int, device: torch.device
) -> Tensor:
    """So many sequences of a calibration text, [B, L]."""
    found = calibration(
        source, name, sequences=sequences, windows=0, seq_len=seq_len, seed=0, device=device
    )
    return found.fit_BL


def inputs(
    source: DenseSource, tokens_BL: Tensor, layers: list[int], device: torch.device
) -> Iterator[tuple[int, DenseFFN, Tensor, Tensor]]:
    """For each of the layers: its FFN, what that sees in the dense model, x [T, D], and the norm
    [T] of what its output is added to."""
    outer = source.read(source.embedding_names())
    stream = HiddenStream(source.config, outer, tokens_BL, device)
    for layer in range(max(layers) + 1):
        raw = source.read_layer(layer)
        x_TD, norm_T = stream.attend(layer, raw)
        if layer in layers:
            ffn = dense_ffn(source.canonical(raw), ACT2FN[source.arch.fields["hidden_act"]])
            yield layer, ffn.to(x_TD.device, torch.float32), x_TD.float(), norm_T.float()
        stream.advance(layer)


def measure(args: argparse.Namespace, plans: dict[str, Plan]) -> Iterator[dict[str, Any]]:
    """A row per layer, recipe and router."""
    source, device = plans["default"].source, plans["default"].device
    fit, held = args.tokens // args.seq_len, args.held_tokens // args.seq_len
    tokens_BL = text(source, args.calibration, fit + held, args.seq_len, device)
    for layer, ffn, x_TD, norm_T in inputs(source, tokens_BL, args.layers, device):
        fit_TD, held_TD = x_TD.split([fit * args.seq_len, held * args.seq_len])
        weight_T = norm_T.clamp_min(norm_T.median().item() / 10)[len(fit_TD) :] ** -2
        for name, made in plans.items():
            layout = convert_layer(made, layer, ffn, LayerActivations(ffn, fit_TD)).layout
            split = Split(ffn, layout, made.design.geometry.top_k)
            for label, router, epoch in routers(split, fit_TD, layer, args.epochs):
                with torch.no_grad():
                    scores_TE = router(held_TD).to(held_TD.device)
                kept = split.kept(scores_TE, split.energies(held_TD))
                error = split.error(scores_TE, held_TD, weight_T)
                row = {"layer": layer, "recipe": name, "router": label, "epoch": epoch}
                yield row | {"kept": kept, "error": error}


def show(rows: list[dict[str, Any]], plans: dict[str, Plan]) -> None:
    """A line per router; in a cell, each layer."""
    layers = " ".join(str(layer) for layer in dict.fromkeys(row["layer"] for row in rows))
    table = Table("router", title=f"layers {layers}")
    for name, made in plans.items():
        cut = made.design.geometry
        shape = f"{cut.top_k} of {cut.num_experts} x {cut.expert_size} + {cut.shared_size}"
        table.add_column(f"{name} {shape}\nenergy kept, %")
        table.add_column("\nerror")
    for label in dict.fromkeys(row["router"] for row in rows):
        cells = []
        for name in plans:
            mine = [r for r in rows if r["router"] == label and r["recipe"] == name]
            cells.append(" ".join(f"{100 * row['kept']:.1f}" for row in mine))
            cells.append(" ".join(f"{row['error']:.3f}" for row in mine))
        table.add_row(label, *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--tokens", type=int, default=16384, help="that all is fitted on")
    parser.add_argument("--held-tokens", type=int, default=4096, help="the text after these")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--experts", type=int, help="routed ones")
    parser.add_argument("--active", type=float, default=0.5, help="share of the neurons")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=30, help="of the trained routers, at most")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()

    asked = {"experts": args.experts, "active": args.active, "calibration": args.calibration}
    asked |= {"calibration_tokens": args.tokens, "seq_len": args.seq_len, "check": "none"}
    plans = {
        name: plan(args.model, recipe=name, **asked, **settings)
        for name, settings in RECIPES.items()
    }
    rows = list(measure(args, plans))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    show(rows, plans)


if __name__ == "__main__":
    main()
