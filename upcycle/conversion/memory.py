"""How much memory a conversion takes: the most that any of its phases holds.

Counted as on a CPU, where layers run in float32; on a GPU it is less, and most of it lies there.
Formulas name what is alive at a phase's peak; `benchmarks/convert.py` measures the whole.
"""

from upcycle.conversion.dense_layers import DAMAGE_TOKENS
from upcycle.conversion.fit.loop import BATCH
from upcycle.conversion.plan import Plan
from upcycle.core.types import CHUNK_ELEMENTS, HELD_ELEMENTS
from upcycle.models.own_text import LENGTH, TOGETHER
from upcycle.models.stream import BATCH_TOKENS, PREDICTED_TOKENS
from upcycle.models.text import texts

FLOAT, DOUBLE = 4, 8
INTERPRETER = 420 * 10**6  # Python, torch and transformers
PER_WORD = 1300  # of the tokenizer's vocabulary
WORKING = 200 * 10**6  # thread buffers, kernels, and freed memory that the allocator keeps
EDGE = {"coactivation_graph": 24, "spectral": 36}
"""Bytes per pair of neurons that a graph joins, while METIS cuts it or its matrix is solved."""
GGUF_COPIES = 2  # of the largest tensor or layer of a GGUF file, while it is written in float32
GGUF_KEPT = 100 * 10**6  # after that


def peak_bytes(plan: Plan, *, measured: bool = False) -> int:
    """Estimate of the conversion's resident memory, interpreter included, the check aside.

    Args:
        measured: of a plan that is decided, whether the layers to keep dense were measured.
    """
    phases = [WORKING + _outside_layers(plan), _layer(plan) + _writing(plan)]
    if plan.streams or plan.passage_tokens:
        phases += [WORKING + _embedding(plan), WORKING + _fitting(plan)]
    if plan.needs_gradients:
        phases.append(WORKING + _going_back(plan))
    if plan.undecided or measured:
        phases.append(WORKING + _measuring(plan))
    if "self" in texts(plan.recipe.calibration) and plan.fit_tokens + plan.held_tokens:
        phases.append(WORKING + _sampling(plan))
    needed = max(phases)
    if plan.source.temporary is not None:
        largest = max(_layer(plan), *(info.nbytes for info in plan.source.tensors.values()))
        needed = max(needed, WORKING + GGUF_COPIES * largest) + GGUF_KEPT
    return INTERPRETER + PER_WORD * _vocab(plan) + needed


def _outside_layers(plan: Plan) -> int:
    """Embeddings and head are read together; of a merge, one of another model's beside them."""
    sizes = [plan.source.tensors[name].nbytes for name in plan.source.outer_names()]
    return sum(sizes) + (max(sizes) if plan.sources else 0)


def _embedding(plan: Plan) -> int:
    """The first hidden states, from embeddings in float32 beside all that is in no layer."""
    hidden = plan.source.arch.hidden_size
    outer = _outside_layers(plan)
    widened = _widened(plan, _vocab(plan) * hidden * plan.source.dtype.itemsize)
    return outer + widened + 2 * _streamed(plan) * hidden * FLOAT


def _streamed(plan: Plan) -> int:
    """Tokens that go through the layers, of calibration or of a merge's prompts and texts."""
    return plan.fit_tokens or plan.passage_tokens


def _going_back(plan: Plan) -> int:
    """The gradients of hidden states beside predictions at the end; in a layer, beside the hidden
    states that enter it and the gradients of what its FFN puts out, all that a batch's gradients
    are made from. What is put aside passes through memory once more."""
    arch, tokens = plan.source.arch, plan.fit_tokens
    batch, seq_len = min(tokens, BATCH_TOKENS), plan.recipe.seq_len
    hidden = tokens * arch.hidden_size * FLOAT
    outer = _outside_layers(plan)
    at_the_end = outer + _widened(plan, outer) + 2 * hidden
    at_the_end += 4 * min(tokens, PREDICTED_TOKENS) * _vocab(plan) * FLOAT
    attention = 3 * int(arch.fields["num_attention_heads"]) * seq_len
    saved = batch * (16 * arch.hidden_size + 6 * arch.intermediate_size + attention) * FLOAT
    in_a_layer = _layer(plan) + _widened(plan, _layer(plan)) + 5 * hidden + saved
    return max(at_the_end, in_a_layer)


def _sampling(plan: Plan) -> int:
    """The whole model writes calibration text, with keys and values of all that it has written;
    layers without attention keep no more."""
    arch = plan.source.arch
    tokens = 2 * TOGETHER * LENGTH  # an opener may be as long
    cache = tokens * arch.num_layers * arch.cached * plan.source.dtype.itemsize
    return _whole(plan) + int(cache)


def _writing(plan: Plan) -> int:
    """An FFN in the dtype that is written, perturbed in float32; and experts stacked, as fused
    layouts write them."""
    largest = max(s.nbytes for i in plan.moe_layers for s in plan.units[f"layer {i}"])
    return _ffn(plan) * (plan.design.dtype.itemsize + 2 * FLOAT) + 2 * largest


def _measuring(plan: Plan) -> int:
    """The damage pass: a branch of the hidden states per layer, and at the end the divergence of
    two sets of log-probabilities, which takes three more. (A trial takes less: of a layer what
    fitting it does, on fewer tokens, and at the end three sets of as many log-probabilities.)"""
    arch = plan.source.arch
    tokens = min(plan.fit_tokens, DAMAGE_TOKENS)
    hidden = (arch.num_layers + 1) * tokens * arch.hidden_size * FLOAT
    in_a_layer = hidden + _widened(plan, _layer(plan)) + 3 * tokens * arch.intermediate_size * FLOAT
    outer = _outside_layers(plan)
    weights = outer + _widened(plan, outer) + _layer(plan) + _ffn(plan) * FLOAT
    return weights + 2 * hidden + max(in_a_layer, 5 * tokens * _vocab(plan) * FLOAT)


def _fitting(plan: Plan) -> int:
    """A layer's weights, its inputs x and its activations h; and the largest of what splitting,
    refitting, running and writing it take beside."""
    arch, tokens = plan.source.arch, _streamed(plan)
    hidden, neurons, ffn = arch.hidden_size, arch.intermediate_size, _ffn(plan)
    weights = _layer(plan) + _widened(plan, _layer(plan) + ffn * plan.source.dtype.itemsize)
    stream = 2 * tokens * hidden * FLOAT
    of_way = plan.way.fitting(plan.design.geometry, tokens)
    on, own = of_way.neurons, of_way.tokens
    held = min(of_way.at_once * neurons, HELD_ELEMENTS) * FLOAT
    chunks = 3 * min(tokens * neurons, CHUNK_ELEMENTS) * FLOAT
    # xᵀy in both precisions, before and after it is added up.
    split = ffn * FLOAT + (FLOAT + 3 * DOUBLE) * hidden * (hidden + neurons)
    used = plan.way.used(plan.design.methods, plan.design.geometry)
    split += EDGE.get(used["split"].name, 0) * neurons**2 if "split" in used else 0
    fitted = _learning(plan) if plan.design.fits else 0
    refit = chunks + _refitting(own, on, hidden)
    # The refit weights, their gradient and Adam's two moments; a batch's activations.
    descent = (5 * 3 * hidden * on + 8 * BATCH * on) * FLOAT
    # y; with feedback the dense model's hidden states, and what the others lack of them.
    wanted = (own + 2 * tokens * (plan.design.feedback > 0)) * hidden * FLOAT
    # The experts that are done, in the dtype that is written, and the last ones while they join;
    # the inputs of one.
    done = of_way.kept * 3 * hidden * plan.design.dtype.itemsize
    pruned = (2 * done + own * hidden * FLOAT) * (of_way.kept > 0)
    compensation = (
        wanted + max(refit, descent * ("gate_FD" in plan.design.refits))
    ) * plan.design.compensates
    run = 3 * min(tokens, BATCH_TOKENS) * neurons * FLOAT + tokens * hidden * FLOAT
    return (
        weights
        + stream
        + held
        + max(chunks + split, chunks + fitted, compensation + pruned, run, _writing(plan))
    )


def _refitting(tokens: int, neurons: int, hidden: int) -> int:
    """The matrix of the least squares, its factor and the solver's copy; the right-hand side and
    the solution. Of fewer tokens than neurons, what the neurons put out besides, twice."""
    size = min(tokens, neurons)
    twice = 2 * FLOAT * tokens * neurons if tokens < neurons else 0
    return twice + DOUBLE * (3 * size**2 + 2 * (size + neurons) * hidden)


def _learning(plan: Plan) -> int:
    """The tokens once more in random order, with their activations; a batch's; and what the
    gradient is made from: weights as of descent, or all steps of a transport, forwards and back."""
    arch, geometry, tokens = plan.source.arch, plan.design.geometry, plan.fit_tokens
    hidden, neurons = arch.hidden_size, arch.intermediate_size
    fit = plan.design.methods.fit
    again = tokens * hidden + min(tokens * neurons, HELD_ELEMENTS)
    weights = 5 * 3 * hidden * neurons if fit.method.refits else 0
    plans = 2 * getattr(fit.params, "iterations", 0) * neurons * geometry.num_experts
    return (again + 8 * BATCH * neurons + weights + plans) * FLOAT


def _whole(plan: Plan) -> int:
    """Bytes of all weights, as stored."""
    return sum(info.nbytes for info in plan.source.tensors.values())


def _layer(plan: Plan) -> int:
    """Bytes of the largest layer, as stored."""
    layers = range(plan.source.arch.num_layers)
    return max(
        sum(plan.source.tensors[name].nbytes for name in plan.source.layer_names(layer))
        for layer in layers
    )


def _ffn(plan: Plan) -> int:
    """Weights in a dense FFN."""
    return plan.source.arch.ffn_params


def _widened(plan: Plan, stored: int) -> int:
    """Bytes of stored weights' copy in float32, which float32 itself does not need."""
    itemsize = plan.source.dtype.itemsize
    return 0 if itemsize == FLOAT else stored * FLOAT // itemsize


def _vocab(plan: Plan) -> int:
    return int(plan.source.arch.fields["vocab_size"])
