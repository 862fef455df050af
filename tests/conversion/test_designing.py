"""The design that a recipe comes to: feedback, spread, and how experts count together."""

import pytest
from refusals import refusal

import upcycle
from upcycle.conversion.designing import EXACT_SPREAD, SPREAD, UNFITTED_SPREAD


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"experts": 6, "top_k": 4, "shared": 0.25}, 0.5),
        ({"experts": 8, "top_k": 2, "shared": 0, "keep_dense": [1]}, 0.5),
        ({"experts": 8, "top_k": 2, "shared": 0}, 0.25),
        ({"experts": 8, "top_k": 2, "shared": 0, "compensate.feedback": 0.9}, 0.9),
        ({"method": "prune", "active": 0.25}, 0),
        ({"compensate": "none"}, 0),
        ({"sequential": False}, 0),
    ],
)
def test_feedback_is_half_or_the_active_share(dense, settings, expected):
    settings = {"keep_dense": "none"} | settings
    assert upcycle.plan(str(dense()), **settings).design.feedback == pytest.approx(expected)


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("olmo2", {}, "olmo2 has a norm between its FFN and the hidden states, so give 0"),
        ("llama", {"method": "prune"}, "pruned copies are fitted to the dense FFN's output"),
        ("llama", {"sequential": False}, "`sequential=False` fits layers on the dense model's"),
    ],
)
def test_feedback_that_would_have_no_effect(dense, family, settings, why):
    sentence = refusal(dense, family, **settings, **{"compensate.feedback": 0.4})
    assert "compensate.feedback=0.4 has no effect" in sentence
    assert why in sentence
    assert upcycle.plan(str(dense(family)), **settings, **{"compensate.feedback": 0})


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, SPREAD),
        ({"method": "prune"}, SPREAD),
        ({"method": "prune", "compensate": "none"}, UNFITTED_SPREAD),
        ({"compensate": "none"}, UNFITTED_SPREAD),
        ({"router_spread": 0.3}, 0.3),
        ({"compensate": "none", "router_spread": 0.3}, 0.3),
        ({"method": "copy", "top_k": 1}, EXACT_SPREAD),
        ({"method": "copy", "top_k": 1, "router_spread": 0.3}, EXACT_SPREAD),
    ],
)
def test_router_spreads_as_a_refit_knows_of_uneven_weights(dense, settings, expected):
    assert upcycle.plan(str(dense()), **settings).design.router_spread == expected


@pytest.mark.parametrize("spread", [0, 1e-5, 1.5])
def test_spread_that_no_router_can_have(dense, spread):
    assert f"router_spread={spread}: input should be" in refusal(dense, router_spread=spread)


def test_one_copy_per_token_where_the_router_would_learn_nothing(dense):
    assert refusal(dense, method="copy", top_k=1, target="mixtral") == (
        "`top_k=1` gives each token one expert, and mixtral always renormalises its weight, so the "
        "router would get no gradient: raise `top_k`, choose `target=glm4_moe or qwen2_moe`, or "
        "pass `allow_frozen_router=True`"
    )


def test_one_shard_per_token_is_the_same(dense):
    sentence = refusal(dense, method="copy", granularity=4, top_k=1, target="mixtral")
    assert sentence.startswith("`top_k=1` gives each token one expert")


def test_one_copy_of_several_shards_has_weights_to_learn(dense):
    made = upcycle.plan(str(dense()), method="copy", granularity=4, top_k=4)
    assert (made.design.combine, made.target) == ("mean", "mixtral")


def test_one_copy_per_token_names_only_targets_that_host_the_model(dense):
    sentence = refusal(dense, "granite", method="copy", top_k=1)
    assert sentence.endswith("raise `top_k`, or pass `allow_frozen_router=True`")


def test_one_copy_per_token_is_fine_where_weights_stay_plain_or_it_is_asked_for(dense):
    model = str(dense())
    plain = upcycle.plan(model, method="copy", top_k=1)
    assert (plain.design.combine, plain.target) == ("sum", "qwen2_moe")
    assert plain.config["norm_topk_prob"] is False
    frozen = upcycle.plan(model, method="copy", top_k=1, allow_frozen_router=True)
    assert (frozen.design.combine, frozen.target) == ("mean", "mixtral")


def test_a_split_counts_to_one_whether_or_not_a_runtime_renormalises_of_itself(dense):
    made = upcycle.plan(str(dense("qwen3")), experts=8, top_k=2)
    assert made.config["norm_topk_prob"] is True
    assert made.design.gains.routed == 2
