"""What layers keep that learn their split, router or weights, beside the default's closed forms.

Every recipe makes the layers' experts at the same geometry, on the dense model's hidden states. Two
numbers per layer, on the end of the text, which nothing was fitted to: the share of the routed
experts' output energy, Σ h² |down|² of the dense FFN, that the selected ones hold (mean over
tokens), and the layer's error |y_moe - y|² / |y|² as it would be written, tokens weighted as in
the refit of down_proj by 1 / |residual stream|².

    python benchmarks/fits.py --model MODEL --calibration FILE --layers 12
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from routers import Split, inputs, text

from upcycle import plan
from upcycle.conversion.converted import token_weights
from upcycle.conversion.layer import convert_layer
from upcycle.conversion.plan import Plan
from upcycle.core.types import DenseFFN, LayerActivations

CLOSED = {"split": "predictability", "router": "ridge"}
REFIT = {"compensate": "least_squares"}
FITS: dict[str, dict[str, Any]] = {
    "random split and router": {"split": "random", "router": "normal"},
    "default, no refit": CLOSED,
    "default": CLOSED | REFIT,
    "factorllm": {"split": "contiguous", "router": "normal", "fit": "prior_approximate"},
    "prior_approximate on default": CLOSED | {"fit": "prior_approximate"},
    "dot-moe": {"split": "random", "router": "normal", "fit": "transport"},
    "dot-moe, refit": {"split": "random", "router": "normal", "fit": "transport"} | REFIT,
    "random split, ridge": {"split": "random", "router": "ridge"},
    "ladimo": CLOSED | {"fit": "distillation"},
    "ladimo, refit": CLOSED | {"fit": "distillation"} | REFIT,
    "descent": CLOSED | {"compensate": "descent"},
    "low rank 4": CLOSED | {"router": {"name": "low_rank", "rank": 4}},
}


def measure(
    made: Plan, layer: int, ffn: DenseFFN, seen: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
    """One layer by one recipe; `seen` holds x [T, D] and norms [T], of which the last are held."""
    x_TD, norm_T, held_TD, held_T = seen
    clock = time.monotonic()
    converted = convert_layer(made, layer, ffn, LayerActivations(ffn, x_TD), norm_T)
    seconds = time.monotonic() - clock
    split = Split(ffn, converted.layout, made.design.geometry.top_k)
    scores_TE = held_TD @ converted.router_ED.float().T
    wanted_TD = ffn(held_TD)
    wrong_TD = converted.output(LayerActivations(ffn, held_TD), made.design.weigh) - wanted_TD
    weight_T = token_weights(held_T)
    error = weight_T @ wrong_TD.square().sum(1) / (weight_T @ wanted_TD.square().sum(1))
    kept = split.kept(scores_TE, split.energies(held_TD))
    tried = converted.fit.error_after if converted.fit else None
    return {"kept": kept, "error": float(error), "seconds": seconds, "tried": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--tokens", type=int, default=16384, help="that all is fitted on")
    parser.add_argument("--held-tokens", type=int, default=4096, help="the text after these")
    parser.add_argument("--layers", type=int, nargs="+", required=True)
    parser.add_argument("--experts", type=int, default=12, help="routed ones")
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--shared", type=float, default=0)
    parser.add_argument("--only", nargs="+", help="some of the recipes")
    parser.add_argument("--set", nargs="*", default=[], help="KEY=VALUE of all recipes")
    parser.add_argument("--json", type=Path, help="results")
    args = parser.parse_args()

    asked = {"experts": args.experts, "top_k": args.top_k, "shared": args.shared}
    asked |= {"calibration": args.calibration, "calibration_tokens": args.tokens, "check": "none"}
    more = {key: float(value) for key, value in (pair.split("=") for pair in args.set)}
    plans = {
        name: plan(
            args.model,
            recipe="default",
            **asked,
            keep_dense="none",
            sequential=False,
            **({"compensate": "none"} | settings | (more if "fit" in settings else {})),
        )
        for name, settings in FITS.items()
        if not args.only or name in args.only
    }
    source, device = next(iter(plans.values())).source, next(iter(plans.values())).device
    sequences = (args.tokens + args.held_tokens) // 512
    tokens_BL = text(source, args.calibration, sequences, 512, device)
    rows = []
    table = Table("", "layer", "energy kept, %", "error", "seconds")
    for layer, ffn, x_TD, norm_T in inputs(source, tokens_BL, args.layers, device):
        cut = [args.tokens, len(x_TD) - args.tokens]
        seen = (x_TD[: cut[0]], norm_T[: cut[0]], x_TD[cut[0] :], norm_T[cut[0] :])
        for name, made in plans.items():
            row = {"layer": layer, "recipe": name} | measure(made, layer, ffn, seen)
            rows.append(row)
            kept, error, seconds = row["kept"], row["error"], row["seconds"]
            print(json.dumps(row), flush=True)
            table.add_row(name, str(layer), f"{100 * kept:.1f}", f"{error:.3f}", f"{seconds:.0f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
