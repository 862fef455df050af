"""Text that the dense model writes itself, about many things and in many forms.

A split is fitted on what the model does on text, and its own writing is text of the kinds, and in
the languages, that it knows (LLM-QAT, arXiv:2305.17888; self-calibration, arXiv:2410.17170). Left
to itself it writes about few things, so each document goes on from an opener of ours (a short
prefix is what arXiv:2410.17711 starts from, too); in a chat model some are answers to questions.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upcycle.core.errors import UpcycleError
from upcycle.core.foreign import blaming
from upcycle.core.paths import write_whole
from upcycle.core.progress import Progress
from upcycle.core.versions import versions
from upcycle.models.chat import ChatRefused, render_chat
from upcycle.models.companions import companions
from upcycle.models.loading import load_whole
from upcycle.models.source import DenseSource
from upcycle.models.text import KINDS, openers, paragraphs
from upcycle.models.tokens import front_tokens

LENGTH = 256  # tokens that are written after an opener, at most
TOGETHER = 64  # documents at a time
SOME_MORE = 8  # documents than would do if all were long
TOP_P = 0.95
TEMPERATURE, SMALL_TEMPERATURE, SMALL = 1.0, 0.9, 1_000_000_000
"""Of sampling; models of fewer parameters write more nonsense, the more so the hotter."""
REPETITION = 0.2  # share of a document's runs of four tokens that occurred before, at most
FIRST_WORDS = 12  # of a paragraph, from which a model goes on in its language
FOREIGN = 2.0
"""A model knows a language in which a paragraph costs it at most so many times the tokens, and the
nats, of the same paragraph in English."""
MOST_LANGUAGES = 8


def written_tokens(
    source: DenseSource,
    tokenizer: Any,
    wanted: int,
    seed: int,
    device: torch.device,
    progress: Progress = lambda stage, done, total: None,
) -> Tensor:
    """At least `wanted` tokens of documents that the model writes, each followed by the
    end-of-sequence token and without what begins a text. Loads the whole model. What it has written
    is kept in the user's cache.

    Raises:
        UpcycleError: all that it writes repeats itself, or a weight is no number.
    """
    place = _cache(source, wanted, seed, device)
    kept = _read(place)
    if kept is not None and len(kept) >= wanted:
        return kept
    with blaming(f"{source.folder} does not load in transformers"):
        model = load_whole(source.folder, dtype=source.config.dtype or source.dtype)
    model = model.to(device).eval()
    devices = [device] if device.type == "cuda" else []
    with _naming_damage(source), torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        # Round after round, each time with other chances.
        prompts = itertools.cycle(_prompts(model, tokenizer))
        found: list[int] = []
        while len(found) < wanted:
            before = len(found)
            progress("writing text", before, wanted)
            count = min(TOGETHER, SOME_MORE + (wanted - before) // LENGTH)
            for document in _write(model, tokenizer, list(itertools.islice(prompts, count))):
                found += _unbegun(document, tokenizer)
            if len(found) == before:
                raise UpcycleError(
                    "the model repeats itself in all that it writes, which nothing can be fitted "
                    "on: give `calibration=builtin`, or a text of your own"
                )
    progress("writing text", wanted, wanted)
    tokens = torch.tensor(found, dtype=torch.int64)
    _keep(place, tokens)
    return tokens


@contextmanager
def _naming_damage(source: DenseSource) -> Iterator[None]:
    """Where the model can't write for a weight that is no number, the error names that weight."""
    try:
        yield
    except UpcycleError:
        for name in source.tensors:
            source.read([name])
        raise


def _prompts(model: Any, tokenizer: Any) -> list[list[int]]:
    """The openers, all kinds in turn; then those in the model's other languages."""
    kinds = [openers(kind) for kind in KINDS if kind != "chat"]
    rows = [[_ids(tokenizer, text) for text in row] for row in zip(*kinds, strict=True)]
    for row, question in zip(rows, openers("chat"), strict=True):
        row += _asked(tokenizer, question)
    foreign = [_beginning(text) for text in _foreign_paragraphs(model, tokenizer)]
    for number, text in enumerate(foreign):
        rows[number % len(rows)].append(_ids(tokenizer, text))
    return [ids for row in rows for ids in row]


def _ids(tokenizer: Any, text: str, **settings: bool) -> list[int]:
    return list(tokenizer(text, verbose=False, **settings)["input_ids"])


def _asked(tokenizer: Any, question: str) -> list[list[int]]:
    """A question, up to where the answer begins; nothing where the template has no place for it."""
    if tokenizer.chat_template is None:
        return []
    message = {"role": "user", "content": question}
    try:
        text = render_chat(tokenizer, [message], add_generation_prompt=True)
    except ChatRefused:
        return []
    # The template brings its own special tokens.
    return [_ids(tokenizer, text, add_special_tokens=False)]


def _beginning(text: str) -> str:
    """The first words; of a language without spaces, about as many characters."""
    words = text.split(" ")
    return (
        " ".join(words[:FIRST_WORDS]) if len(words) > 2 * FIRST_WORDS else text[: 2 * FIRST_WORDS]
    )


def _foreign_paragraphs(model: Any, tokenizer: Any) -> list[str]:
    """In the languages besides English that the model knows, the best known first."""
    shipped = paragraphs("docs")
    length = {name: len(tokenizer.tokenize(found[0])) for name, found in shipped.items()}
    possible = [name for name in shipped if length[name] <= FOREIGN * length["en"]]
    nats = {name: _nats(model, tokenizer, shipped[name][0]) for name in possible}
    known = [name for name in possible if name != "en" and nats[name] <= FOREIGN * nats["en"]]
    known = sorted(known, key=lambda name: nats[name])[:MOST_LANGUAGES]
    return [text for name in known for text in shipped[name]]


def _nats(model: Any, tokenizer: Any, text: str) -> float:
    """What a text costs the model, all its tokens together."""
    ids = torch.tensor([tokenizer(text, verbose=False)["input_ids"]], device=model.device)
    logits_LV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits_LV, ids[0, 1:], reduction="sum"))


def _write(model: Any, tokenizer: Any, prompts: list[list[int]]) -> Iterator[list[int]]:
    """What the model makes of the prompts, less what repeats itself."""
    ends, pad = _ends(model, tokenizer)
    longest = max(map(len, prompts))
    ids_BL = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
    seen_BL = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    small = sum(p.numel() for p in model.parameters()) < SMALL
    with blaming("the model can't write text, perhaps by its generation_config.json"):
        written_BL = model.generate(
            ids_BL.to(model.device),
            attention_mask=seen_BL.to(model.device),
            do_sample=True,
            top_k=0,
            top_p=TOP_P,
            temperature=SMALL_TEMPERATURE if small else TEMPERATURE,
            repetition_penalty=1.0,
            max_new_tokens=LENGTH,
            eos_token_id=sorted(ends) or None,
            pad_token_id=pad,
        )[:, longest:].tolist()
    for prompt, new in zip(prompts, written_BL, strict=True):
        end = next((i for i, token in enumerate(new) if token in ends), len(new))
        if repetition(new[:end]) <= REPETITION:
            yield [*prompt, *new[:end], *([tokenizer.eos_token_id] if ends else [])]


def _unbegun(document: list[int], tokenizer: Any) -> list[int]:
    """Without what begins a text, which windows bring, or what the model wrote of it."""
    front, end = front_tokens(tokenizer), tokenizer.eos_token_id
    if tuple(document[: len(front)]) == front:
        document = document[len(front) :]
    return [token for token in document if token not in front or token == end]


def _ends(model: Any, tokenizer: Any) -> tuple[set[int], int]:
    """The tokens that end a document, and one to pad with."""
    named = model.generation_config.eos_token_id
    ends = set(named) if isinstance(named, list) else {named}
    ends = (ends | {tokenizer.eos_token_id}) - {None}
    return (ends if tokenizer.eos_token_id is not None else set()), min(ends, default=0)


def repetition(tokens: list[int]) -> float:
    """Share of the runs of four tokens that occurred before."""
    runs = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _cache(source: DenseSource, wanted: int, seed: int, device: torch.device) -> Path:
    """Where the text is kept: by everything that it depends on."""
    settings = [LENGTH, TOGETHER, TOP_P, TEMPERATURE, SMALL_TEMPERATURE, REPETITION, FOREIGN]
    made_from = {
        "source": source.fingerprint(),
        "companions": [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in companions(source.folder)
        ],
        "versions": versions(),
        "settings": [*settings, wanted, seed, str(device), torch.get_num_threads()],
        "openers": [openers(kind) for kind in KINDS],
    }
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "upcycle" / "written" / f"{name}.json"


def _read(place: Path) -> Tensor | None:
    try:
        tokens = torch.tensor(json.loads(place.read_text(encoding="utf-8")), dtype=torch.int64)
    except (OSError, ValueError, TypeError):
        return None
    return tokens if tokens.dim() == 1 else None


def _keep(place: Path, tokens: Tensor) -> None:
    """A cache that can't be written is no reason to stop."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps(tokens.tolist()))
    except OSError:
        pass
