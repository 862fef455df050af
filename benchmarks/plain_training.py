"""What a training loop that knows nothing of upcycle does to a split: transformers' own Trainer,
all weights, sixteen steps at ordinary rates.

Perplexity before and after on held-out text of the kind that is trained on, and on another kind,
and the share of selected experts that stay the same.

    python benchmarks/plain_training.py SPLIT --train FILE --trained FILE --other FILE \
        [--rates 1e-5 1e-4] [--json FILE]
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from upcycle.evaluation.comparing import compare
from upcycle.models.blocks import moe_blocks, watch_selections
from upcycle.models.tokens import open_reader

SEQ_LEN = 512


def selections(model: Any, tokens_BL: Tensor) -> list[Tensor]:
    """Per layer, which experts each token selects, [T, E]."""
    blocks = moe_blocks(model)
    masks: list[list[Tensor]] = [[] for _ in blocks]

    def see(place: int, chosen_TK: Tensor, _: Tensor) -> None:
        mask_TE = torch.zeros(len(chosen_TK), blocks[place].num_experts, dtype=torch.bool)
        masks[place].append(mask_TE.scatter_(1, chosen_TK.cpu(), True))

    with watch_selections(blocks, see), torch.no_grad():
        for window_L in tokens_BL:
            model(input_ids=window_L[None], use_cache=False)
    return [torch.cat(parts) for parts in masks]


def same(before: list[Tensor], after: list[Tensor]) -> float:
    """Share of the selected experts that are selected still."""
    kept = sum(int((b & a).sum()) for b, a in zip(before, after, strict=True))
    return kept / sum(int(b.sum()) for b in before)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    def tokens(text: str, sequences: int) -> Tensor:
        config = AutoModelForCausalLM.from_pretrained(args.split).config
        reader = open_reader(Path(args.split), config.vocab_size)
        return reader.windows(text, sequences, SEQ_LEN, seed=0)

    kinds = {
        "trained": tokens(args.trained, args.windows),
        "other": tokens(args.other, args.windows),
    }
    train_BL = tokens(args.train, args.steps)
    rows = [{"input_ids": row, "labels": row} for row in train_BL]
    before: dict[str, float] = {}
    for rate in (None, *args.rates):
        model = AutoModelForCausalLM.from_pretrained(args.split, dtype=torch.float32)
        chosen = selections(model, kinds["other"])
        if rate is not None:
            with tempfile.TemporaryDirectory() as folder:
                settings = TrainingArguments(
                    folder,
                    learning_rate=rate,
                    per_device_train_batch_size=1,
                    max_steps=args.steps,
                    report_to=[],
                    save_strategy="no",
                    disable_tqdm=True,
                    use_cpu=not torch.cuda.is_available(),
                )
                Trainer(model, settings, train_dataset=rows).train()
        model.eval()
        found = {k: compare(model, v, None, lambda _: None).perplexity for k, v in kinds.items()}
        before = before or found
        yield {
            "rate": rate,
            **found,
            **{f"{k} change": math.log(v / before[k]) for k, v in found.items()},
            "same selections": same(chosen, selections(model, kinds["other"])),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("split", help="a converted folder")
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--trained", required=True, help="other text of that kind")
    parser.add_argument("--other", required=True, help="text of another kind")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = list(measure(args))
    table = Table("rate", "trained kind", "another kind", "same selections")
    for row in rows:
        rate = "before" if row["rate"] is None else f"{row['rate']:g}"
        numbers = (f"{row['trained']:.2f}", f"{row['other']:.2f}", f"{row['same selections']:.3f}")
        table.add_row(rate, *numbers)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "rows": rows}))


if __name__ == "__main__":
    main()
