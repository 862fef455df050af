"""The most memory that `upcycle eval --against` takes on a large vocabulary.

Makes a tiny random model, whose weights are next to nothing, and evaluates it against itself on
five texts in a process of its own. All log-probabilities of the dense model alone would be
tokens × vocabulary × 2 bytes: 12.4 GB for what is asked by default.

    python benchmarks/eval_memory.py --out SCRATCH
"""

import argparse
import json
import random
import resource
import time
from pathlib import Path

from command import upcycle
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_model(folder: Path, vocab_size: int, hidden: int) -> None:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def make_texts(folder: Path, count: int, tokens: int) -> list[Path]:
    """Of random letters, one token each."""
    paths = [folder / f"{i}.txt" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_text("".join(random.Random(i).choices("abcdefgh \n", k=2 * tokens)))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--texts", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--out", type=Path, required=True, help="scratch")
    args = parser.parse_args()

    model = args.out / "model"
    make_model(model, args.vocab_size, args.hidden)
    texts = make_texts(args.out, args.texts, args.tokens)
    named = [word for path in texts for word in ("--text", str(path))]
    start = time.monotonic()
    upcycle("eval", str(model), "--against", str(model), "--tokens", str(args.tokens), *named)
    row = {
        "seconds": round(time.monotonic() - start, 1),
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        "log_probs_bytes": args.texts * args.tokens * args.vocab_size * 2,
    }
    print(json.dumps(vars(args) | {"out": str(args.out)} | row))


if __name__ == "__main__":
    main()
