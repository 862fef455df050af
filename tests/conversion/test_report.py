"""What a conversion leaves to read: upcycle.json, and the model card."""

import json
import os
import re
import shutil
from dataclasses import asdict, replace
from statistics import geometric_mean

import pytest
import torch
import yaml
from huggingface_hub import constants
from reference import read_json, weights
from tiny import PLAIN_SPLIT

import upcycle
from upcycle.conversion.card import model_card
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.conversion.recipe import Recipe
from upcycle.models.opening import open_source
from upcycle.models.text import PROBES

SETTINGS = {"calibration_tokens": 128, "seq_len": 64}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def short_check(monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)


@pytest.fixture
def source(dense, tmp_path):
    """A copy of a tiny model, to which a card can be added."""
    return shutil.copytree(dense(), tmp_path / "source")


def convert(model, out, **settings):
    plain = {} if "recipe" in settings else PLAIN_SPLIT
    return upcycle.convert(str(model), out, **plain | SETTINGS | settings)


def report(folder) -> dict:
    """upcycle.json, which must be JSON to the letter: no NaN, no Infinity."""
    return json.loads((folder / "upcycle.json").read_text(), parse_constant=pytest.fail)


def card(folder) -> tuple[dict, str]:
    """The front matter and the text of the model card."""
    before, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), text


# --- upcycle.json ----------------------------------------------------------------------------

HOMES = {
    "qwen2_moe": ("mlp.experts.{}.", "mlp.shared_expert.", ("gate_proj", "up_proj", "down_proj")),
    "glm4_moe": ("mlp.experts.{}.", "mlp.shared_experts.", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.experts.{}.", None, ("w1", "w3", "w2")),
}


def rebuilt(folder, layer: int):
    """The dense layer's (gate, up, down), put together again from the experts and the record."""
    made, tensors = report(folder), weights(folder)
    plan, record = made["plan"], made["layers"][layer]
    expert, shared, names = HOMES[plan["target"]]
    # The gains are powers of two here, so that dividing by them undoes them exactly.
    routed_gain = {"qwen2_moe": plan["experts"], "mixtral": plan["top_k"], "glm4_moe": 1}
    shared_gain = {"qwen2_moe": 2, "glm4_moe": 1}
    prefixes = [(expert.format(e), routed_gain[plan["target"]]) for e in range(plan["experts"])]
    if plan["shared_size"]:
        prefixes.insert(0, (shared, shared_gain[plan["target"]]))
    gate, up, down = (
        [tensors[f"model.layers.{layer}.{prefix}{name}.weight"] for prefix, _ in prefixes]
        for name in names
    )
    down = [matrix / gain for matrix, (_, gain) in zip(down, prefixes, strict=True)]
    original = torch.tensor(record["permutation"]).argsort()
    return torch.cat(gate)[original], torch.cat(up)[original], torch.cat(down, 1)[:, original]


@pytest.mark.parametrize(
    ("target", "settings"),
    [
        ("qwen2_moe", {"experts": 4, "shared": 0.5}),
        ("qwen2_moe", {"shared": 0, "split": "random", "dtype": "bfloat16"}),
        ("glm4_moe", {"experts": 5, "shared": 0.375, "split": "parameter_clustering"}),
        ("mixtral", {"experts": 4, "top_k": 2}),
    ],
)
def test_permutation_undoes_the_split(dense, tmp_path, target, settings):
    dtype = getattr(torch, settings.get("dtype", "float32"))
    model = dense(dtype=dtype)
    convert(model, tmp_path / "out", target=target, check="none", **settings)
    tensors = weights(model)
    for layer in range(3):
        for name, found in zip(
            ("gate", "up", "down"), rebuilt(tmp_path / "out", layer), strict=True
        ):
            expected = tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"]
            assert torch.equal(found, expected)


def test_record_has_every_layer_once(dense, tmp_path):
    convert(dense(), tmp_path / "out", keep_dense=[1], check="none")
    layers = report(tmp_path / "out")["layers"]
    assert [(record["layer"], record["dense"]) for record in layers] == [
        (0, False), (1, True), (2, False),
    ]  # fmt: skip
    assert sorted(layers[0]["permutation"]) == list(range(192))
    assert "permutation" not in layers[1]


def test_recorded_recipe_is_the_whole_request(dense, tmp_path):
    settings = {"method": "drop", "method.ratio": 0.25, "experts": 2, "seed": 5, "keep_dense": [2]}
    done = convert(dense(), tmp_path / "out", **settings)
    recorded = report(tmp_path / "out")["plan"]["recipe"]
    assert Recipe(**recorded) == done.plan.recipe
    assert (recorded["method"], recorded["seed"]) == ({"name": "drop", "ratio": 0.25}, 5)
    assert recorded["target"] == done.plan.target == "qwen2_moe"


@pytest.mark.parametrize(
    "settings", [{"split": "random", "top_k": 3}, {"recipe": "default", "active": 0.7}]
)
def test_recorded_recipe_makes_the_same_checkpoint(dense, tmp_path, settings):
    convert(dense(), tmp_path / "first", seed=3, **settings)
    recipe = tmp_path / "again.yaml"
    recipe.write_text(yaml.safe_dump(report(tmp_path / "first")["plan"]["recipe"]))
    upcycle.convert(str(dense()), tmp_path / "second", recipe=recipe)
    first, second = (weights(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, {"calibration text", "conversion", "check"}),
        (
            {"recipe": "default"},
            {"calibration text", "layers to keep dense", "conversion", "check"},
        ),
    ],
)
def test_record_names_the_source_and_the_versions(dense, tmp_path, settings, stages):
    convert(dense(), tmp_path / "out", **settings)
    made = report(tmp_path / "out")
    opened = open_source(str(dense()))
    assert made["source"] == {
        "name": os.path.relpath(dense(), tmp_path / "out"),
        "revision": None,
        "fingerprint": opened.fingerprint(),
    }
    assert made["versions"]["upcycle"] == upcycle.__version__
    assert made["seconds"].keys() == stages
    assert (made["dense_layers"] is not None) == ("layers to keep dense" in stages)
    assert made["peak_memory"] > 2**20


def test_record_holds_the_check(dense, tmp_path):
    done = convert(dense(), tmp_path / "out")
    check = report(tmp_path / "out")["check"]
    assert check["kinds"] == [asdict(kind) for kind in done.check.kinds]
    assert [kind["kind"] for kind in check["kinds"]] == list(PROBES)
    ratios = {
        kind["kind"]: kind["perplexity_moe"] / kind["perplexity_dense"] for kind in check["kinds"]
    }
    assert check["perplexity_ratio"] == ratios[check["worst_kind"]] == max(ratios.values())
    assert check["mean_ratio"] == pytest.approx(geometric_mean(ratios.values()))
    assert check["left_out"] == ["self"]
    assert check["load"] == done.check.load
    assert check["dead_experts"] == sum(share == 0 for layer in check["load"] for share in layer)


def test_unchecked_conversion_says_so(dense, tmp_path):
    convert(dense(), tmp_path / "out", check="none")
    assert report(tmp_path / "out")["check"] is None
    assert "perplexity" not in card(tmp_path / "out")[1]


# --- the model card --------------------------------------------------------------------------


def test_card_is_tagged_for_the_hub(source, tmp_path):
    done = convert(source, tmp_path / "out")
    front, text = card(tmp_path / "out")
    (index,) = front.pop("model-index")
    assert index["name"] == "out"
    assert [row["dataset"]["type"] for row in index["results"]] == list(PROBES)
    for row, kind in zip(index["results"], done.check.kinds, strict=True):
        assert row["task"] == {"type": "text-generation"}
        assert row["dataset"]["name"] == f"{kind.kind.removeprefix('probe:')}, built in"
        assert row["metrics"] == [
            {"type": "perplexity", "value": kind.perplexity_moe},
            {"type": "perplexity over the dense model's", "value": kind.ratio},
        ]
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "mixture-of-experts", "upcycle", "qwen2_moe", "split"],
    }
    assert "native `qwen2_moe` checkpoint" in text


def test_card_holds_no_local_path(source, text, tmp_path):
    convert(source, tmp_path / "out", calibration=str(text))
    assert "`text.txt`" in card(tmp_path / "out")[1]
    assert not re.search(r"[`(]/", card(tmp_path / "out")[1])


def test_card_holds_no_local_path_of_joined_texts(source, text, tmp_path):
    convert(source, tmp_path / "out", calibration=f"{text}+builtin")
    assert "`text.txt+builtin`" in card(tmp_path / "out")[1]
    assert str(text) not in card(tmp_path / "out")[1]


@pytest.mark.parametrize(
    ("source_card", "licence"),
    [
        ("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model\n", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
        ),
        ("---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("# Model\nlicense: mit\n---\nlicense: mit\n---\n", {}),
        ("---\nlanguage: en\n---\n", {}),
        ("---\n[\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("", {}),
    ],
)
def test_licence_comes_from_the_source_card_alone(source, tmp_path, source_card, licence):
    (source / "README.md").write_bytes(source_card.encode())
    (source / "LICENSE").write_text("MIT")
    convert(source, tmp_path / "out", check="none")
    front, _ = card(tmp_path / "out")
    assert {key: value for key, value in front.items() if key.startswith("license")} == licence


def test_card_hands_on_the_base_model_and_the_language_that_the_source_card_states(
    source, tmp_path
):
    (source / "README.md").write_text("---\nbase_model: org/tiny\nlanguage: [en]\nname: x\n---\n")
    convert(source, tmp_path / "out", check="none")
    front, _ = card(tmp_path / "out")
    assert (front["base_model"], front["language"]) == ("org/tiny", ["en"])
    assert front["base_model_relation"] == "finetune"
    assert "model-index" not in front  # nothing was measured
    assert "name" not in front


@pytest.mark.parametrize("stated", ["/home/me/base", "[org/tiny, ./base]", "~/base"])
def test_path_that_the_source_card_calls_its_base_model_is_not_handed_on(source, tmp_path, stated):
    (source / "README.md").write_text(f"---\nbase_model: {stated}\nlicense: mit\n---\n")
    convert(source, tmp_path / "out", check="none")
    front, _ = card(tmp_path / "out")
    assert "base_model" not in front
    assert front["license"] == "mit"


def test_local_source_is_no_base_model(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    config = read_json(source / "config.json") | {"_name_or_path": "checkpoints/last"}
    (source / "config.json").write_text(json.dumps(config))  # may be a hub id, or not
    for number, label in enumerate((source, f"{tmp_path.name}/source")):
        convert(label, tmp_path / str(number), check="none")
        assert "base_model" not in card(tmp_path / str(number))[0]


def test_hub_source_is_the_base_model(dense, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    shutil.copytree(dense(), repo / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert("org/tiny", tmp_path / "out", check="none")
    front, text = card(tmp_path / "out")
    assert front["base_model"] == ["org/tiny"]
    assert front["base_model_relation"] == "finetune"
    assert "Made from `org/tiny`" in text
    assert report(tmp_path / "out")["source"]["revision"] == COMMIT


def test_card_has_the_numbers(dense, tmp_path):
    done = convert(dense(), tmp_path / "out", keep_dense=[0], experts=6)
    plan, check, text = done.plan, done.check, card(tmp_path / "out")[1]
    assert f"| {plan.params_dense:,} | {plan.params_total:,} |" in text
    assert f"| {plan.params_dense:,} | {plan.params_active:,} |" in text
    assert f"| 100 % | {100 * plan.active_ffn_ratio:.0f} % |" in text
    for kind in check.kinds:
        assert (
            f"| {kind.kind.removeprefix('probe:')}, built in | {kind.perplexity_dense:.2f} | "
            f"{kind.perplexity_moe:.2f} | {kind.perplexity_moe / kind.perplexity_dense:.2f} | "
            f"{kind.worst_window:.1f} | {100 * kind.top1_agreement:.0f} % |\n"
        ) in text
    tokens = 64 * len(PROBES)
    assert f"Measured on {tokens} tokens that nothing was fitted on, in windows of 64;" in text
    assert (
        "6 experts of 24 neurons, of which 2 are active per token, beside a shared expert of 48 "
        "that are always on."
    ) in text
    assert "Kept dense: layer 0." in text


def test_card_says_which_runtimes_run_it(dense, tmp_path):
    convert(dense(), tmp_path / "out", keep_dense=[0])
    text = card(tmp_path / "out")[1]
    assert "- vLLM: ok\n" in text
    assert "- MLX: every layer must have experts (`keep_dense=none`)" in text
    assert report(tmp_path / "out")["plan"]["runtimes"]["vLLM"] == "ok"


def test_card_says_that_experts_repeat_neurons(dense, tmp_path):
    convert(dense(), tmp_path / "plain")
    convert(dense(), tmp_path / "out", split="sharing_inner")
    words = "These experts may hold the same neuron"
    assert words in card(tmp_path / "out")[1]
    assert words not in card(tmp_path / "plain")[1]


@pytest.mark.parametrize(
    ("settings", "share"),
    [({"experts": 6}, "50 %"), ({"compensate.feedback": 0.25}, "25 %")],
)
def test_card_says_how_far_the_refit_makes_up_for_earlier_layers(dense, tmp_path, settings, share):
    convert(dense(), tmp_path / "out", compensate="least_squares", sequential=True, **settings)
    assert f"make up for {share} of what the layers before" in card(tmp_path / "out")[1]
    assert report(tmp_path / "out")["plan"]["feedback"] == float(share.rstrip(" %")) / 100


def test_card_of_a_refit_to_the_dense_output_alone(dense, tmp_path):
    convert(dense(), tmp_path / "out", compensate="least_squares", sequential=False)
    assert "make up for" not in card(tmp_path / "out")[1]
    assert report(tmp_path / "out")["plan"]["feedback"] == 0


def test_card_of_copies(dense, tmp_path):
    settings = {"method": "drop", "experts": 2, "granularity": 2, "top_k": 4}
    convert(dense(), tmp_path / "out", **settings)
    front, text = card(tmp_path / "out")
    assert front["tags"][-2:] == ["mixtral", "drop"]
    assert "copied 2 times, into 4 experts, 2 shards a copy, then changed by `drop`" in text
    assert "arXiv:2502.19261" in text


def test_card_names_the_papers_of_its_methods_once(dense, tmp_path):
    convert(dense(intermediate_size=256), tmp_path / "out", recipe="moefication")
    text = card(tmp_path / "out")[1]
    assert text.count("arXiv:2110.01786") == 1
    assert "Departs from its paper" in text


def test_card_warns_of_lost_quality(dense, tmp_path):
    done = convert(dense(), tmp_path / "out", experts=24, top_k=1, shared=0)
    warned = "has lost quality" in card(tmp_path / "out")[1]
    assert warned == (done.check.perplexity_ratio > 1.1)
    convert(dense(), tmp_path / "copies", method="copy")
    assert "has lost quality" not in card(tmp_path / "copies")[1]


@pytest.mark.parametrize(
    ("ratio", "warning"),
    [
        (1.1, None),
        (1.15, "train it further before use, on about 20,000 tokens"),
        (1.4, "train it further before use, on about 20,000 tokens"),
        (9.0, "train it further before use"),
    ],
)
def test_card_says_how_much_training_makes_up_for_the_worst_text(dense, tmp_path, ratio, warning):
    done = convert(dense(), tmp_path / "out")
    kinds = [replace(kind, ratio=1.0) for kind in done.check.kinds]
    kinds[2] = replace(kinds[2], ratio=ratio)
    text = model_card(replace(done, check=replace(done.check, kinds=kinds)))
    if warning is None:
        assert "has lost quality" not in text
    else:
        assert f"**This model has lost quality: {warning}.**" in text


def test_record_says_how_the_dense_layers_were_found(dense, tmp_path):
    done = convert(dense(), tmp_path / "out", recipe="default", check="none")
    found = report(tmp_path / "out")["dense_layers"]
    assert tuple(found["layers"]) == done.plan.spec.dense_layers == done.dense_layers.layers
    assert len(found["damage"]) == 3
    tried = [tuple(trial["layers"]) for trial in found["trials"]]
    assert tried[0] == ()
    assert tuple(found["layers"]) in tried
    assert all(trial["ratios"].keys() == {"builtin", "self"} for trial in found["trials"])


def test_written_config_is_the_planned_one(dense, tmp_path):
    done = convert(dense(), tmp_path / "out", check="none")
    config = read_json(tmp_path / "out" / "config.json")
    for field in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "hidden_size"):
        assert config[field] == done.plan.config[field]
    assert config["model_type"] == done.plan.target
