"""A target that rounds scores to the model's dtype: routers are as spread as their selection needs,
and what would be routed by nothing is refused."""

import pytest
import torch
from reference import load, logits, routers, selections
from tiny import PLAIN_SPLIT

import upcycle
from upcycle import UpcycleError

SPLIT = PLAIN_SPLIT | {"experts": 8, "top_k": 3, "split": "random", "check": "none"}


@pytest.mark.parametrize(
    ("family", "stored", "compensate", "spread"),
    [
        # A sigmoid near a half, in bfloat16: steps of 2^-8, which a change of logits by 2^-6 makes.
        ("lfm2", "bfloat16", "none", 8 * 2**-6),
        ("lfm2", "bfloat16", "least_squares", 8 * 2**-6),
        ("lfm2", "float16", "none", 8 * 2**-9),
        ("lfm2", "float16", "least_squares", 0.1),
        ("lfm2", "float32", "none", 0.01),
        ("llama", "bfloat16", "none", 0.01),
    ],
)
def test_spread_is_as_large_as_rounded_scores_need(dense, family, stored, compensate, spread):
    wanted = SPLIT | {"dtype": stored, "compensate": compensate, "router_spread": None}
    made = upcycle.plan(str(dense(family)), **wanted)
    assert made.design.router_spread == pytest.approx(spread)


def test_in_bfloat16_the_selection_is_that_of_the_unrounded_scores(dense, moe, text):
    """For nearly all that is selected; with the spread of other targets it is not."""

    def same(spread):
        out = moe(dense("lfm2"), dtype="bfloat16", experts=8, top_k=3, router_spread=spread)
        model = load(out, torch.bfloat16)
        x_TD = []
        routers(model)[0].register_forward_pre_hook(lambda _, args: x_TD.append(args[0].float()))
        with selections(model) as chosen:
            logits(model)
        logits_TE = x_TD[0] @ routers(model)[0].weight.float().T
        expected_TK = logits_TE.topk(3).indices
        hits = (chosen[0][:, :, None] == expected_TK[:, None]).any(-1).float()
        return float(hits.mean())

    assert same(None) > 0.93
    assert same(1e-3) < 0.8


def test_a_spread_that_rounding_swallows_is_said(dense):
    source = str(dense("lfm2", dtype=torch.bfloat16))
    said = upcycle.plan(source, **SPLIT | {"router_spread": 0.01}).warnings
    assert any("rounds scores to bfloat16" in note and "spread by 0.125" in note for note in said)
    assert not any("rounds scores" in n for n in upcycle.plan(source, method="copy").warnings)


def test_one_copy_per_token_needs_float32(dense):
    wanted = {"method": "copy", "experts": 4, "top_k": 1, "check": "none"}
    source = str(dense("lfm2", dtype=torch.bfloat16))
    with pytest.raises(UpcycleError, match=r"`top_k=1`: lfm2_moe rounds.*`dtype=float32`"):
        upcycle.plan(source, **wanted)
    upcycle.plan(source, dtype="float32", **wanted)
