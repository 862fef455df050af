"""`runtimes`: what is chosen runs where it was asked to, or the sentence says why nothing does."""

import json
from typing import get_args

import pytest
import torch
from reference import dense_logits, gap, load, logits, read_json, weights
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.models.runtimes import runtimes_named
from upcycle.models.targets import TARGETS, Runtime

TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
COPIES = {"method": "copy", "experts": 4, "top_k": 2}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["llama.cpp"], ("llama.cpp",)),
        (["LLAMA-CPP", "llamacpp"], ("llama.cpp",)),
        (["mlx,vLLM"], ("vLLM", "MLX")),
        (["mlx_lm", "transformers4"], ("MLX", "transformers 4")),
        (["Transformers 4"], ("transformers 4",)),
        (["transformers", "transformers-5", "none"], ()),
    ],
)
def test_ways_to_write_a_runtime(words, names):
    assert runtimes_named(words) == names


@pytest.mark.parametrize(
    ("asked", "family", "fields", "settings", "target", "tied"),
    [
        ("llama.cpp", "llama", UNTIED, {}, "qwen2_moe", False),
        ("llama.cpp", "llama", TIED, {}, "granitemoeshared", True),
        ("llama.cpp", "llama", TIED, {"target": "qwen2_moe"}, "qwen2_moe", False),
        ("llama.cpp", "llama", TIED, COPIES, "mixtral", True),
        ("llama.cpp", "qwen2", TIED, {"method": "prune"}, "granitemoeshared", True),
        ("llama.cpp", "qwen3", TIED, {"keep_dense": "auto"}, "qwen3_moe", True),
        ("vllm", "llama", TIED, {"keep_dense": [1]}, "qwen2_moe", True),
        ("vllm", "llama", TIED | {"head_dim": 32}, {"shared": 0.25}, "glm4_moe", True),
        ("vllm", "llama", TIED | {"head_dim": 32}, {}, "glm4_moe", True),
        ("vllm", "mistral", {}, COPIES, "mixtral", False),
        ("vllm", "olmo2", {}, {}, "flex_olmo", False),
        ("mlx", "llama", TIED, {}, "mixtral", True),
        ("mlx", "llama", TIED, {"shared": 0.25}, "qwen2_moe", False),
        ("mlx", "qwen2", TIED, {}, "qwen2_moe", False),
        ("mlx", "qwen2", TIED, {"keep_dense": [0]}, "glm4_moe", False),
        ("mlx", "qwen3", TIED, {"keep_dense": [0]}, "qwen3_moe", True),
        ("llama.cpp,mlx", "llama", TIED, {}, "mixtral", True),
        ("llama.cpp,vllm,mlx,transformers-4", "qwen3", {}, {}, "qwen3_moe", False),
        ("transformers-4", "llama", TIED | {"head_dim": 32}, {}, "glm4_moe", True),
        ("transformers-4", "granite", {}, {}, "granitemoeshared", False),
    ],
)
def test_what_is_chosen_runs_there(dense, asked, family, fields, settings, target, tied):
    plan = upcycle.plan(str(dense(family, **fields)), runtimes=asked, **settings)
    assert plan.target == target
    assert plan.config["tie_word_embeddings"] is tied
    assert [plan.runtimes[name] for name in plan.recipe.runtimes] == [""] * len(asked.split(","))


@pytest.mark.parametrize(
    ("family", "fields", "settings", "sentence"),
    [
        (
            "llama",
            UNTIED,
            {"target": "glm4_moe"},
            "`target=glm4_moe`: llama.cpp does not run it: only GLM's own tokenizers are converted "
            "(reachable: granitemoeshared, mixtral, qwen2_moe)",
        ),
        (
            "gemma",
            {},
            {},
            "`runtimes=llama.cpp`: no target of this model runs there: granitemoeshared: llama.cpp "
            "does not run it: experts compute silu, not gelu_pytorch_tanh; transformers 5 runs it, "
            "without `runtimes`",
        ),
        (
            "qwen3",
            {},
            {"keep_dense": [1]},
            "`runtimes=llama.cpp`: no target of this model runs there: laguna: llama.cpp does not "
            "run it: only the first layers can be dense (`keep_dense=0,1,…`); qwen3_moe: llama.cpp "
            "does not run it: every layer must have experts (`keep_dense=none`); `keep_dense=none` "
            "gives laguna or qwen3_moe, `runtimes=vLLM` gives qwen3_moe, `runtimes=MLX` gives "
            "laguna or qwen3_moe, `runtimes=transformers-4` gives qwen3_moe",
        ),
        (
            "olmo2",
            {},
            {"runtimes": ["llama.cpp", "vllm"]},
            "`runtimes=llama.cpp,vLLM`: no target of this model runs there: flex_olmo: llama.cpp "
            "does not run it: it does not know the architecture; `runtimes=vLLM` alone gives "
            "flex_olmo, `runtimes=transformers-4` gives flex_olmo",
        ),
        (
            "llama",
            {},
            {"experts": 600, "top_k": 2},
            "`experts=600` leaves less than 8 of 192 neurons to an expert, which grouped matrix "
            "products need: give at most 18",
        ),
        (
            "qwen3",
            {},
            {"target": "mixtral"},
            "`target=mixtral`: the source has a norm per head on q and k (qwen3 always has it), "
            "which mixtral has no place for (reachable: laguna, qwen3_moe)",
        ),
    ],
)
def test_what_no_target_runs_is_refused_with_what_would(dense, family, fields, settings, sentence):
    with pytest.raises(UpcycleError) as caught:
        upcycle.plan(str(dense(family, **fields)), **{"runtimes": "llama.cpp"} | settings)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("asked", "undecided"), [("llama.cpp", False), ("mlx", False), ("vllm", True), ((), True)]
)
def test_layers_are_measured_only_where_one_may_stay_dense(dense, asked, undecided):
    settings = {"target": "qwen2_moe", "keep_dense": "auto"}
    assert upcycle.plan(str(dense(**UNTIED)), runtimes=asked, **settings).undecided is undecided


def test_only_sets_of_dense_layers_that_the_runtime_takes_are_tried(
    dense, text, tmp_path, monkeypatch
):
    def first_only(arch, spec):
        return "" if set(spec.dense_layers) <= {0} else "only the first layer may be dense"

    monkeypatch.setitem(TARGETS["qwen2_moe"].runtimes, "vLLM", (first_only,))
    quick = {"calibration": str(text), "calibration_tokens": 512, "seq_len": 64, "check": "none"}
    settings = quick | {"top_k": 2, "experts": 8, "split": "contiguous", "keep_dense": "auto"}
    free = upcycle.convert(str(dense()), tmp_path / "free", **settings)
    assert any(set(trial.layers) - {0} for trial in free.dense_layers.trials)
    held = upcycle.convert(str(dense()), tmp_path / "held", runtimes="vllm", **settings)
    assert [trial.layers for trial in held.dense_layers.trials if set(trial.layers) - {0}] == []
    assert held.plan.runtimes["vLLM"] == ""


def test_untied_embeddings_are_written_twice_and_compute_the_same(dense, tmp_path):
    source = dense(**TIED)
    request = ["--for", "llama.cpp", "--for", "MLX", "--set", "untied=true", "--method", "copy"]
    done = CliRunner().invoke(
        app, ["convert", str(source), *request, "-o", str(tmp_path / "out"), "--check", "none"]
    )
    assert done.exit_code == 0, done.output
    assert "the output embeddings, tied in the source, become a tensor of their own" in done.output
    written = weights(tmp_path / "out")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert gap(logits(load(tmp_path / "out")), dense_logits(source)) < 2e-5
    recorded = read_json(tmp_path / "out/upcycle.json")["plan"]
    assert recorded["recipe"]["runtimes"] == ["llama.cpp", "MLX"]
    assert recorded["params_total"] == sum(tensor.numel() for tensor in written.values())


def test_a_recipe_file_may_name_runtimes(dense, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: split\nruntimes: [mlx, llama.cpp]\n")
    done = CliRunner().invoke(app, ["plan", str(dense(**TIED)), "--recipe", str(recipe), "--json"])
    assert json.loads(done.stdout)["target"] == "mixtral"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama.cp", "'llama.cp' is no runtime that upcycle knows, did you mean 'llama.cpp'?"),
        ("tgi", "known: MLX, llama.cpp, transformers 4, transformers 5, vLLM"),
    ],
)
def test_a_runtime_that_is_none(dense, name, words):
    done = CliRunner().invoke(app, ["plan", str(dense()), "--for", name])
    assert done.exit_code == 2
    assert words in done.stderr


# --- what is said of runtimes that nobody asked for ------------------------------------------


def runtime_refusal(runtime, dense, family="llama", fields=None, **settings):
    """What the plan says of a runtime, nothing if that runs the result."""
    return upcycle.plan(str(dense(family, **(fields or {}))), **settings).runtimes[runtime]


ROUTED = {"experts": 8, "keep_dense": "none"}
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
MIXED_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 6,
        "long_factor": [4.0] * 6,
        "original_max_position_embeddings": 64,
    }
}
NONE_SHARED = ROUTED | {"shared": 0, "top_k": 2}


@pytest.mark.parametrize(
    ("runtime", "family", "fields", "settings"),
    [
        ("llama.cpp", "llama", UNTIED, ROUTED),
        ("llama.cpp", "llama", UNTIED, NONE_SHARED),
        ("llama.cpp", "llama", UNTIED, {"target": "granitemoeshared"}),
        ("llama.cpp", "llama", TIED, {"target": "granitemoeshared"}),
        ("llama.cpp", "llama", {}, COPIES),
        ("llama.cpp", "llama", {}, {"method": "prune", "target": "mixtral"}),
        ("llama.cpp", "qwen2", {}, {"target": "granitemoeshared"}),
        ("llama.cpp", "qwen3", {}, ROUTED),
        ("llama.cpp", "granite", {}, {}),
        ("MLX", "llama", TIED, COPIES),
        ("MLX", "llama", UNTIED, ROUTED),
        ("MLX", "llama", UNTIED, {"target": "glm4_moe"}),
        ("MLX", "qwen2", UNTIED, {"target": "glm4_moe"}),
        ("MLX", "qwen3", TIED, {}),
        ("vLLM", "llama", TIED, {}),
        ("vLLM", "llama", UNTIED, {"keep_dense": [1]}),
        ("vLLM", "llama", {}, COPIES),
        ("vLLM", "llama", {}, {"method": "prune"}),
        ("vLLM", "llama", {}, {"target": "granitemoeshared"}),
        ("vLLM", "llama", {"head_dim": 32}, {"target": "glm4_moe"}),
        ("vLLM", "mistral", {}, COPIES),
        ("vLLM", "qwen2", {}, {}),
        ("vLLM", "qwen2", {}, COPIES),
        ("vLLM", "qwen3", {}, {}),
        ("vLLM", "granite", {}, {}),
        ("vLLM", "olmo2", {}, {}),
        ("vLLM", "cwm", {}, {"target": "granitemoe_swa"}),
        ("llama.cpp", "cwm", {"head_dim": 12}, {"target": "granitemoe_swa"}),
        ("transformers 4", "llama", TIED, {"keep_dense": [1]}),
        ("transformers 4", "llama", {"head_dim": 32}, COPIES),
        ("transformers 4", "llama", LONGROPE, {}),
        ("transformers 4", "mistral", {"head_dim": 12}, {"target": "qwen2_moe"}),
        ("transformers 4", "qwen2", {}, {"target": "granitemoeshared"}),
        ("transformers 4", "olmo2", {}, {}),
    ],
)
def test_nothing_is_said_of_a_runtime_that_runs_the_result(
    dense, runtime, family, fields, settings
):
    assert runtime_refusal(runtime, dense, family, fields, **settings) == ""


@pytest.mark.parametrize(
    ("runtime", "family", "fields", "settings", "obstacle"),
    [
        ("llama.cpp", "llama", UNTIED, {}, "every layer must have experts (`keep_dense=none`)"),
        ("llama.cpp", "llama", UNTIED, {"keep_dense": [1]}, "every layer must have experts"),
        ("llama.cpp", "llama", TIED, ROUTED, "embeddings must be tensors of their own"),
        ("llama.cpp", "llama", {}, COPIES | {"target": "qwen2_moe"}, "are not renormalised"),
        ("llama.cpp", "qwen3", {}, COPIES | {"top_k": 1}, "experts are renormalised"),
        ("llama.cpp", "llama", {}, {"target": "glm4_moe"}, "GLM's own tokenizers"),
        ("llama.cpp", "olmo2", {}, {}, "it does not know the architecture"),
        ("llama.cpp", "gemma", {}, {}, "experts compute silu, not gelu"),
        ("llama.cpp", "mistral", {}, COPIES, "attention sees further than 16 tokens"),
        ("MLX", "llama", UNTIED, {}, "every layer must have experts (`keep_dense=none`)"),
        ("MLX", "llama", TIED, ROUTED, "embeddings must be tensors of their own"),
        ("MLX", "llama", TIED, {"target": "glm4_moe"}, "must be tensors of their own"),
        ("MLX", "llama", UNTIED, COPIES | {"target": "glm4_moe"}, "must be a shared expert"),
        ("MLX", "llama", {}, COPIES | {"target": "qwen2_moe"}, "are not renormalised"),
        ("MLX", "llama", {"head_dim": 32}, COPIES, "heads must be of 48 / 4 channels, not 32"),
        ("MLX", "llama", LINEAR, COPIES, "embeddings are not scaled (rope_type linear)"),
        ("MLX", "qwen3", {"attention_bias": True}, {}, "attention has no biases"),
        ("MLX", "mistral", {}, COPIES, "attention sees further than 16 tokens"),
        ("MLX", "granite", {}, {}, "it does not know the architecture"),
        ("transformers 4", "llama", {"head_dim": 32}, {}, "heads must be of 48 / 4 channels"),
        ("transformers 4", "gemma", {}, {}, "heads must be of 48 / 4 channels, not 16"),
        (
            "transformers 4",
            "qwen2",
            MIXED_WINDOW,
            {},
            "all layers must have the same sliding window",
        ),
        ("vLLM", "gemma", {}, {}, "experts compute silu, not gelu_pytorch_tanh"),
        ("vLLM", "qwen2", {}, {"target": "granitemoeshared"}, "attention has no biases"),
        ("vLLM", "qwen3", {"attention_bias": True}, {}, "attention has no bias on its output"),
        ("vLLM", "qwen2", MIXED_WINDOW, {}, "all layers must have the same sliding window"),
        ("vLLM", "llama", {"head_dim": 32}, {}, "heads must be of 48 / 4 channels, not 32"),
        ("vLLM", "llama", {}, COPIES | {"target": "glm4_moe"}, "must be a shared expert"),
        ("vLLM", "ministral3", {}, COPIES, "yarn may not heed mscale and mscale_all_dim"),
        ("llama.cpp", "ministral3", {}, COPIES, "yarn may not heed mscale and mscale_all_dim"),
        ("vLLM", "smollm3", {}, {}, "all layers must have the same rotary embedding"),
        ("vLLM", "smollm3", {"attention_bias": True}, {}, "attention has no biases"),
        ("llama.cpp", "smollm3", {}, {}, "some layer must have a sliding window"),
        ("llama.cpp", "granite_swa", {}, {}, "rotary embeddings must have the same base"),
        ("transformers 4", "smollm3", {}, {}, "it does not know the architecture"),
    ],
)
def test_what_a_runtime_can_not_run_is_said(dense, runtime, family, fields, settings, obstacle):
    assert obstacle in runtime_refusal(runtime, dense, family, fields, **settings)


@pytest.mark.parametrize(
    ("family", "fields", "settings", "lost"),
    [
        ("llama", UNTIED, {}, ["llama.cpp", "MLX"]),
        ("llama", TIED, {}, []),  # they would not run it anyway
        ("qwen3", TIED, {}, ["llama.cpp"]),
        ("olmo2", {}, {"keep_dense": "none"}, []),
        ("llama", UNTIED, {"keep_dense": "none"}, []),
    ],
)
def test_runtimes_that_dense_layers_cost(dense, family, fields, settings, lost):
    model, settings = str(dense(family, **fields)), {"keep_dense": [0]} | settings
    plan = upcycle.plan(model, **settings)
    assert plan.runtimes_lost == lost
    without = upcycle.plan(model, **settings | {"keep_dense": "none", "target": plan.target})
    assert [
        name for name, why in plan.runtimes.items() if why and not without.runtimes[name]
    ] == lost


@pytest.mark.parametrize(
    ("runtime", "family", "fields", "settings", "end"),
    [
        (
            "llama.cpp",
            "llama",
            {},
            {"experts": 8},
            "; it runs `target=granitemoeshared or mixtral`",
        ),
        ("llama.cpp", "llama", {}, {"method": "prune"}, "`target=granitemoeshared or mixtral`"),
        (
            "llama.cpp",
            "llama",
            {},
            {"keep_dense": [1]},
            "it runs `target=granitemoeshared or mixtral`",
        ),
        ("llama.cpp", "llama", {}, {"shared": 0.25}, "; it runs `target=granitemoeshared`"),
        ("llama.cpp", "gemma", {}, {}, "not gelu_pytorch_tanh"),
        ("vLLM", "llama", {"head_dim": 32}, {}, "not 32; it runs `target=glm4_moe or mixtral`"),
        ("vLLM", "llama", {"head_dim": 32}, {"keep_dense": [1]}, "32; it runs `target=mixtral`"),
        ("vLLM", "llama", {"head_dim": 32}, {"keep_dense": [1], "shared": 0.125}, "not 32"),
        ("MLX", "llama", TIED, {}, "of their own; it runs `target=mixtral`"),
        ("MLX", "llama", TIED, {"shared": 0.25}, "of their own"),
        ("MLX", "llama", UNTIED, {}, "; it runs `target=glm4_moe or mixtral`"),
        ("MLX", "llama", UNTIED, {"shared": 0.25}, "; it runs `target=glm4_moe`"),
        ("vLLM", "gemma", {}, {}, "channels, not 16"),
    ],
)
def test_targets_that_a_runtime_runs_are_named(dense, runtime, family, fields, settings, end):
    assert runtime_refusal(runtime, dense, family, fields, **settings).endswith(end)


def test_every_target_says_what_each_runtime_can_not_run():
    assert {tuple(target.runtimes) for target in TARGETS.values()} == {get_args(Runtime)}
