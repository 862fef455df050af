"""The target: which one a model goes to, and why others can not host it."""

import pytest
from refusals import refusal

import upcycle


@pytest.mark.parametrize(
    ("target", "layers", "words"),
    [
        ("mixtral", "0", "mixtral can't keep layers dense (`keep_dense`)"),
        ("granitemoeshared", "0", "granitemoeshared can't keep layers dense (`keep_dense`)"),
        ("glm4_moe", "1", "glm4_moe can keep only the first layers dense (`keep_dense=0,1,…`)"),
    ],
)
def test_dense_layers_that_the_target_can_not_express(dense, target, layers, words):
    sentence = refusal(dense, keep_dense=layers, target=target)
    assert sentence.startswith(f"`target={target}`: {words} (reachable: ")
    assert "qwen2_moe" in sentence


def test_trait_that_the_target_has_no_place_for(dense):
    assert refusal(dense, "qwen3", target="mixtral") == (
        "`target=mixtral`: the source has a norm per head on q and k (qwen3 always has it), which "
        "mixtral has no place for (reachable: glm4_moe, laguna, qwen3_moe)"
    )


def test_model_that_no_target_hosts(dense):
    sentence = refusal(dense, fields={"mlp_bias": True})
    assert sentence == (
        "no native MoE architecture hosts this model: the source has biases in the FFN "
        "(mlp_bias=true), which none has a place for"
    )


def test_of_a_kind_that_has_a_target_the_sentence_says_what_that_lacks(dense):
    sentence = refusal(dense, "olmo2", keep_dense=[0])
    assert sentence.startswith("no native MoE architecture hosts this model: ")
    assert sentence.endswith(": flex_olmo: flex_olmo can't keep layers dense (`keep_dense`)")


def test_shared_neurons_where_the_target_has_no_place_for_them(dense):
    sentence = refusal(dense, target="mixtral", shared=0.25)
    assert "mixtral has no shared expert (`shared=0.25`)" in sentence
    assert "glm4_moe" in sentence.split("reachable: ")[1]
    assert upcycle.plan(str(dense()), target="mixtral", shared=0).design.geometry.shared_size == 0


def test_auto_chooses_a_target_that_can_share_what_is_asked(dense):
    assert upcycle.plan(str(dense("qwen3"))).target == "qwen3_moe"
    assert upcycle.plan(str(dense("qwen3")), shared=0.25).target == "glm4_moe"
    assert "flex_olmo has no shared expert" in refusal(dense, "olmo2", shared=0.25)


def test_target_that_needs_more_experts_than_are_asked_for(dense):
    words = "`target=glm4_moe`: glm4_moe needs at least 2 experts (reachable: "
    assert refusal(dense, target="glm4_moe", experts=1, top_k=1).startswith(words)


@pytest.mark.parametrize(
    ("family", "split_target", "copy_target"),
    [
        ("llama", "qwen2_moe", "mixtral"),
        ("mistral", "qwen2_moe", "mixtral"),
        ("qwen2", "qwen2_moe", "qwen2_moe"),
        ("qwen3", "qwen3_moe", "qwen3_moe"),
        ("phi3", "qwen2_moe", "mixtral"),
        ("gemma", "granitemoeshared", "granitemoeshared"),
        ("granite", "granitemoeshared", "granitemoeshared"),
        ("olmo2", "flex_olmo", "flex_olmo"),
        ("ernie4_5", "ernie4_5_moe", "ernie4_5_moe"),
        ("youtu", "deepseek_v3", "deepseek_v3"),
        ("lfm2", "lfm2_moe", "lfm2_moe"),
        ("arcee", "qwen2_moe", "mixtral"),
        ("granitemoehybrid", "granitemoehybrid", "granitemoehybrid"),
        ("nemotron_h", "nemotron_h", "nemotron_h"),
    ],
)
def test_target_that_auto_chooses(dense, family, split_target, copy_target):
    model = str(dense(family))
    assert upcycle.plan(model).target == split_target
    assert upcycle.plan(model, method="copy").target == copy_target


@pytest.mark.parametrize(
    ("settings", "target"),
    [
        ({}, "qwen3_moe"),
        ({"keep_dense": "1"}, "qwen3_moe"),
        ({"shared": 0.25}, "glm4_moe"),
        ({"shared": 0.25, "keep_dense": "0"}, "glm4_moe"),
        ({"shared": 0.25, "keep_dense": "1"}, "laguna"),
    ],
)
def test_laguna_is_for_what_no_other_target_does(dense, settings, target):
    assert upcycle.plan(str(dense("qwen3")), experts=6, top_k=2, **settings).target == target


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral", "glm4_moe", "granitemoeshared"])
def test_a_quarter_is_shared_where_the_target_has_a_shared_expert(dense, target):
    geometry = upcycle.plan(str(dense()), target=target, experts=6, top_k=4).design.geometry
    assert (geometry.num_experts, geometry.top_k) == (6, 4)
    expected = (32, 0) if target == "mixtral" else (24, 48)
    assert (geometry.expert_size, geometry.shared_size) == expected


def test_sharing_by_default_leaves_the_target_enough_to_route(dense):
    plan = upcycle.plan(str(dense()), target="glm4_moe", experts=2, top_k=1)
    assert plan.design.geometry.num_experts == 2
