"""What is published is right where it lands: nothing in it names a place of the machine that made
it, terms go along, and an adapter is found with the model that it changes."""

import json
import os
import shutil

import pytest
import yaml
from reference import gap, load, logits, read_json
from tiny import PLAIN_SPLIT
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.core.paths import way_from
from upcycle.evaluation.run import evaluate
from upcycle.finetune.run import finetune
from upcycle.models.adapter import adapter_base

CONVERT = PLAIN_SPLIT | {"calibration_tokens": 128, "seq_len": 64, "experts": 4, "top_k": 2}
TRAIN = {
    "steps": 2, "seq_len": 32, "batch_size": 2, "validation_tokens": 32, "lr": 1e-2,
}  # fmt: skip
SIZE = {"tokens": 64, "seq_len": 64}


@pytest.fixture(scope="module")
def place(dense, text, tmp_path_factory):
    """A folder with a dense model that says where it was made, a text, and what was made of them:
    `moe`, `healed` and `adapter`."""
    place = tmp_path_factory.mktemp("published")
    shutil.copytree(dense(), place / "model")
    shutil.copy(text, place / "notes.txt")
    for name in ("config.json", "tokenizer_config.json"):
        path = place / "model" / name
        made_at = {"name_or_path": str(place), "_name_or_path": str(place / "model")}
        path.write_text(json.dumps(read_json(path) | made_at))
    (place / "model" / "README.md").write_text(f"---\nbase_model: {place}\nlicense: mit\n---\n")
    for name in ("LICENSE.txt", "License", "Notice.md", "USE_POLICY.md", "LLAMA_LICENSE"):
        (place / "model" / name).write_text(f"the {name}")
    notes = str(place / "notes.txt")
    upcycle.convert(str(place / "model"), place / "moe", **CONVERT | {"calibration": notes})
    for name, settings in (("healed", {}), ("adapter", {"lora": 2})):
        finetune(str(place / "moe"), place / name, data=notes, preset="heal", **TRAIN, **settings)
    return place


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["moe", "healed", "adapter"])
def test_no_file_of_the_output_names_a_place_of_the_machine(place, name):
    found = files(place / name)
    assert {"upcycle.json", "README.md", "tokenizer_config.json"} <= {path.name for path in found}
    for path in found:
        assert os.fsencode(place) not in path.read_bytes(), path.name
    assert b"notes.txt" in (place / name / "upcycle.json").read_bytes()


def test_what_eval_and_report_write_names_no_place_either(place, monkeypatch):
    flags = ["--against", place / "model", "--text", place / "notes.txt"]
    size = ["--tokens", "64", "--seq-len", "64"]
    for command in (
        ["eval", place / "moe", *flags, *size, "--output", place / "eval.json"],
        ["report", place / "moe", "--evaluation", place / "eval.json", "-o", place / "page.html"],
    ):
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 0, result.stderr
    for name in ("eval.json", "page.html"):
        assert str(place) not in (place / name).read_text()
        assert "notes.txt" in (place / name).read_text()


@pytest.mark.parametrize("name", ["moe", "healed", "adapter"])
def test_terms_go_along_in_any_case(place, name):
    for file in ("LICENSE.txt", "License", "Notice.md", "USE_POLICY.md", "LLAMA_LICENSE"):
        assert (place / name / file).read_text() == f"the {file}"


@pytest.mark.parametrize("name", ["moe", "healed", "adapter"])
def test_dense_model_is_named_by_its_way_from_the_output(place, name):
    assert read_json(place / name / "upcycle.json")["source"]["name"] == "../model"
    assert read_json(place / name / "upcycle.json")["out" if name == "moe" else "plan"]


def test_dense_model_is_found_again_when_all_have_moved(place, tmp_path, monkeypatch):
    for name in ("model", "moe"):
        shutil.copytree(place / name, tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path)
    done = finetune("moved/moe", "deeper/healed", data="builtin", preset="heal", **TRAIN)
    assert done.settings.teacher == str(tmp_path / "moved" / "model")
    record = read_json(tmp_path / "deeper" / "healed" / "upcycle.json")
    assert record["source"]["name"] == "../../moved/model"
    assert record["training"][0]["settings"]["teacher"] == "model"


def test_dense_model_that_is_gone_is_asked_for(place, tmp_path):
    shutil.copytree(place / "moe", tmp_path / "moe")
    with pytest.raises(UpcycleError, match="name it by `teacher=DENSE`"):
        finetune(str(tmp_path / "moe"), tmp_path / "out", data="builtin", preset="heal", **TRAIN)
    assert not (tmp_path / "out").exists()


def test_places_that_share_no_folder_are_named_by_their_last_part(tmp_path):
    assert way_from(tmp_path / "a" / "out", tmp_path / "model") == "../../model"
    assert way_from(tmp_path / "out", tmp_path / "out" / "model") == "model"
    other = next(p for p in tmp_path.parents[-1].iterdir() if p.name != tmp_path.parts[1])
    assert way_from(tmp_path / "out", other / "deep" / "model") == "model"


# --- adapters --------------------------------------------------------------------------------


def card(folder):
    before, front, text = (folder / "README.md").read_text().split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), text


def test_card_of_an_adapter_is_its_own(place):
    front, text = card(place / "adapter")
    after = read_json(place / "adapter" / "upcycle.json")["training"][0]["after"]
    assert front.pop("model-index") == results("adapter", after)
    assert front == {
        "base_model": "moe",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "moe", "mixture-of-experts", "upcycle"],
    }
    assert "of rank 2 to the Mixture-of-Experts `moe`" in text
    assert text.count("## Training") == 1
    assert "said above" not in text


def results(name, after):
    metrics = [
        {"type": "perplexity", "value": after["perplexity"]},
        {"type": "perplexity over the dense model's", "value": after["perplexity_ratio"]},
    ]
    dataset = {"name": "notes.txt, held out", "type": "notes.txt"}
    row = {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
    return [{"name": name, "results": [row]}]


def test_card_after_training_has_the_numbers_of_the_trained_weights(place):
    before, (front, _) = card(place / "moe")[0], card(place / "healed")
    assert before["model-index"][0]["name"] == "moe"
    after = read_json(place / "healed" / "upcycle.json")["training"][0]["after"]
    assert front == before | {"model-index": results("healed", after)}


def test_code_of_the_adapters_card_loads_it_from_anywhere(place, tmp_path, monkeypatch):
    code = card(place / "adapter")[1].split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("path/to/this/folder", os.path.relpath(place / "adapter")), names)
    assert names["tokenizer"]("ab")["input_ids"]
    changed = logits(names["model"].eval())
    merged = logits(names["model"].merge_and_unload())
    assert gap(changed, merged) < 1e-3
    assert gap(changed, logits(load(place / "moe"))) > 1e-3


def test_eval_takes_an_adapter(place, tmp_path):
    notes = str(place / "notes.txt")
    finetune(
        str(place / "moe"), tmp_path / "merged", data=notes, preset="heal", lora=2, merge=True,
        **TRAIN, teacher=str(place / "model"),
    )  # fmt: skip
    adapter, merged, base = (
        evaluate(str(folder), [notes], against=str(place / "model"), **SIZE)
        for folder in (place / "adapter", tmp_path / "merged", place / "moe")
    )
    (one,), (other,), (before,) = adapter.texts, merged.texts, base.texts
    assert one.perplexity == pytest.approx(other.perplexity, rel=1e-4)
    assert abs(one.perplexity / before.perplexity - 1) > 1e-3
    assert one.fitted
    assert (adapter.params, adapter.routing) == (merged.params, merged.routing)


def test_adapter_says_where_its_model_has_to_be(place, tmp_path):
    adapter = shutil.copytree(place / "adapter", tmp_path / "adapter")
    with pytest.raises(UpcycleError, match=f"names ../moe, which is not there.*{tmp_path}/moe"):
        evaluate(str(adapter), ["builtin"], **SIZE)
    shutil.copytree(place / "moe", tmp_path / "moe")
    assert adapter_base(adapter) == str(tmp_path / "moe")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UpcycleError, match=r"holds no adapter_model\.safetensors"):
        evaluate(str(adapter), ["builtin"], **SIZE)


@pytest.mark.parametrize(
    "config", ["[", "[]", "{}", '{"base_model_name_or_path": 5}', '{"base_model_name_or_path": ""}']
)
def test_adapter_that_names_no_model(tmp_path, config):
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UpcycleError, match="names no model"):
        adapter_base(tmp_path)


def test_adapter_of_another_model_is_refused(place, dense, moe, tmp_path):
    adapter = shutil.copytree(place / "adapter", tmp_path / "adapter")
    other = moe(dense(hidden_size=64), experts=4)
    config = read_json(adapter / "adapter_config.json")
    config["base_model_name_or_path"] = os.path.relpath(other, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UpcycleError, match="does not fit the model that it names"):
        evaluate(str(adapter), ["builtin"], **SIZE)
