"""How many tokens per second a model reads and writes.

Prefill is one forward pass over [batch, window] tokens that fills the KV cache and gives the last
token's logits. Decode is greedy steps from there, one token of each sequence per step. Two models
take turns, so that whatever else the machine does hits both alike, and the median of the rounds
counts.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upcycle.core.machine import device_name
from upcycle.models.blocks import moe_blocks

ROUNDS = 5
DECODE_STEPS = 32


@dataclass(frozen=True)
class Speed:
    """Tokens per second, of all sequences of a batch together."""

    batch_size: int
    threads: int
    """That torch uses on the CPU."""
    dtype: str
    experts_implementation: str
    """How transformers computes the experts; `none` in a dense model."""
    prefill: float
    decode: float
    prefill_against: float | None
    decode_against: float | None
    machine: str = ""
    """The CPU's or the GPU's name."""


def measure_speed(
    model: Any, against: Any | None, tokens_BL: Tensor, step: Callable[[int, int], None]
) -> Speed:
    """Time a model, in turn with the one it is compared with, on the windows [B, L] as one batch.

    Args:
        step: told how many rounds are done, and how many there are.
    """
    models = [model] if against is None else [model, against]
    for each in models:  # what runs for the first time is slower
        tokens_per_second(each, tokens_BL)
    rounds = []
    for done in range(ROUNDS):
        step(done, ROUNDS)
        rounds.append([tokens_per_second(each, tokens_BL) for each in models])
    step(ROUNDS, ROUNDS)
    medians = [
        tuple(statistics.median(speeds) for speeds in zip(*turns, strict=True))
        for turns in zip(*rounds, strict=True)
    ]
    (prefill, decode), (prefill_against, decode_against) = [*medians, (None, None)][:2]
    implementation = str(model.config._experts_implementation) if moe_blocks(model) else "none"
    return Speed(
        batch_size=len(tokens_BL),
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        experts_implementation=implementation,
        prefill=prefill,
        decode=decode,
        prefill_against=prefill_against,
        decode_against=decode_against,
        machine=device_name(model.device),
    )


@torch.no_grad()
def tokens_per_second(model: Any, tokens_BL: Tensor) -> tuple[float, float]:
    """Of one prefill and of the decoding after it."""
    tokens_BL = tokens_BL.to(model.device)
    start = _now(model.device)
    output = model(input_ids=tokens_BL, use_cache=True, logits_to_keep=1)
    read = _now(model.device)
    with _as_generate_decodes(model):
        for _ in range(DECODE_STEPS):
            output = model(
                input_ids=output.logits[:, -1:].argmax(-1),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
    written = _now(model.device)
    return tokens_BL.numel() / (read - start), len(tokens_BL) * DECODE_STEPS / (written - read)


@contextmanager
def _as_generate_decodes(model: Any) -> Iterator[None]:
    """With the experts computed as transformers' `generate` does while it decodes: on a GPU it
    goes over from grouped_mm to batched_mm."""
    name = model.config._experts_implementation
    switch = model.device.type != "cpu" and name == "grouped_mm" and bool(moe_blocks(model))
    if switch:
        model.set_experts_implementation("batched_mm")
    yield
    if switch:
        model.set_experts_implementation(name)


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
