"""How alike two splits cut a model's FFNs, beside sklearn's index on labels made by hand."""

import json
import random
import shutil

import pytest
from reference import read_json
from sklearn.metrics import adjusted_rand_score
from typer.testing import CliRunner

from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.evaluation.stability import partition_agreement

SETTINGS = {"split": "random", "experts": 6, "top_k": 2, "shared": 0.25, "target": "qwen2_moe"}


@pytest.fixture
def splits(dense, moe):
    """Of one model, by two seeds."""
    return [moe(dense(), **SETTINGS, seed=seed) for seed in (1, 2)]


def labels(record, layer):
    """The part of every neuron, by looking for it."""
    plan, (made,) = record["plan"], [x for x in record["layers"] if x["layer"] == layer]
    places = [made["permutation"].index(neuron) for neuron in range(plan["intermediate_size"])]
    return [max(-1, (p - plan["shared_size"]) // plan["expert_size"]) for p in places]


def test_agreement_is_that_of_the_labels(splits):
    one, two = (read_json(folder / "upcycle.json") for folder in splits)
    found = partition_agreement(*map(str, splits))
    assert list(found) == [0, 1, 2]
    for layer, index in found.items():
        expected = adjusted_rand_score(labels(one, layer), labels(two, layer))
        assert index == pytest.approx(expected)
        assert 0.1 < index < 0.7  # the neurons that are always on are the same, the rest is random


def test_the_same_experts_by_other_numbers_agree(splits, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(splits[0], again)
    record = read_json(again / "upcycle.json")
    shared, size = record["plan"]["shared_size"], record["plan"]["expert_size"]
    for layer in record["layers"]:
        routed = layer["permutation"][shared:]
        experts = [routed[i : i + size] for i in range(0, len(routed), size)]
        random.Random(0).shuffle(experts)
        layer["permutation"][shared:] = [neuron for each in experts for neuron in each]
    (again / "upcycle.json").write_text(json.dumps(record))
    assert partition_agreement(str(splits[0]), str(again)) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_the_command_line_shows_it(splits):
    ran = CliRunner().invoke(app, ["inspect", str(splits[0]), "--partition", str(splits[0])])
    assert ran.exit_code == 0
    assert "layer 2" in ran.stdout
    assert "1.00" in ran.stdout


def test_what_is_no_partition_is_refused_in_one_sentence(dense, moe, splits):
    copies = moe(dense(), method="copy", experts=2)
    with pytest.raises(UpcycleError, match="is of copy, which gives neurons to several experts"):
        partition_agreement(str(splits[0]), str(copies))
    with pytest.raises(UpcycleError, match=r"holds no upcycle\.json"):
        partition_agreement(str(splits[0]), str(dense()))
    other = moe(dense(intermediate_size=96), **SETTINGS | {"experts": 3})
    with pytest.raises(UpcycleError, match="other FFN widths"):
        partition_agreement(str(splits[0]), str(other))
