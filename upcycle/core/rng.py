"""Randomness: one generator per (seed, stage, layer), so that layers are independent."""

import hashlib

import torch


def generator(seed: int, stage: str, layer: int) -> torch.Generator:
    """A CPU generator that depends on these three values alone."""
    digest = hashlib.sha256(f"{seed}/{stage}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw_seed(rng: torch.Generator) -> int:
    """A seed for a library that wants an integer."""
    return int(torch.randint(2**31 - 1, (), generator=rng))
