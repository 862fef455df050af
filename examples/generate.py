"""Load checkpoints with plain transformers and let each continue a prompt."""

import argparse
import time

from transformers import AutoModelForCausalLM, AutoTokenizer, logging

logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders written by upcycle")
    parser.add_argument("--prompt", default="What is a list in Python?")
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    for folder in args.models:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        prompt = tokenizer(args.prompt, return_tensors="pt")
        if tokenizer.chat_template is not None:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": args.prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        start = time.monotonic()
        output = model.generate(**prompt, max_new_tokens=args.tokens, do_sample=False)
        seconds = time.monotonic() - start
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        name = type(model).__name__
        print(
            f"\n{folder} ({name}, {model.num_parameters():,} parameters, {seconds:.1f} s)\n{text}"
        )


if __name__ == "__main__":
    main()
