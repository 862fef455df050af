"""An expert more for a finished merge: what stays, what is made, what is refused."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hosting import hosts
from reference import (
    dense_logits,
    gap,
    load,
    logits,
    read_json,
    routers,
    selections,
    weights,
)
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_moved, make_tokenizer, once
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.conversion.merging.planning import plan_merge
from upcycle.conversion.merging.preflight import merge_request
from upcycle.conversion.plan import CHECK_TOKENS

QUICK = {"check": "none", "router": "uniform_random"}
SHORT = {"check": "none", "seq_len": 64, "calibration_tokens": 512}
LETTERS = {"m1": "ABCDEFGH", "m2": "stuvwxyz", "m3": "0123456789"}


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A file for each model, of letters that no other's holds."""
    folder = tmp_path_factory.mktemp("texts")
    for name, letters in LETTERS.items():
        written = "".join(random.Random(name).choices(letters, k=2000))
        (folder / f"{name}.txt").write_text(written)
    return {name: str(folder / f"{name}.txt") for name in LETTERS}


@pytest.fixture(scope="session")
def merged(shelf, texts, tmp_path_factory):
    """A merge of m1 and m2 by a router, made once; leave its folder as it is."""

    @once
    def make(router="uniform_random", **settings) -> Path:
        out = tmp_path_factory.mktemp("merged") / "moe"
        text = {n: texts[n] for n in ("m1", "m2")} if router in ("text", "domain") else None
        experts = [str(shelf / "m1"), str(shelf / "m2")]
        how = SHORT | settings | {"router": router}
        upcycle.merge(experts, out, base=str(shelf / "base"), text=text, **how)
        return out

    return make


def refusal(moe, add, *, base=None, text=None, prompts=(), shared_model=None, **settings) -> str:
    named = {"texts": {"": text} if isinstance(text, str) else text, "prompts": prompts}
    where = {"base": base, "shared_model": shared_model, "add": str(add)}
    moes = moe if isinstance(moe, list) else [str(moe)]
    with pytest.raises(UpcycleError) as caught:
        plan_merge(merge_request(moes, settings, **where, **named), settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(folder):
    """The routers' rows as they lie on the disk, layer by layer."""
    names = ("block_sparse_moe.gate", "block_sparse_moe.router", "mlp.gate")
    names += ("block_sparse_moe.router.layer",)
    found = weights(folder)
    return [
        found[f"model.layers.{layer}.{name}.weight"]
        for layer in range(3)
        for name in names
        if f"model.layers.{layer}.{name}.weight" in found
    ]


# --- what stays, and what is made ------------------------------------------------------------


FAMILY_OF = {target: family for family in sorted(FAMILIES) for target in hosts(family)}
SHARED = ("qwen2_moe", "granitemoeshared", "deepseek_v3")
FAMILY_OF |= dict.fromkeys(("qwen2_moe", "granitemoeshared"), "llama")


# Per-expert, fused and shared layouts, biases of one and two dimensions beside the router; latent
# attention, layers without an FFN, and FFNs without a gate.
HYBRIDS = ("lfm2_moe", "granitemoehybrid", "nemotron_h")
KINDS = ("mixtral", "granitemoeshared", "qwen2_moe", "ernie4_5_moe", "deepseek_v3", *HYBRIDS)


@pytest.mark.parametrize("target", KINDS)
def test_the_result_is_the_merge_of_all_but_for_the_routers(dense, tmp_path, target):
    """The merge's own rows stay, and so does what it learnt since: here all weights but the
    experts' are moved."""
    base = str(dense(FAMILY_OF[target]))
    models = [str(make_moved(tmp_path / f"m{seed}", base, seed)) for seed in (1, 2, 3)]
    shared = models[0] if target in SHARED else None
    fixed = {"base": base, "target": target, "shared_model": shared}
    upcycle.merge(models[:2], tmp_path / "two", **fixed, **QUICK)
    upcycle.merge(models, tmp_path / "three", **fixed, **QUICK)
    moved = load_file(tmp_path / "two" / "model.safetensors")
    moved = {n: t if t.dim() > 2 or ".experts." in n else t + 0.125 for n, t in moved.items()}
    save_file(moved, tmp_path / "two" / "model.safetensors", {"format": "pt"})
    upcycle.merge(tmp_path / "two", tmp_path / "out", add=models[2], check="none")
    two, three, out = (weights(tmp_path / name) for name in ("two", "three", "out"))
    assert out.keys() == three.keys()
    grown = [name for name in two if out[name].shape != two[name].shape]
    assert all(torch.equal(out[name], two[name]) for name in two.keys() - set(grown))
    for name in grown:
        place = next(i for i, n in enumerate(two[name].shape) if out[name].shape[i] != n)
        assert torch.equal(out[name].narrow(place, 0, 2), two[name])
    assert all(torch.equal(out[name], three[name]) for name in out.keys() - two.keys())
    fused = [name for name in grown if out[name].dim() == 3]
    assert all(torch.equal(out[name], three[name]) for name in fused)
    assert len(routers(load(tmp_path / "out"))) == 3
    assert read_json(tmp_path / "out" / "config.json") == read_json(
        tmp_path / "three" / "config.json"
    )


@pytest.mark.parametrize("target", ["deepseek_v3", *HYBRIDS])
def test_one_more_copy_of_the_base_leaves_its_logits(dense, tmp_path, target):
    base = dense(FAMILY_OF[target])
    upcycle.merge([str(base)] * 2, tmp_path / "two", target=target, **QUICK)
    upcycle.merge(tmp_path / "two", tmp_path / "out", add=str(base), check="none")
    assert len(routers(load(tmp_path / "out"))) == 3
    assert gap(logits(load(tmp_path / "out")), dense_logits(base)) < 2e-5


def test_random_rows_are_seeded_and_no_two_alike(merged, shelf, tmp_path):
    moe, third = merged(), str(shelf / "m3")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        upcycle.merge(moe, tmp_path / name, add=third, check="none", seed=seed)
    again = str(shelf / "base")
    upcycle.merge(tmp_path / "a", tmp_path / "four", add=again, check="none", top_k=3)
    a, b, c, four = (rows(tmp_path / name) for name in ("a", "b", "c", "four"))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert not any(torch.equal(one[2], other[2]) for one, other in zip(a, c, strict=True))
    assert len({tuple(row.tolist()) for layer in four for row in layer}) == 3 * 4
    assert load(tmp_path / "four").config.num_experts_per_tok == 3


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("rest", ["base", "mean"])
def test_a_fitted_row_knows_its_text_and_leaves_the_others_theirs(
    merged, shelf, texts, tmp_path, known, rest
):
    named = {"m3": texts["m3"]} | ({n: texts[n] for n in ("m1", "m2")} if known else {})
    moe, third = merged("text", rest=rest), str(shelf / "m3")
    upcycle.merge(moe, tmp_path / "out", add=third, text=named, check="none", top_k=1)
    model, tokenizer = load(tmp_path / "out"), make_tokenizer()
    assert all(
        torch.equal(a[:2], b) for a, b in zip(rows(tmp_path / "out"), rows(moe), strict=True)
    )
    for place, letters in enumerate(("HGFEDCBA", "zyxwvuts", "9876543210")):
        ids = torch.tensor([tokenizer(letters * 4)["input_ids"]])
        with selections(model) as seen:
            logits(model, ids)
        # Of text that is not there, builtin text in its place holds little.
        least = 0.7 if known or place == 2 else 0.5
        assert min(float((chosen == place).float().mean()) for chosen in seen) > least


def test_a_row_from_losses_stands_against_the_bases(merged, shelf, texts, tmp_path):
    """A copy of the base is no better than it anywhere, so it gets a fair share of every token."""
    moe, text = merged("text"), texts["m3"]
    how = {"text": text, "check": "none", "router": "loss"}
    upcycle.merge(moe, tmp_path / "out", add=str(shelf / "m3"), **how)
    upcycle.merge(moe, tmp_path / "same", add=str(shelf / "base"), **how)
    for own, same in zip(rows(tmp_path / "out"), rows(tmp_path / "same"), strict=True):
        assert own[2].norm() > 10 * same[2].norm()


def test_a_domains_row_is_what_the_kept_projector_makes_of_the_new_text(
    merged, shelf, texts, tmp_path
):
    moe = merged("domain")
    for name in ("out", "again"):
        upcycle.merge(moe, tmp_path / name, add=str(shelf / "m3"), text=texts["m3"], check="none")
    kept, left = (load_file(p / "router_domains.safetensors") for p in (moe, tmp_path / "out"))
    ids = make_tokenizer()(LETTERS["m3"])["input_ids"]
    digits = weights(moe)["model.embed_tokens.weight"][ids].mean(0)
    for layer, row in enumerate(made[2] for made in rows(tmp_path / "out")):
        name = f"model.layers.{layer}."
        domain = left[f"{name}domains"][2]
        expected = (domain - kept[f"{name}centre"]) @ kept[f"{name}projector"]
        torch.testing.assert_close(row, expected)
        assert torch.equal(left[f"{name}domains"][:2], kept[f"{name}domains"])
        assert (domain - digits).norm() < 0.3 * (domain - kept[f"{name}centre"]).norm()
    again = load_file(tmp_path / "again" / "router_domains.safetensors")
    assert all(torch.equal(again[name], left[name]) for name in left)


FILE = """base_model: base
experts:
  - {source_model: m1, positive_prompts: ["rain", "a cold wind"]}
  - {source_model: m2, positive_prompts: ["bread"]}
"""


@pytest.mark.parametrize("gate", ["hidden", "hidden_avg", "cheap_embed"])
def test_a_row_from_prompts_is_that_of_a_merge_of_all(shelf, tmp_path, monkeypatch, gate):
    monkeypatch.chdir(shelf)
    third = '  - {source_model: m3, positive_prompts: ["the sea", "salt"]}\n'
    for name, text in (("two", FILE), ("three", FILE + third)):
        path = tmp_path / f"{name}.yml"
        path.write_text(f"gate_mode: {gate}\n{text}")
        upcycle.merge(path, tmp_path / name, check="none")
    prompts = ["the sea", "salt"]
    upcycle.merge(tmp_path / "two", tmp_path / "out", add="m3", prompts=prompts, check="none")
    for found, wanted in zip(rows(tmp_path / "out"), rows(tmp_path / "three"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_bytes(merged, shelf, texts, tmp_path):
    moe = merged("text")
    how = {"add": str(shelf / "m3"), "text": texts["m3"], "check": "none"}
    upcycle.merge(moe, tmp_path / "whole", **how)

    def stop(stage, done, total):
        if stage == "converting layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upcycle.merge(moe, tmp_path / "out", resume=True, progress=stop, **how)
    assert not (tmp_path / "out").exists()
    upcycle.merge(moe, tmp_path / "out", resume=True, **how)
    whole, out = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], out[name]) for name in whole)


# --- what is said ----------------------------------------------------------------------------


def test_the_record_and_the_card_tell_which_expert_came_when(
    merged, shelf, texts, tmp_path, monkeypatch
):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 128)
    train = {"data": texts["m1"], "steps": 1, "seq_len": 16, "validation_tokens": 16}
    upcycle.finetune(str(merged("text")), tmp_path / "tuned", preset="specialise", **train)
    for place, before, name in ((2, "tuned", "m3"), (3, before_last := "first", "base")):
        out = before_last if place == 2 else "second"
        moe, model = tmp_path / before, str(shelf / name)
        done = upcycle.merge(moe, tmp_path / out, add=model, text=texts["m3"])
        assert done.check.exact_error is None
    record = read_json(tmp_path / "second" / "upcycle.json")
    card = (tmp_path / "second" / "README.md").read_text()
    experts = record["plan"]["merge"]["experts"]
    assert [expert["model"] for expert in experts] == ["m1", "m2", "m3", "base"]
    assert record["plan"]["experts"] == 4
    first, second = record["added"]
    assert (first["expert"], second["expert"]) == (2, 3)
    assert (first["after_training"], first["router"]["name"]) == (1, "text")
    assert first["check_before"] is None
    assert second["check_before"]["kinds"]
    assert len(record["training"]) == 1
    headings = ("## Training", "## Expert 2, added later", "## Expert 3, added later")
    assert [card.index(heading) for heading in headings] == sorted(
        card.index(heading) for heading in headings
    )
    assert str(tmp_path) not in json.dumps(record | {"source": None}) + card
    assert upcycle.finetune(
        str(tmp_path / "second"), tmp_path / "third", preset="specialise", **train
    )


def test_the_command_adds_shows_and_writes_nothing_when_it_only_shows(
    merged, shelf, texts, tmp_path
):
    out = tmp_path / "out"
    command = ["merge", str(merged("text")), "--add", str(shelf / "m3"), "--text", texts["m3"]]
    shown = CliRunner().invoke(app, [*command, "--dry-run", "--json"])
    assert json.loads(shown.stdout)["experts"] == 3
    assert "text of expert 0, 1 is not here" in json.dumps(json.loads(shown.stdout)["warnings"])
    assert not out.exists()
    done = CliRunner().invoke(app, [*command, "-o", str(out), "--json", "--check", "none"])
    assert json.loads(done.stdout)["plan"]["experts"] == 3
    assert load(out).config.num_local_experts == 3


# --- what is refused -------------------------------------------------------------------------


def test_what_is_no_merge_is_refused(dense, moe, shelf):
    third = shelf / "m3"
    assert "holds no upcycle.json: `add` takes" in refusal(dense(), third)
    split = moe(dense())
    assert f"{split} was made by method split and is no merge" in refusal(split, third)
    assert "name that alone" in refusal([str(split)] * 2, third)


@pytest.mark.parametrize(
    ("router", "given", "said"),
    [
        ("text", {}, "router text of"),
        ("domain", {}, "is made from text: give the new expert's, `text=FILE`"),
        ("uniform_random", {"text": "m3"}, "leave it out, or give `router=text`"),
        ("uniform_random", {"router": "hidden"}, "router hidden makes its rows from prompts"),
        ("text", {"router": "kmeans"}, "router kmeans makes no row for one expert more"),
        ("domain", {"text": {"m4": "m3"}}, "m4 names no expert of 0 (m1), 1 (m2)"),
        ("text", {"router": "hidden", "text": "m3"}, "each by `prompts`"),
        ("text", {"router": "domain", "text": "m3"}, "holds no router_domains.safetensors"),
        ("text", {"text": {"": "m3", "m4": "m1"}}, "m4 names no expert of 0 (m1), 1 (m2)"),
        ("domain", {"text": {"": "m3", "m1": "m1"}}, "router domain knows the other"),
        ("text", {"text": "m3", "rest": "mean"}, "`rest=mean` has no effect with `add`"),
        ("text", {"text": "m3", "dtype": "bfloat16"}, "`dtype=bfloat16` has no effect"),
        ("text", {"text": "m3", "top_k": 4}, "then has 3: give at most 3"),
        ("text", {"text": "m3", "shared_model": "x"}, "`shared_model=x` has no effect"),
    ],
)
def test_what_does_not_go_with_the_merge_is_refused(merged, shelf, texts, router, given, said):
    text = given.get("text")
    named = {k: texts[v] for k, v in text.items()} if isinstance(text, dict) else texts.get(text)
    assert said in refusal(merged(router), shelf / "m3", **given | {"text": named})


def test_a_model_that_is_no_fine_tune_of_the_base_is_refused(merged, dense, shelf):
    other = dense(intermediate_size=64)
    found = refusal(merged(), other)
    assert "differ in intermediate_size, 192 and 64" in found
    assert str(other) in found
    assert "only models of one family" in refusal(merged(), dense("qwen2"))


def test_a_base_that_is_gone_or_another_is_refused(merged, shelf, tmp_path):
    moe = shutil.copytree(merged(), tmp_path / "far" / "off" / "moe")
    third = shelf / "m3"
    assert "say where it lies by `base`" in refusal(moe, third)
    with pytest.raises(UpcycleError, match="is not the base that"):
        upcycle.merge(moe, tmp_path / "out", add=str(third), base=str(shelf / "m1"), check="none")
    assert not (tmp_path / "out").exists()
    upcycle.merge(moe, tmp_path / "out", add=str(third), base=str(shelf / "base"), check="none")


def test_a_merge_with_other_tensors_than_its_record_means_is_refused(merged, shelf, tmp_path):
    moe = shutil.copytree(merged(), tmp_path / "moe")
    path = moe / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.block_sparse_moe.experts.0.w1.weight")
    save_file(tensors, path, {"format": "pt"})
    found = refusal(moe, shelf / "m3", base=str(shelf / "base"))
    assert "model.layers.1.block_sparse_moe.experts.0.w1.weight" in found


def test_the_merge_is_no_place_for_the_result(merged, shelf):
    moe = merged()
    with pytest.raises(UpcycleError, match="holds the source"):
        upcycle.merge(moe, moe, add=str(shelf / "m3"), overwrite=True, check="none")
