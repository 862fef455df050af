"""How the learning rate rises and falls."""

import math

from upcycle.finetune.settings import Training


def learning_rate(settings: Training, step: int, part: str) -> float:
    """What the base learning rate is multiplied by in a step: a linear rise, then a cosine."""
    total = settings.total_steps
    start = round(settings.start(part) * total)
    if step < start:
        return 0.0
    rise = max(1, round(settings.warmup * total))
    if step - start < rise:
        return (step - start + 1) / rise
    way = (step - start - rise) / max(1, total - start - rise)
    return settings.final_lr + (1 - settings.final_lr) * (1 + math.cos(math.pi * way)) / 2
