"""Losses of continued training, against loops in float64 that follow their formulas."""

import math

import pytest
import torch

from upcycle.finetune import losses

B, L, V, D = 3, 7, 11, 5
MASK_BL = torch.ones(B, L, dtype=torch.bool)
MASK_BL[2, 4:] = False
MASK_T = MASK_BL.flatten()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TOKENS_BL = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(1))
TEACHER_BLV = normal(B, L, V, seed=2)
TEACHER_HIDDEN = tuple(normal(B, L, D, seed=10 + i) + 1 for i in range(3))


# --- naive ------------------------------------------------------------------------------------


def log_softmax(z_V):
    z_V = list(z_V)
    top = float(max(z_V).detach())
    total = sum((z - top).exp() for z in z_V).log() + top
    return [z - total for z in z_V]


def naive_next_token(logits_BLV):
    terms = [
        -log_softmax(logits_BLV[b, i])[TOKENS_BL[b, i + 1]]
        for b in range(B)
        for i in range(L - 1)
        if MASK_BL[b, i + 1]
    ]
    return sum(terms) / len(terms)


def naive_distillation(logits_BLV, temperature=1.0, kept=V):
    """Of each token's teacher the likeliest words one by one, and the others as one."""
    terms = []
    for b, i in MASK_BL.nonzero().tolist():
        ours = [z.exp() for z in log_softmax(logits_BLV[b, i] / temperature)]
        theirs = [z.exp() for z in log_softmax(TEACHER_BLV[b, i] / temperature)]
        order = sorted(range(V), key=lambda v: -theirs[v])
        groups = [[v] for v in order[:kept]] + ([order[kept:]] if kept < V else [])
        for group in groups:
            p, q = sum(theirs[v] for v in group), sum(ours[v] for v in group)
            terms.append(p * (p / q).log())
    return temperature**2 * sum(terms) / int(MASK_BL.sum())


def kept_distillation(logits_BLV, temperature, kept):
    found = losses.kept_words(TEACHER_BLV[MASK_BL], kept, temperature)
    return losses.kept_distillation_loss(logits_BLV[MASK_BL], found, temperature)


def naive_layer_match(hidden_SBLD):
    terms = []
    for h_BLD, t_BLD in zip(hidden_SBLD, TEACHER_HIDDEN, strict=True):
        for b, i in MASK_BL.nonzero().tolist():
            off = sum((h_BLD[b, i, d] - t_BLD[b, i, d]) ** 2 for d in range(D))
            terms.append(off / sum(t_BLD[b, i, d] ** 2 for d in range(D)))
    return sum(terms) / len(terms)


LOSSES = {
    "next_token": (
        lambda z: losses.next_token_loss(z, TOKENS_BL, MASK_BL), naive_next_token, (B, L, V),
    ),
    "distill": (
        lambda z: losses.distillation_loss(z, TEACHER_BLV, MASK_BL), naive_distillation, (B, L, V),
    ),
    "distill, softened": (
        lambda z: losses.distillation_loss(z, TEACHER_BLV, MASK_BL, 2.5),
        lambda z: naive_distillation(z, 2.5), (B, L, V),
    ),
    "distill, four words kept": (
        lambda z: kept_distillation(z, 2.5, 4), lambda z: naive_distillation(z, 2.5, 4), (B, L, V),
    ),
    "distill, all words kept": (
        lambda z: kept_distillation(z, 1.0, V + 3), naive_distillation, (B, L, V),
    ),
    "match_layers": (
        lambda h: losses.layer_match_loss(tuple(h), TEACHER_HIDDEN, MASK_BL), naive_layer_match,
        (3, B, L, D),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_those_of_the_formula(name):
    loss, naive, shape = LOSSES[name]
    x = normal(*shape, seed=4).float().requires_grad_()
    y = x.detach().double().requires_grad_()
    actual, expected = loss(x), naive(y)
    actual.backward()
    expected.backward()
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=1e-6)
    assert x.grad.abs().max() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_padding_does_not_count(name):
    """Whatever stands there."""
    loss, _, shape = LOSSES[name]
    x = normal(*shape, seed=4).float().requires_grad_()
    other = x.detach().clone()
    other[..., 2, 5 if name == "next_token" else 4 :, :] = 100.0
    other.requires_grad_()
    loss(x).backward()
    loss(other).backward()
    torch.testing.assert_close(loss(other), loss(x))
    torch.testing.assert_close(x.grad, other.grad)
    assert not x.grad.view(-1, B * L, shape[-1])[:, ~MASK_T].any()


def test_padded_tokens_do_not_count():
    z_BLV = normal(B, L, V)
    tokens_BL = TOKENS_BL.masked_fill(~MASK_BL, 0)
    one = losses.next_token_loss(z_BLV, tokens_BL, MASK_BL)
    tokens_BL[~MASK_BL] = V - 1
    assert torch.equal(one, losses.next_token_loss(z_BLV, tokens_BL, MASK_BL))


def test_equal_distributions_and_hidden_states_lose_nothing():
    same = losses.distillation_loss(TEACHER_BLV + 3, TEACHER_BLV, MASK_BL)
    assert float(same) == pytest.approx(0, abs=1e-6)
    assert not float(losses.layer_match_loss(TEACHER_HIDDEN, TEACHER_HIDDEN, MASK_BL))


def test_words_of_no_probability_that_were_not_kept_leave_a_number():
    """As of logits that spread by hundreds."""
    x = (300 * normal(B, L, V, seed=4)).float().requires_grad_()
    loss = kept_distillation(x, 1.0, 2)
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(x.grad.isfinite().all())


def test_low_precision_logits_are_summed_in_float32():
    z_BLV = normal(B, L, V).bfloat16()
    exact = losses.next_token_loss(z_BLV.double(), TOKENS_BL, MASK_BL)
    actual = losses.next_token_loss(z_BLV, TOKENS_BL, MASK_BL)
    assert actual.dtype == torch.float32
    assert float(actual) == pytest.approx(float(exact), rel=1e-6)
    kl = losses.distillation_loss(z_BLV, TEACHER_BLV.bfloat16(), MASK_BL)
    assert kl.dtype == torch.float32
