"""Several models' FFNs as the experts of one."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hosting import DECODER_TARGETS as TARGETS
from hosting import hosts
from published import make_published
from reference import MUTATED, dense_logits, gap, load, logits, read_json, selections, weights
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_dense, make_lora, make_moved, make_tokenizer
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.conversion.merging.planning import plan_merge
from upcycle.conversion.merging.preflight import merge_request
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.core.types import DenseFFN

QUICK = {"check": "none", "router": "uniform_random"}


@pytest.fixture(scope="session")
def models(shelf):
    """A base and fine-tunes of it, by name."""
    return {name: str(shelf / name) for name in ("base", "m1", "m2")}


def plan(names, base=None, shared_model=None, texts=None, **settings):
    request = merge_request(
        list(map(str, names)), settings, base=base, shared_model=shared_model, texts=texts
    )
    return plan_merge(request, settings)


def refusal(names, *others, **settings) -> str:
    with pytest.raises(UpcycleError) as caught:
        plan(names, *others, **settings)
    return str(caught.value)


def expert(folder, layer, number):
    """The three matrices of one of mixtral's experts: gate, up, down."""
    found = weights(folder)
    name = f"model.layers.{layer}.block_sparse_moe.experts.{number}"
    return [found[f"{name}.{matrix}.weight"] for matrix in ("w1", "w3", "w2")]


def ffn(folder, layer):
    found = weights(folder)
    names = ("gate_proj", "up_proj", "down_proj")
    return [found[f"model.layers.{layer}.mlp.{name}.weight"] for name in names]


def same(ours, theirs) -> bool:
    return all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


# --- what is computed ------------------------------------------------------------------------


def test_each_expert_is_its_models_ffn_and_the_rest_is_the_bases(models, tmp_path):
    base, *experts = (models[name] for name in ("base", "m1", "m2"))
    upcycle.merge(experts, tmp_path / "out", base=base, **QUICK)
    for layer in range(3):
        for number, model in enumerate(experts):
            assert same(expert(tmp_path / "out", layer, number), ffn(Path(model), layer))
    made, source = weights(tmp_path / "out"), weights(Path(base))
    rest = {name for name in source if ".mlp." not in name}
    assert all(torch.equal(made[name], source[name]) for name in rest)
    assert len(made) == len(rest) + 3 * (1 + 2 * 3)  # a router, and three matrices per expert
    assert load(tmp_path / "out").config.num_experts_per_tok == 2


FAMILY_OF = {target: family for family in sorted(FAMILIES) for target in hosts(family)}
PAIRS = [*sorted(FAMILY_OF.items()), ("mixtral", "phi3")]
RESTS = ["base", "mean", "linear", "ties", "dare"]
BLIND = ["random", "uniform_random", "normal"]


@pytest.mark.parametrize(
    ("target", "family", "router", "rest"),
    [(*pair, BLIND[i % 3], RESTS[i % 5]) for i, pair in enumerate(PAIRS)],
)
def test_copies_of_the_base_are_the_base(dense, tmp_path, family, target, router, rest):
    if (target, router) == ("lfm2_moe", "random"):
        pytest.skip("the class adds 1e-6 to a sum of scores, which rows of length √D make as small")
    source = dense(family)
    done = upcycle.merge(
        [str(source)] * 3, tmp_path / "out", target=target, router=router, rest=rest
    )
    assert gap(logits(load(tmp_path / "out")), dense_logits(source)) < 2e-5
    assert done.check.exact_error < 1e-4


def test_every_target_was_in_turn():
    assert set(FAMILY_OF) == set(TARGETS)


def test_one_model_alone_is_itself(models, tmp_path):
    upcycle.merge([models["m1"]], tmp_path / "out", **QUICK)
    found = logits(load(tmp_path / "out"))
    assert torch.equal(found, dense_logits(Path(models["m1"])))


def test_the_same_seed_gives_the_same_bytes_and_another_other_rows(models, tmp_path):
    experts = [models["m1"], models["m2"]]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle.merge(experts, tmp_path / name, seed=seed, **QUICK)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    moved = {name for name in a if not torch.equal(a[name], c[name])}
    assert moved == {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(3)}


def test_random_rows_are_mergekits(models, tmp_path):
    for router in ("random", "uniform_random"):
        upcycle.merge([models["m1"]] * 3, tmp_path / router, **QUICK | {"router": router})
    name = "model.layers.0.block_sparse_moe.gate.weight"
    normal, uniform = (weights(tmp_path / r)[name] for r in ("random", "uniform_random"))
    assert normal.std() == pytest.approx(1, abs=0.15)
    assert uniform.abs().max() <= 48**-0.5
    assert uniform.std() == pytest.approx((48 * 3) ** -0.5, rel=0.15)


def test_a_shared_model_is_added_to_the_mean(models, tmp_path):
    """Without prompts it has no gate: it counts 1, beside experts that count 1 together."""
    base = models["base"]
    upcycle.merge([base, base], tmp_path / "out", shared_model=models["m1"], **QUICK)
    out = load(tmp_path / "out")
    assert out.config.model_type == "qwen2_moe"
    assert out.config.norm_topk_prob
    layer = out.model.layers[1].mlp
    x_TD = torch.randn(1, 20, 48, generator=torch.Generator().manual_seed(3))
    parts = [
        DenseFFN(*ffn(Path(models[name]), 1), torch.nn.functional.silu)(x_TD)
        for name in ("base", "m1")
    ]
    assert gap(layer(x_TD), sum(parts)) < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"down_proj": 3},
        },
        {"r": 4, "alpha_pattern": {"^model.layers.1.mlp.up_proj": 7}},
    ],
)
def test_an_adapter_is_what_peft_merges(dense, tmp_path, settings):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    lora = make_lora(tmp_path / "lora", dense(), targets, **settings)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense()), lora)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    made = upcycle.merge([f"{dense()}+{lora}", str(dense())], tmp_path / "out", **QUICK)
    for layer in range(3):
        found, wanted = expert(tmp_path / "out", layer, 0), ffn(tmp_path / "merged", layer)
        assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, wanted, strict=True))
        assert same(expert(tmp_path / "out", layer, 1), ffn(dense(), layer))
    assert any("q_proj is unused" in note for note in made.plan.warnings)


def test_an_adapter_of_fused_matrices_changes_them(dense, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora = make_lora(tmp_path / "lora", dense("phi3"), ["gate_up_proj"], r=2)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense("phi3")), lora)
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    upcycle.merge([f"{dense('phi3')}+{lora}"], tmp_path / "out", **QUICK)
    fused = weights(tmp_path / "merged")["model.layers.2.mlp.gate_up_proj.weight"]
    gate, up, _ = expert(tmp_path / "out", 2, 0)
    assert torch.allclose(torch.cat([gate, up]), fused, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "whole"), [("nemotron_h", "backbone."), ("qwen3_5", "model.language_model.")]
)
def test_an_adapter_may_name_modules_as_the_checkpoint_does(dense, tmp_path, family, whole):
    """As code that came with the model, or the class of all its parts, has them."""
    base = dense(family) if family in FAMILIES else make_published(tmp_path / "base", family)
    lora = make_lora(tmp_path / "lora", base, ["up_proj", "down_proj"], r=2)
    other = shutil.copytree(lora, tmp_path / "other")
    factors = load_file(lora / "adapter_model.safetensors")
    renamed = {n.replace(".model.layers.", f".{whole}layers."): t for n, t in factors.items()}
    assert not renamed.keys() & factors.keys()
    save_file(renamed, other / "adapter_model.safetensors")
    for adapter in (lora, other):
        experts = [f"{base}+{adapter}", str(base)]
        upcycle.merge(experts, tmp_path / f"out-{adapter.name}", base=str(base), **QUICK)
    plain, found = (weights(tmp_path / f"out-{name}") for name in ("lora", "other"))
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


def test_the_rest_can_be_the_mean_of_the_models(models, tmp_path):
    experts = [models["m1"], models["m2"]]
    upcycle.merge(experts, tmp_path / "out", base=models["base"], rest="mean", **QUICK)
    made, one, other = (weights(Path(p)) for p in (tmp_path / "out", *experts))
    for name in ("model.embed_tokens.weight", "model.layers.2.self_attn.o_proj.weight"):
        assert torch.allclose(made[name], (one[name] + other[name]) / 2, atol=1e-6)
    assert same(expert(tmp_path / "out", 1, 1), ffn(Path(models["m2"]), 1))


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file of capital letters, and one of small ones: no token is in both."""
    folder = tmp_path_factory.mktemp("texts")
    made = {}
    for name, letters in (("m1", "ABCDEFGH"), ("m2", "stuvwxyz")):
        path = folder / f"{name}.txt"
        path.write_text("".join(random.Random(name).choices(letters, k=2000)))
        made[name] = str(path)
    return made


SHORT = {"check": "none", "seq_len": 64, "calibration_tokens": 512}


@pytest.mark.parametrize("router", ["text", "domain"])
def test_a_router_from_text_knows_whose_text_it_sees(models, texts, tmp_path, router):
    experts, out = [models["m1"], models["m2"]], tmp_path / "out"
    upcycle.merge(experts, out, text=texts, router=router, top_k=1, **SHORT)
    assert (out / "router_domains.safetensors").exists() == (router == "domain")
    model, tokenizer = load(out), make_tokenizer()
    for place, letters in enumerate(("HGFEDCBA", "zyxwvuts")):
        ids = torch.tensor([tokenizer(letters * 4)["input_ids"]])
        with selections(model) as seen:
            logits(model, ids)
        assert min(float((chosen == place).float().mean()) for chosen in seen) > 0.7


@pytest.mark.parametrize("router", ["loss", "perplexity"])
def test_a_router_from_losses_follows_its_models(models, texts, tmp_path, router):
    """Named in another order, experts have the same rows."""
    there, back = [models["m1"], models["m2"]], [models["m2"], models["m1"]]
    for name, experts in (("there", there), ("back", back)):
        base = models["base"]
        upcycle.merge(experts, tmp_path / name, base=base, text=texts, router=router, **SHORT)
    found = [weights(tmp_path / name) for name in ("there", "back")]
    for layer in range(3):
        one, other = (w[f"model.layers.{layer}.block_sparse_moe.gate.weight"] for w in found)
        assert gap(one, other.flip(0)) < 1e-3
        assert gap(one, other) > MUTATED


@pytest.mark.parametrize(
    ("family", "router", "rest"),
    [("arcee", "text", "mean"), ("nemotron_h", "loss", "base"), ("nemotron_h", "domain", "ties")],
)
def test_fine_tunes_whose_ffns_have_no_gate(
    dense, texts, tmp_path, monkeypatch, family, router, rest
):
    """Each expert is its model's FFN, in Mixtral with its first matrix as gate, too; and each model
    is measured on each text."""
    monkeypatch.setitem(CHECK_TOKENS, "fast", 128)
    base = dense(family)
    moved = {f"m{seed}": make_moved(tmp_path / f"m{seed}", base, seed) for seed in (1, 2)}
    how = SHORT | {"check": "fast", "router": router, "rest": rest, "text": texts}
    done = upcycle.merge(list(map(str, moved.values())), tmp_path / "out", base=str(base), **how)
    names = [row.model for row in done.findings.perplexities.models]
    assert names == ["this merge", base.name, "m1", "m2", "mean of the sources"]
    out = weights(tmp_path / "out")
    for number, folder in enumerate(moved.values()):
        up = {n: t for n, t in weights(folder).items() if n.endswith("up_proj.weight")}
        assert len(up) == 3
        for name in up:
            layer, expert = name.rpartition(".up_proj")[0], f"experts.{number}."
            if family == "arcee":
                layer = layer.replace("mlp", "block_sparse_moe")
                assert torch.equal(out[f"{layer}.{expert}w1.weight"], up[name])
            matrix = "w3" if family == "arcee" else "up_proj"
            assert torch.equal(out[f"{layer}.{expert}{matrix}.weight"], up[name])


def test_text_is_the_router_where_there_is_any(models, texts, tmp_path):
    made = plan([models["m1"], models["m2"]], texts=texts, check="none")
    assert made.design.methods.gate.name == "text"
    assert made.passage_tokens == made.recipe.calibration_tokens
    found = refusal([models["m1"], models["m2"]], texts={"m1": texts["m1"]}, check="none")
    assert f"expert 1 ({models['m2']}) has neither text nor prompts" in found


def test_a_stopped_run_with_a_router_from_text_goes_on(models, texts, tmp_path):
    """Its rows depend on all layers before, which go through the text again."""
    experts = [models["m1"], models["m2"]]
    settings = {"text": texts, "router": "domain", "seq_len": 64, "calibration_tokens": 256}
    upcycle.merge(experts, tmp_path / "whole", check="none", **settings)

    def stop(stage, done, total):
        if stage == "converting layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle.merge(
            experts, tmp_path / "out", resume=True, progress=stop, check="none", **settings
        )
    upcycle.merge(experts, tmp_path / "out", resume=True, check="none", **settings)
    whole, out = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert len(whole) == len(out)
    assert all(torch.equal(whole[name], out[name]) for name in whole)


def test_an_adapter_changes_a_rest_that_is_merged(models, shelf, tmp_path):
    lora = f"{models['base']}+{shelf / 'lora1'}"
    made = upcycle.merge([lora, models["base"]], tmp_path / "out", rest="mean", **QUICK)
    assert not any("unused" in note for note in made.plan.warnings)
    base, factors = weights(Path(models["base"])), weights(shelf / "lora1")
    name = "model.layers.1.self_attn.q_proj"
    up, down = (factors[f"base_model.model.{name}.lora_{f}.weight"] for f in "BA")
    wanted = base[f"{name}.weight"] + up @ down  # half of 8 / 4 times
    assert torch.allclose(weights(tmp_path / "out")[f"{name}.weight"], wanted, atol=1e-6)


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(models, tmp_path, monkeypatch):
    experts = [models["m1"], models["m2"]]
    upcycle.merge(experts, tmp_path / "whole", **QUICK)

    def stop(stage, done, total):
        if stage == "converting layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle.merge(experts, tmp_path / "out", resume=True, progress=stop, **QUICK)
    assert not (tmp_path / "out").exists()
    upcycle.merge(experts, tmp_path / "out", resume=True, **QUICK)
    whole, out = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)


# --- the command -----------------------------------------------------------------------------


def command(*words):
    return CliRunner().invoke(app, ["merge", *map(str, words)])


def test_the_command_merges_and_prints_one_json_object(models, tmp_path):
    words = [models["m1"], models["m2"], "--base", models["base"], "--top-k", "1", "--json"]
    planned = command(*words, "--dry-run")
    assert json.loads(planned.stdout)["top_k"] == 1
    assert list(tmp_path.iterdir()) == []
    made = command(*words, "--check", "none", "-o", tmp_path / "out")
    assert made.exit_code == 0
    assert json.loads(made.stdout)["plan"]["merge"]["experts"][1]["model"] == "m2"
    assert load(tmp_path / "out")
    again = command(*words, "--check", "none", "-o", tmp_path / "out")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "exists and is not empty" in again.stderr


def test_the_command_tells_people_what_was_made(models, tmp_path, monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 64)
    shown = command(models["m1"], models["m2"], "-o", tmp_path / "out")
    assert shown.exit_code == 0
    words = " ".join(shown.stdout.split())
    assert "A token uses 2 of 2 models' FFNs in each layer." in words
    assert "Exactness: not expected: its experts are other models' FFNs." in words
    notes = " ".join(shown.stderr.split())
    assert "the first model: --base names another" in notes


# --- what is said ----------------------------------------------------------------------------


def test_the_record_and_the_card_name_the_models_and_no_place(models, shelf, tmp_path):
    adapted = f"{models['base']}+{shelf / 'lora1'}"
    sources = [models["m1"], models["m2"], adapted]
    upcycle.merge(sources, tmp_path / "out", base=models["base"], **QUICK)
    text = (tmp_path / "out" / "upcycle.json").read_text() + (
        tmp_path / "out" / "README.md"
    ).read_text()
    record = read_json(tmp_path / "out" / "upcycle.json")
    names = [e["model"] for e in record["plan"]["merge"]["experts"]]
    assert names == ["m1", "m2", "base+lora1"]
    assert record["plan"]["method"] == "merge"
    assert len({e["fingerprint"] for e in record["plan"]["merge"]["experts"]}) == 3
    assert "- expert 1: `m2`" in text
    assert str(Path(models["m1"]).parent) not in text.replace(
        str(read_json(tmp_path / "out" / "upcycle.json")["source"]["name"]), ""
    )


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["base", "base"], {}, "all 2 experts are equal and the router is random"),
        (["m1", "m2"], {}, "2 of 2 experts are on for every token"),
        (["m1", "m2", "base"], {}, "router uniform_random knows nothing of the experts"),
        (["m1", "m2", "base"], {"router": "kmeans"}, "router kmeans knows nothing of the experts"),
        (["m1", "m2"], {"top_k": 1}, "training gives the router no gradient"),
        (["m1", "m2", "m1"], {}, "experts 0 and 2 are one model"),
    ],
)
def test_what_works_but_not_as_one_may_think_is_noted(models, names, settings, said):
    made = plan([models[name] for name in names], **QUICK | settings)
    assert any(said in note for note in made.warnings), made.warnings


def test_tokens_that_are_only_appended_are_noted(models, tmp_path):
    more = shutil.copytree(models["m1"], tmp_path / "more")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|im_start|>"])
    tokenizer.save_pretrained(more)
    made = plan([models["base"], more], **QUICK)
    assert any("1 tokens" in note and "<|im_start|>" in note for note in made.warnings)


def test_other_tokens_at_the_same_ids_are_refused(models, tmp_path):
    other = shutil.copytree(models["m1"], tmp_path / "other")
    path = other / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(fields))
    said = refusal([models["base"], other], **QUICK)
    assert models["base"] in said
    assert str(other) in said
    assert f"id {min(vocabulary['a'], vocabulary['b'])} is another token" in said


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"intermediate_size": 64}, "differ in intermediate_size, 192 and 64"),
        ({"num_hidden_layers": 4}, "differ in num_hidden_layers, 3 and 4"),
        ({"rms_norm_eps": 1e-3}, "differ in rms_norm_eps"),
        ({"tie_word_embeddings": True}, "differ in tie_word_embeddings, False and True"),
        ({"family": "qwen2"}, "is llama, but"),
    ],
)
def test_models_of_other_shapes_are_refused(models, dense, fields, said):
    other = dense(fields.pop("family", "llama"), **fields)
    found = refusal([models["base"], other], **QUICK)
    assert said in found
    assert models["base"] in found
    assert str(other) in found


def test_a_missing_shard_of_the_third_model_is_found_before_the_work(models, dense, tmp_path):
    broken = shutil.copytree(dense(shards="200KB"), tmp_path / "broken")
    shard = sorted(broken.glob("*.safetensors"))[1]
    shard.unlink()
    found = refusal([models["m1"], models["m2"], broken], base=models["base"], **QUICK)
    assert shard.name in found


def test_an_adapter_of_another_model_is_refused(models, dense, tmp_path):
    wide = dense(intermediate_size=64)
    lora = make_lora(tmp_path / "lora", wide, ["up_proj"], r=2)
    found = refusal([f"{models['base']}+{lora}"], **QUICK)
    assert f"was made for {wide}, not for {models['base']}" in found
    settings = json.loads((lora / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "elsewhere/base"
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    assert "was made for another model" in refusal([f"{models['base']}+{lora}"], **QUICK)
    deep = make_lora(tmp_path / "deep", dense(num_hidden_layers=4), ["up_proj"], r=2)
    (deep / "adapter_config.json").write_text(json.dumps(settings))
    assert "model.layers.3.mlp.up_proj" in refusal([f"{models['base']}+{deep}"], **QUICK)


def test_an_adapter_of_another_model_of_that_shape_is_refused(models, shelf, tmp_path):
    """A copy of its own model is as good."""
    found = refusal([f"{models['m1']}+{shelf / 'lora1'}"], **QUICK)
    assert f"was made for {models['base']}, not for {models['m1']}: name it as" in found
    copied = shutil.copytree(models["base"], tmp_path / "copied")
    assert plan([f"{copied}+{shelf / 'lora1'}"], **QUICK)


def test_an_adapter_that_is_more_than_two_factors_is_refused(models, dense, tmp_path):
    lora = make_lora(tmp_path / "lora", dense(), ["up_proj"], r=2, use_dora=True)
    assert "use_dora" in refusal([f"{models['base']}+{lora}"], **QUICK)


def test_an_adapter_that_leaves_ffns_alone_is_noted(models, dense, tmp_path):
    lora = make_lora(tmp_path / "lora", dense(), ["q_proj"], r=2)
    made = plan([f"{models['base']}+{lora}", models["m1"]], **QUICK)
    assert any("changes no FFN" in note for note in made.warnings)


def test_infinity_in_an_adapter_stops_the_run(models, dense, tmp_path):
    lora = make_lora(tmp_path / "lora", dense(), ["up_proj"], r=2)
    path = lora / "adapter_model.safetensors"
    factors = load_file(path)
    next(iter(factors.values())).fill_(float("inf"))
    save_file(factors, path)
    with pytest.raises(UpcycleError, match="holds NaN or infinity"):
        upcycle.merge([f"{models['base']}+{lora}"], tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        ([], {}, "name a mergekit-moe file, or the models"),
        (["none"], {}, "none"),
        (["m1"], {"top_k": 2}, "2 experts per token are asked for, but the merge has 1"),
        (["m1", "m2"], {"router": "hidden"}, "expert 0"),
        (["m1", "m2"], {"router": "ridge"}, "tells parts of one FFN apart, not models: use hidden"),
        (["m1", "m2"], {"rest": "tise"}, "did you mean 'ties'?"),
        (["m1", "m2"], {"target": "mixtrel"}, "did you mean 'mixtral'?"),
        (["m1", "m2"], {"active": 0.5}, "goes with a split"),
        (["m1", "m2"], {"granularity": 2}, "goes with copies"),
        (["m1", "m2"], {"rest": {"name": "linear", "weights": [1]}}, "1 weights for 2 sources"),
        (["m1", "m2"], {"texts": {"m1": "probes"}}, "nothing is ever fitted on probes"),
        (["m1", "m2"], {"texts": {"m3": "builtin"}}, "m3 names no expert of"),
        (["m1", "m2"], {"experts": 4}, "`experts=4` is not for a merge"),
        (["m1", "m2"], {"shared": 0.5}, "`shared_model` names the model"),
    ],
)
def test_what_a_merge_cannot_be_is_refused(models, names, settings, said):
    assert said in refusal([models.get(n, "./none") for n in names], **{"check": "none"} | settings)


def test_shared_experts_need_a_place(models, dense):
    found = refusal([models["m1"]], shared_model=models["base"], target="mixtral", **QUICK)
    assert "mixtral has no shared expert" in found
    qwen3 = str(dense("qwen3"))
    found = refusal([qwen3] * 2, shared_model=qwen3, **QUICK)
    assert "qwen3_moe has no shared expert" in found
    assert "(glm4_moe or laguna)" in found


def test_a_source_that_is_no_dense_model_is_named(models, moe):
    mixture = str(moe(Path(models["base"])))
    found = refusal([models["m1"], mixture], base=models["base"], **QUICK)
    assert found.startswith(f"{mixture}: the source is a qwen2_moe model, which is a Mixture")


def test_one_model_alone_is_not_merged_by_convert(dense):
    with pytest.raises(UpcycleError, match="upcycle merge MODEL"):
        upcycle.plan(str(dense()), method="merge", keep_dense="none")
    with pytest.raises(UpcycleError, match="`rest=mean` goes with upcycle merge"):
        upcycle.plan(str(dense()), method="copy", rest="mean")


def test_quantised_and_other_formats_are_sources_too(dense, models, tmp_path):
    """Whatever `open_source` opens: here one in other dtypes, which a note names."""
    half = make_dense(tmp_path / "half", dtype=torch.bfloat16)
    made = plan([models["base"], half], **QUICK)
    assert any("is stored in bfloat16, and" in note for note in made.warnings)
