"""What a converted model must compute, worked out here without upcycle.

Every quantity is compared as `gap`: the largest difference of any logit over the logits' standard
deviation.
"""

import functools
import json
import math
from contextlib import contextmanager

import torch
from safetensors.torch import load_file
from tiny import FFN_LAYERS, HEADS, HOLDERS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

TOLERANCE = {"mean": 2e-5, "sum": 5e-3}
"""The largest gap of a float32 model. A mean of copies leaves rounding; a sum of experts leaves an
error of the order of its router's spread, 1e-4 in PLAIN_SPLIT, too, which every layer adds to."""

NOISE = 4.0
"""The largest gap below float32, in units of what rounding does to the dense model itself."""

MUTATED = 0.5
"""The least gap of a model with one mistake in it: far beyond every tolerance."""

ALWAYS_RENORMALISES = {
    "mixtral", "granitemoeshared", "granitemoe_swa", "granitemoehybrid", "ernie4_5_moe", "laguna",
    "qwen3_5_moe", "gemma4",
}  # fmt: skip
"""Their K selected experts share weight 1 whatever K is, so a split's gain is K; elsewhere each
expert's weight does not depend on K."""

TOKENS = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
"""Longer than the windows of the tiny models."""


def load(folder, dtype=torch.float32, **overrides):
    """The folder's model by plain transformers; fails unless every tensor finds its place."""
    kind = read_json(folder / "config.json")["model_type"]
    auto = AutoModelForImageTextToText if kind in HOLDERS else HEADS.get(kind, AutoModelForCausalLM)
    model, info = auto.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True, **overrides
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[kind], f"{kind}: {info[kind]}"
    return model.eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens, use_cache=False).logits.float()


@functools.cache
def dense_logits(folder, dtype=torch.float32):
    """Of a source, which no test changes."""
    return logits(load(folder, dtype))


def gap(actual, expected):
    return float((actual - expected).abs().max() / expected.std())


def noise(folder, dtype):
    """What the dtype's rounding does to the dense model in the folder."""
    return gap(dense_logits(folder, dtype), dense_logits(folder))


def load_all_on(folder, dtype=torch.float32):
    """The split in the folder with all its routed experts selected, each with weight 1."""
    config = read_json(folder / "config.json")
    routed = read_json(folder / "upcycle.json")["plan"]["experts"]
    model = load(folder, dtype)
    selected = select(model, routed)
    if config.get("norm_topk_prob", True):
        for stacked in experts(model):
            stacked.down_proj.data *= routed / selected
    return model


def top_k(config):
    """As config.json spells it."""
    names = ("num_experts_per_tok", "moe_k", "top_k_experts")
    return next(config[name] for name in names if name in config)


def load_all_alike(folder, dtype=torch.float32):
    """The same with the routers' rows at zero, so that no logits make their weights uneven."""
    model = load_all_on(folder, dtype)
    for weight in router_weights(model):
        weight.data.zero_()
    return model


def routers(model):
    """Layer by layer. Called, each returns logits, weights and the selected experts, in an order
    that differs between versions of transformers; the selected experts alone are integers."""
    endings = ("topkrouter", "gemma4textrouter")
    return [m for m in model.modules() if type(m).__name__.lower().endswith(endings)]


def router_weights(model):
    """Layer by layer, [E, D]."""
    return [getattr(router, "proj", router).weight for router in routers(model)]


def select(model, top_k):
    """Let each token have so many experts; returns how many it had."""
    text = model.config.get_text_config()
    if getattr(text, "top_k_experts", None):
        selected, text.top_k_experts = text.top_k_experts, top_k
        return selected
    for router in routers(model):
        selected, router.top_k = router.top_k, top_k
    return selected


def experts(model):
    """Layer by layer, with gate_up_proj [E, 2 M, D] and down_proj [E, D, M]."""
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


def moe_layers(folder):
    """The folder's record of each converted layer."""
    return [layer for layer in read_json(folder / "upcycle.json")["layers"] if not layer["dense"]]


def selected(router_output):
    (indices_TK,) = (t for t in router_output if not t.is_floating_point())
    return indices_TK


@contextmanager
def selections(model):
    """Collects which experts the router of each MoE layer selects [T, K], during the context."""
    seen = [None] * len(routers(model))
    hooks = [
        router.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, selected(out)))
        for i, router in enumerate(routers(model))
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def naive_sum(source, out, dtype=torch.float32, **overrides):
    """The converted model's logits, and those that the experts it selects should give."""
    model = load(out, dtype, **overrides)
    with selections(model) as selected:
        actual = logits(model)
    return actual, naive_sum_logits(load(source, dtype), out, selected)


def naive_sum_logits(dense, folder, selected, tokens=TOKENS):
    """The dense model's logits when each token's FFN is the unweighted sum of the shared neurons
    and of the experts that the converted model selected for it.

    Neurons that belong to no such expert are silenced where they enter the dense down_proj.
    """
    hooks = []
    for record, selected_TK in zip(moe_layers(folder), selected, strict=True):
        mask_TF = active_neurons(folder, record["permutation"], selected_TK)

        def silence(_, args, mask_TF=mask_TF):
            (h_BLF,) = args
            return (h_BLF * mask_TF.view_as(h_BLF).to(h_BLF.dtype),)

        down = down_of(dense.get_decoder().layers[record["layer"]])
        hooks.append(down.register_forward_pre_hook(silence))
    result = logits(dense, tokens)
    for hook in hooks:
        hook.remove()
    return result


FFNS = ("mlp", "feed_forward", "shared_mlp", "mixer")
DOWNS = ("down_proj", "w2", "output_linear")


def ffn_blocks(model):
    """The layers of a dense model that have an FFN."""
    layers = FFN_LAYERS.get(model.config.model_type, range(len(model.model.layers)))
    return [model.model.layers[layer] for layer in layers]


def ffn_of(block):
    """The FFN of a dense model's layer."""
    return next(getattr(block, name) for name in FFNS if hasattr(block, name))


def down_of(block):
    """Its last matrix, as a module."""
    return next(getattr(ffn_of(block), name) for name in DOWNS if hasattr(ffn_of(block), name))


def neurons(ffn, x_TD):
    """What the neurons of a dense model's FFN put out, h [T, F], and its last matrix [D, F]."""
    *first, down_DF = (m.weight for m in ffn.modules() if isinstance(m, torch.nn.Linear))
    before_TH = x_TD @ torch.cat(first).T
    acts = (getattr(ffn, name, None) for name in ("act_fn", "activation_fn", "activation"))
    act = next(filter(None, acts), torch.nn.functional.silu)
    if before_TH.shape[1] == down_DF.shape[1]:
        return act(before_TH), down_DF
    gate_TF, up_TF = before_TH.chunk(2, dim=-1)
    return act(gate_TF) * up_TF, down_DF


def naive_hidden(ffn, x_TD):
    """h [T, F] in float64, neuron by neuron, for act = silu."""
    x_TD, gate_FD, up_FD = (m.double().numpy() for m in (x_TD, ffn.gate_FD, ffn.up_FD))
    h_TF = torch.zeros(len(x_TD), len(gate_FD), dtype=torch.float64)
    for t, x_D in enumerate(x_TD):
        for i in range(len(gate_FD)):
            before = float(gate_FD[i] @ x_D)
            h_TF[t, i] = before / (1 + math.exp(-before)) * float(up_FD[i] @ x_D)
    return h_TF


def naive_weights(target, logits_TE, top_k):
    """What each expert of a split counts for a token, [T, E] in float64, token by token.

    Of E experts each has E times its share of the softmax, but where the target renormalises, and
    there is more than one to share among, K times its share among the K selected; under a sigmoid
    twice its score. Then all that are selected count 1 where the logits are equal.
    """
    weight_TE = torch.zeros_like(logits_TE, dtype=torch.float64)
    for t, logits in enumerate(logits_TE.tolist()):
        chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[:top_k]
        renormalised = target in ALWAYS_RENORMALISES or (target == "qwen3_moe" and top_k > 1)
        among = chosen if renormalised else range(len(logits))
        total = sum(math.exp(logits[e]) for e in among)
        for e in chosen:
            softmax = len(among) * math.exp(logits[e]) / total
            weight_TE[t, e] = 2 / (1 + math.exp(-logits[e])) if target == "glm4_moe" else softmax
    return weight_TE


def active_neurons(folder, permutation, selected_TK):
    """How often each neuron counts, [T, F]."""
    plan = read_json(folder / "upcycle.json")["plan"]
    shared = plan["shared_size"]
    experts_EM = torch.tensor(permutation[shared:]).view(-1, plan["expert_size"])
    mask_TF = torch.zeros(len(selected_TK), plan["intermediate_size"])
    mask_TF[:, permutation[:shared]] = 1
    selected_TN = experts_EM[selected_TK].flatten(1)
    return mask_TF.scatter_add(1, selected_TN, torch.ones(selected_TN.shape))


def weights(folder):
    """All tensors of the folder's safetensors files."""
    return {
        k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()
    }


def content(folder):
    """Every file's bytes; of upcycle.json all but times, memory and place."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files["upcycle.json"])
    for key in ("seconds", "peak_memory", "out"):
        del report[key]
    return files | {"upcycle.json": report}


def read_json(path):
    return json.loads(path.read_text())
