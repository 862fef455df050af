"""What a model goes on to write after a prompt, beside the dense model it was made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upcycle.core.foreign import blaming
from upcycle.core.machine import choose_device
from upcycle.evaluation.opening import choose_dtype
from upcycle.models.chat import ChatRefused, render_chat
from upcycle.models.loading import load_model
from upcycle.models.opening import checkpoint_folder
from upcycle.models.tokens import load_tokenizer

PROMPTS = (
    "What is the capital of France? Answer in a sentence:",
    "Go on with the story: Once upon a time there was a robot who",
)
"""Which a model of plain text and one of chats can both go on from."""
TOKENS = 40


@dataclass(frozen=True)
class Sample:
    """A prompt and what follows it, always the likeliest token."""

    prompt: str
    text: str
    against: str | None
    """What the dense model writes."""


def samples(
    model: str, against: str | None, step: Callable[[int, int], None] = lambda done, total: None
) -> list[Sample]:
    """Let a model, and perhaps the one that it is compared with, go on from each prompt.

    Args:
        model, against: as `evaluate` takes them; one is in memory at a time.
        step: told how many models are done, and how many there are.

    Raises:
        UpcycleError: one does not load or has no tokenizer.
    """
    written = []
    named = [model] if against is None else [model, against]
    for done, name in enumerate(named):
        step(done, len(named))
        with checkpoint_folder(name) as folder:
            written.append(_continuations(folder))
    step(len(named), len(named))
    beside: Sequence[str | None] = [None] * len(PROMPTS) if against is None else written[1]
    return [Sample(*row) for row in zip(PROMPTS, written[0], beside, strict=True)]


def _continuations(folder: Path) -> list[str]:
    device = choose_device("auto")
    model = load_model(folder, choose_dtype("auto", folder, device), device)
    tokenizer = load_tokenizer(folder)
    return [continuation(model, tokenizer, prompt) for prompt in PROMPTS]


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after the prompt; an answer, if its tokenizer has a chat template."""
    ids_1L = _prompt_ids(tokenizer, prompt).to(model.device)
    # Penalties that generation_config.json may ask for would hide that a model repeats itself.
    with blaming("the model can't write text, perhaps by its generation_config.json"):
        written_1L = model.generate(
            ids_1L,
            attention_mask=torch.ones_like(ids_1L),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=TOKENS,
            pad_token_id=tokenizer.eos_token_id,
        )
        # What a decoder writes begins with the prompt.
        given = 0 if model.config.is_encoder_decoder else ids_1L.shape[1]
        text: str = tokenizer.decode(written_1L[0, given:], skip_special_tokens=True)
    return text


def _prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    if tokenizer.chat_template is not None:
        message = {"role": "user", "content": prompt}
        try:
            prompt = render_chat(tokenizer, [message], add_generation_prompt=True)
        except ChatRefused:
            pass  # one that takes no lone user message
        else:
            return _ids(tokenizer, prompt, add_special_tokens=False)
    return _ids(tokenizer, prompt)


def _ids(tokenizer: Any, text: str, **settings: bool) -> torch.Tensor:
    return torch.tensor([tokenizer(text, **settings)["input_ids"]])
