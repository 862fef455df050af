"""What a merge shows of its models, against naive references that hold them whole."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import load, read_json, weights
from safetensors.torch import load_file
from tiny import make_dense, make_moved

import upcycle
from upcycle.conversion.merging.own_texts import MIXED, mixed, own_texts
from upcycle.conversion.merging.passages import passages
from upcycle.conversion.plan import CHECK_TOKENS
from upcycle.conversion.run import run
from upcycle.evaluation.beside import MEAN
from upcycle.models.record.file import read_record
from upcycle.models.tokens import open_reader

QUICK = {"check": "none", "router": "uniform_random"}
SHORT = {"seq_len": 64, "calibration_tokens": 256}


@pytest.fixture(scope="module")
def models(shelf):
    return {name: str(shelf / name) for name in ("base", "m1", "m2", "m3", "lora1")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file of capital letters, and one of small ones."""
    folder = tmp_path_factory.mktemp("texts")
    made = {}
    for name, letters in (("m1", "ABCDEFGH"), ("m2", "stuvwxyz")):
        path = folder / f"{name}.txt"
        path.write_text("".join(random.Random(name).choices(letters, k=1500)))
        made[name] = str(path)
    return made


def flat(model, names):
    return np.concatenate([model[name].double().numpy().ravel() for name in names])


def distance(one, other, base, wanted) -> float:
    """Of the weights whose names are wanted, all put together, over the base's."""
    names = [name for name in base if wanted(name)]
    apart = flat(one, names) - flat(other, names)
    return float(np.linalg.norm(apart) / np.linalg.norm(flat(base, names)))


def adapted(base, lora):
    """The base's weights with an adapter of rank 4 and alpha 8."""
    factors, found = load_file(Path(lora) / "adapter_model.safetensors"), dict(base)
    for name in factors:
        if ".lora_A." in name:
            up = factors[name.replace(".lora_A.", ".lora_B.")]
            short = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            found[short] = base[short] + 2 * up @ factors[name]
    return found


def is_ffn(name) -> bool:
    return ".mlp." in name


# --- distances -------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", ["base", "ties"])
def test_distances_are_those_of_all_weights_at_once(models, tmp_path, rest):
    """Whether a rule asks for the rest of the models or not; the base is no source, and one that
    is named twice counts once."""
    base, lora = weights(Path(models["base"])), f"{models['base']}+{models['lora1']}"
    experts = [models["m1"], lora, models["base"], models["m1"]]
    done = upcycle.merge(
        experts,
        tmp_path / "out",
        base=models["base"],
        rest=rest,
        shared_model=models["m3"],
        **QUICK,
    )
    whole = {"m1": weights(Path(models["m1"])), "m3": weights(Path(models["m3"]))}
    whole["base+lora1"] = adapted(base, models["lora1"])
    found = done.findings.distances
    assert [source.model for source in found.sources] == ["m1", "base+lora1", "m3"]
    for source in found.sources:
        model = whole[source.model]
        assert source.ffn == pytest.approx(distance(model, base, base, is_ffn), rel=1e-5)
        expected = distance(model, base, base, lambda name: not is_ffn(name))
        assert source.rest == pytest.approx(expected, rel=1e-5)
    expected = distance(whole["m1"], whole["m3"], base, is_ffn)
    assert found.between[0][2] == pytest.approx(expected, rel=1e-4)


def test_each_source_is_read_once(models, tmp_path, monkeypatch):
    from upcycle.models.source import DenseSource

    seen, read = [], DenseSource.read

    def reading(source, names):
        seen.extend((Path(source.label).name, name) for name in names)
        return read(source, names)

    monkeypatch.setattr(DenseSource, "read", reading)
    experts = [models["m1"], models["m2"]]
    upcycle.merge(experts, tmp_path / "out", base=models["base"], rest="mean", **QUICK)
    assert len(seen) == len(set(seen)) == 3 * len(weights(Path(models["base"])))


def test_equal_files_and_a_model_of_another_origin_are_noticed(models, tmp_path):
    twin = shutil.copytree(models["m1"], tmp_path / "twin")
    other = make_moved(tmp_path / "other", Path(models["base"]), 9, scale=0.3)
    experts = [models["m1"], str(twin), str(other)]
    done = upcycle.merge(experts, tmp_path / "out", base=models["base"], **QUICK)
    twins, far = done.findings.notes
    assert twins == "twin has the same FFNs as m1"
    assert far.startswith("other is 1.5")
    assert done.findings.distances.nearest == (0, 1, 0.0)


def test_copies_of_the_base_have_no_distances(models, tmp_path):
    done = upcycle.merge([models["base"]] * 2, tmp_path / "out", **QUICK)
    assert done.findings.distances is None
    assert done.findings.notes == []


def test_models_of_other_vocabularies_are_measured_where_both_have_rows(models, tmp_path):
    more = make_moved(tmp_path / "more", make_dense(tmp_path / "wide", vocab_size=280), 3)
    done = upcycle.merge([models["m1"], str(more)], tmp_path / "out", base=models["base"], **QUICK)
    assert [source.model for source in done.findings.distances.sources] == ["m1", "more"]


# --- gates -----------------------------------------------------------------------------------


def test_condition_numbers_are_numpys_of_the_rows_that_were_written(models, tmp_path):
    experts = [models["m1"], models["m2"], models["m3"]]
    done = upcycle.merge(experts, tmp_path / "out", base=models["base"], **QUICK)
    made = weights(tmp_path / "out")
    assert [gate.layer for gate in done.findings.gates] == [0, 1, 2]
    for gate in done.findings.gates:
        rows = made[f"model.layers.{gate.layer}.block_sparse_moe.gate.weight"]
        assert gate.condition == pytest.approx(np.linalg.cond(rows.double().numpy()), rel=1e-4)
        assert gate.alike == []


def test_experts_that_the_router_cannot_tell_apart_are_named(models, tmp_path):
    prompts = {"m1": ["one"], "m2": ["two"], "m3": ["one"]}
    file = tmp_path / "merge.yml"
    experts = [
        {"source_model": models[name], "positive_prompts": words} for name, words in prompts.items()
    ]
    file.write_text(json.dumps({"base_model": models["base"], "experts": experts}))
    done = upcycle.merge(str(file), tmp_path / "out", check="none")
    assert done.findings.notes == [
        "in every layer the router's rows of experts 0 and 2 point the same way, so it can't tell "
        "these two apart"
    ]
    record = read_record(tmp_path / "out" / "upcycle.json")
    assert [gate.condition for gate in record.findings.gates] == [math.inf] * 3
    assert record.findings.gates[1].alike == [(0, 2)]


# --- perplexities ----------------------------------------------------------------------------


@pytest.fixture
def few_windows(monkeypatch):
    monkeypatch.setitem(CHECK_TOKENS, "fast", 128)


def plan(models, texts, out, **settings):
    from upcycle.conversion.merging.planning import plan_merge
    from upcycle.conversion.merging.preflight import merge_request

    asked = SHORT | settings
    names = [models[name] for name in ("m1", "m2", "base")]
    texts = texts | {"base": texts["m1"]}
    request = merge_request(names, asked, base=models["base"], texts=texts)
    return plan_merge(request, asked, out)


def perplexity(model, ids_WL) -> float:
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in ids_WL]
    return math.exp(sum(losses) / len(losses))


def test_merge_base_sources_and_their_mean_on_every_text(models, texts, tmp_path, few_windows):
    made = plan(models, texts, tmp_path / "out")
    stages = {}
    done = run(made, progress=lambda stage, at, total: stages.setdefault(stage, []).append(at))
    windows, found = own_texts(made).windows, done.findings.perplexities
    assert found.texts == ["m1.txt", "m2.txt", "mixed"]
    assert found.tokens == [128, 128, 128]
    mean = load(Path(models["base"]))
    states = [weights(Path(models[name])) for name in ("m1", "m2", "base")]
    mean.load_state_dict({name: sum(s[name] for s in states) / 3 for name in states[0]})
    whole = {"this merge": load(tmp_path / "out"), MEAN: mean}
    whole |= {name: load(Path(models[name])) for name in ("base", "m1", "m2")}
    assert [row.model for row in found.models] == ["this merge", "base", "m1", "m2", MEAN]
    for row in found.models:
        expected = [perplexity(whole[row.model], ids_WL) for ids_WL in windows.values()]
        assert row.perplexity == pytest.approx(expected, rel=1e-3)
    assert stages["measuring sources"] == [*range(18), 18]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| | m1.txt | m2.txt | mixed |\n|---|---|---|---|\n| this merge |" in card
    assert "in windows of 64; its routers were fitted on `m1.txt+m2.txt`.\n" in card
    for row in found.models:
        assert f"| {row.model} | {row.perplexity[0]:.2f} | {row.perplexity[1]:.2f} |" in card
    for source in done.findings.distances.sources:
        assert f"| {source.model} | {100 * source.ffn:.3g} % | {100 * source.rest:.3g} % |" in card
    record = read_json(tmp_path / "out" / "upcycle.json")
    assert record["findings"]["perplexities"]["texts"] == found.texts
    assert {"m1.txt", "m2.txt", "mixed"} < {kind["kind"] for kind in record["check"]["kinds"]}


def test_nothing_is_measured_on_what_the_router_was_fitted_on(models, texts, tmp_path):
    made = plan(models, texts, tmp_path / "out", calibration_tokens=1024)
    reader = open_reader(Path(models["base"]), 272)
    fitted = passages(made.design.merge, made.recipe, reader, "text")
    seen = {run for passage in fitted for run in runs(passage.ids_L)}
    assert len(seen) > 200
    held = own_texts(made).windows
    del held[MIXED]
    assert {run for ids_WL in held.values() for row in ids_WL for run in runs(row)}.isdisjoint(seen)


def runs(ids_L, length=12):
    """All that stands side by side."""
    ids = ids_L.tolist()
    return {tuple(ids[at : at + length]) for at in range(len(ids) - length + 1)}


def test_mixed_windows_hold_a_piece_of_each_text():
    one, two = torch.arange(16).view(2, 8), 100 + torch.arange(24).view(3, 8)
    expected = [[0, 1, 2, 3, 104, 105, 106, 107], [108, 109, 110, 111, 12, 13, 14, 15]]
    assert mixed([one, two]).tolist() == expected


def test_without_a_check_or_text_nothing_is_measured(models, texts, tmp_path, few_windows):
    done = run(plan(models, texts, tmp_path / "unchecked", check="none"))
    assert done.findings.perplexities is None
    assert done.findings.distances
    bare = {"router": "uniform_random", "seq_len": 64}
    done = upcycle.merge([models["m1"], models["m2"]], tmp_path / "bare", **bare)
    assert done.check
    assert done.findings.perplexities is None


def test_a_text_that_is_all_fitted_on_is_left_out(models, texts, tmp_path, few_windows):
    short = tmp_path / "short.txt"
    short.write_text(Path(texts["m2"]).read_text()[:100])
    made = plan(models, texts | {"m2": str(short)}, tmp_path / "out")
    found = run(made).findings
    assert found.perplexities.texts == ["m1.txt"]
    assert found.perplexities.left_out == ["short.txt"]
    assert any("no whole window of short.txt is left" in note for note in found.notes)


def test_a_run_that_was_stopped_finds_the_same(models, texts, tmp_path):
    whole = run(plan(models, texts, tmp_path / "whole", check="none"))

    def stop(stage, done, total):
        if stage == "converting layers" and done == 2:
            raise KeyboardInterrupt

    made = plan(models, texts, tmp_path / "out", check="none")
    with pytest.raises(KeyboardInterrupt):
        run(made, resume=True, progress=stop)
    assert run(made, resume=True).findings == whole.findings


# --- of an expert that comes later -----------------------------------------------------------


def addition(moe, model, out, texts=None, **settings):
    from upcycle.conversion.merging.planning import plan_merge
    from upcycle.conversion.merging.preflight import merge_request

    request = merge_request([str(moe)], settings, add=model, texts=texts)
    return plan_merge(request, settings, out)


def test_of_an_expert_more_what_still_holds_is_kept_and_the_rest_measured(
    models, texts, tmp_path, few_windows
):
    """The record of the other models, which are not read, has their distances; what the merge
    before had shown is kept with what was done to it."""
    three = tmp_path / "three.txt"
    three.write_text("".join(random.Random("m3").choices("0123456789", k=1500)))
    two = {"base": models["base"], "text": texts, "seq_len": 64, "calibration_tokens": 256}
    before = upcycle.merge([models["m1"], models["m2"]], tmp_path / "two", **two).findings
    given = {"": str(three), "m1": texts["m1"]}
    made = addition(tmp_path / "two", models["m3"], tmp_path / "out", given)
    found = run(made).findings
    assert found.distances.sources[:2] == before.distances.sources
    base, m3 = (weights(Path(models[name])) for name in ("base", "m3"))
    new = found.distances.sources[2]
    assert new.model == "m3"
    assert new.ffn == pytest.approx(distance(m3, base, base, is_ffn), rel=1e-5)
    assert new.rest == pytest.approx(distance(m3, base, base, lambda n: not is_ffn(n)), rel=1e-5)
    known = before.distances.between
    assert found.distances.between == [[*known[0], None], [*known[1], None], [None, None, 0.0]]
    assert found.sentences[0].startswith("Nearest of those merged together are m1 and m2: ")
    out = weights(tmp_path / "out")
    for gate in found.gates:
        rows = out[f"model.layers.{gate.layer}.block_sparse_moe.gate.weight"]
        assert len(rows) == 3
        expected = np.linalg.cond(rows.double().numpy())
        assert gate.condition == pytest.approx(expected, rel=1e-3) or math.isinf(gate.condition)
    assert [gate.layer for gate in found.gates] == [0, 1, 2]
    beside, windows = found.perplexities, own_texts(made).windows
    assert beside.texts == ["m1.txt", "three.txt", "mixed"]
    whole = {"this merge": tmp_path / "out", "base": models["base"]}
    whole |= {"the merge before": tmp_path / "two", "m3": models["m3"]}
    assert [row.model for row in beside.models] == list(whole)
    for row in beside.models:
        model = load(Path(whole[row.model]))
        expected = [perplexity(model, ids_WL) for ids_WL in windows.values()]
        assert row.perplexity == pytest.approx(expected, rel=1e-3)
    assert found.notes == [
        "the merge before may have been made with what is measured here of m1.txt"
    ]
    record = read_record(tmp_path / "out" / "upcycle.json")
    assert record.findings == found
    assert record.added[0].findings_before == before
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| m3 | {100 * new.ffn:.3g} % | {100 * new.rest:.3g} % |" in card
    assert f"| the merge before | {beside.models[2].perplexity[0]:.2f} |" in card


def test_what_is_odd_of_a_model_that_comes_later_is_noticed(models, tmp_path):
    upcycle.merge([models["m1"], models["m2"]], tmp_path / "two", base=models["base"], **QUICK)
    twin = shutil.copytree(models["base"], tmp_path / "twin")
    other = make_moved(tmp_path / "other", Path(models["base"]), 9, scale=0.3)
    notes, sources = {}, {}
    for name, model in (("base", twin), ("far", other), ("again", models["m1"])):
        added = run(addition(tmp_path / "two", str(model), tmp_path / name, check="none")).findings
        notes[name], sources[name] = added.notes, added.distances.sources
        assert added.perplexities is None
    assert notes["base"] == ["twin has the same FFNs as base"]
    assert [source.model for source in sources["far"]] == ["m1", "m2", "other"]
    assert notes["far"][0].startswith("other is 1.5")
    assert notes["again"] == ["experts 0 and 2 are of one model, m1"]
    assert [source.model for source in sources["again"]] == ["m1", "m2"]


def test_an_addition_that_was_stopped_finds_the_same(models, tmp_path):
    upcycle.merge([models["m1"]] * 2, tmp_path / "two", base=models["base"], **QUICK)
    how = tmp_path / "two", models["m3"]
    whole = run(addition(*how, tmp_path / "whole", check="none"))

    def stop(stage, done, total):
        if stage == "converting layers" and done == 2:
            raise KeyboardInterrupt

    made = addition(*how, tmp_path / "out", check="none")
    with pytest.raises(KeyboardInterrupt):
        run(made, resume=True, progress=stop)
    assert run(made, resume=True).findings == whole.findings
    assert whole.findings.gates[0].alike == []
