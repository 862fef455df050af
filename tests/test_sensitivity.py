"""Which layers stay dense: their damage against the whole model with one FFN cut, the choice
against all choices, and a conversion that makes it."""

import json
import random
import shutil
from itertools import combinations, pairwise

import pytest
import torch
from models import SIZES
from reference import load, logits, read_json
from safetensors.torch import load_file, save_file

import upcycle
from upcycle import UpcycleError, conversion, sensitivity
from upcycle.sensitivity import best_dense_layers, choose_dense_layers, measure_damage, strongest
from upcycle.sink import partial_folder
from upcycle.types import DenseFFN

F, LAYERS = SIZES["intermediate_size"], SIZES["num_hidden_layers"]
DEEP = 6
TOKENS_BL = torch.randint(0, 256, (5, 60), generator=torch.Generator().manual_seed(3))
PLAIN = {
    "split": "random",
    "router": "normal",
    "compensate": "none",
    "sequential": False,
    "calibration_tokens": 256,
    "seq_len": 64,
    "check": "none",
}
ACTIVE = 0.3
"""Of six layers one can stay dense: two are more than this share."""
AUTO = PLAIN | {"active": ACTIVE, "keep_dense": "auto"}


def quiet(stage, done, total):
    pass


def planned(folder, **settings):
    return upcycle.plan(str(folder), **PLAIN | {"keep_dense": "auto"} | settings)


# --- damage ----------------------------------------------------------------------------------


def divergence(dense_BLV, cut_BLV):
    """KL in nats per token, in float64."""
    dense, cut = (each.double().log_softmax(-1) for each in (dense_BLV, cut_BLV))
    return float((dense.exp() * (dense - cut)).sum(-1).mean())


def naive_damage(folder, tokens_BL, kept):
    """Layer by layer, the whole model with the weaker neurons of this layer silenced where they
    enter down_proj."""
    model, hidden = load(folder), {}
    layers = list(model.model.layers)
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, i=i: hidden.__setitem__(i, args[0].flatten(0, 1))
        )
        for i, block in enumerate(layers)
    ]
    dense_BLV = logits(model, tokens_BL)
    for hook in hooks:
        hook.remove()
    damage = []
    for i, block in enumerate(layers):
        down_DF = block.mlp.down_proj.weight.detach()
        energy = [
            float(hidden[i][:, n].square().mean() * down_DF[:, n].square().sum()) for n in range(F)
        ]
        mask_F = torch.zeros(F)
        mask_F[sorted(range(F), key=lambda n, energy=energy: -energy[n])[:kept]] = 1
        hook = block.mlp.down_proj.register_forward_pre_hook(
            lambda _, args, mask_F=mask_F: (args[0] * mask_F,)
        )
        damage.append(divergence(dense_BLV, logits(model, tokens_BL)))
        hook.remove()
    return damage


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "gemma", "granite", "olmo2", "phi3"])
def test_damage_is_that_of_the_whole_model_with_one_ffn_cut(dense, family, tied):
    folder = dense(family, tie_word_embeddings=tied)
    plan = planned(folder, experts=8, top_k=3, shared=0)
    expected = naive_damage(folder, TOKENS_BL, kept=3 * F // 8)
    assert min(expected) > 1e-3
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx(expected, rel=1e-3)


def test_shared_neurons_count_as_kept(dense):
    plan = planned(dense(), experts=5, top_k=2, shared=0.375)
    expected = naive_damage(dense(), TOKENS_BL, kept=5 * F // 8)
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx(expected, rel=1e-3)


def test_weights_below_float32_are_measured_too(dense):
    folder = dense("olmo2", dtype=torch.bfloat16)  # a family of exact rotary angles
    plan = planned(folder, experts=8, top_k=3, shared=0)
    expected = naive_damage(folder, TOKENS_BL, kept=3 * F // 8)
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx(expected, rel=0.02)


def test_no_neuron_cut_is_no_damage(dense):
    plan = planned(dense(), experts=8, top_k=8, shared=0)
    assert measure_damage(plan, TOKENS_BL, quiet) == pytest.approx([0] * LAYERS, abs=1e-5)


def test_fewer_neurons_do_more_damage(dense):
    totals = [
        sum(measure_damage(planned(dense(), experts=8, top_k=k), TOKENS_BL, quiet))
        for k in (1, 3, 6)
    ]
    assert all(more > less for more, less in pairwise(totals))


def test_every_layer_is_announced(dense):
    seen = []
    measure_damage(planned(dense()), TOKENS_BL, lambda *step: seen.append(step))
    assert seen == [("measuring layers", i, LAYERS) for i in range(LAYERS + 1)]


@pytest.mark.parametrize(("seq_len", "used"), [(60, 17), (512, 2), (1024, 1), (1500, 1)])
def test_about_a_thousand_tokens_are_measured_on(dense, monkeypatch, seq_len, used):
    seen = []
    monkeypatch.setattr(
        sensitivity, "measure_damage", lambda _, tokens_BL, __: seen.append(tokens_BL) or [1.0] * 3
    )
    tokens_BL = torch.arange(20 * seq_len).view(20, seq_len)
    assert choose_dense_layers(planned(dense()), tokens_BL, quiet) == ((), [1.0] * 3)
    assert torch.equal(seen[0], tokens_BL[:used])


def test_strongest_are_those_that_put_out_most():
    rng = torch.Generator().manual_seed(0)
    gate_FD, up_FD = torch.randn(2, 16, 4, generator=rng)
    down_DF = torch.randn(4, 16, generator=rng)
    ffn = DenseFFN(gate_FD, up_FD, down_DF, torch.nn.functional.silu)
    x_TD = torch.randn(9, 4, generator=rng)
    alone = [float(ffn.take(torch.tensor([n]))(x_TD).square().sum()) for n in range(16)]
    best = sorted(sorted(range(16), key=lambda n: -alone[n])[:5])
    assert torch.equal(strongest(ffn, x_TD, 5).gate_FD, gate_FD[best])
    assert torch.equal(strongest(ffn, x_TD, 5).down_DF, down_DF[:, best])


# --- the choice ------------------------------------------------------------------------------


def expected_damage(damage, active, dense):
    """What is left with these layers dense, or None if they alone are above the share."""
    layers = len(damage)
    share = (active * layers - len(dense)) / (layers - len(dense))
    if share <= 0:
        return None
    growth = ((1 - share) / (1 - active)) ** sensitivity.DAMAGE_EXPONENT
    return growth * sum(d for i, d in enumerate(damage) if i not in dense)


def candidates(layers, kind):
    """Every set of layers that a target can keep dense, but not all layers."""
    if kind == "any":
        return [c for n in range(layers) for c in combinations(range(layers), n)]
    return [tuple(range(n)) for n in range(layers)] if kind == "prefix" else [()]


@pytest.mark.parametrize("kind", ["any", "prefix", "none"])
@pytest.mark.parametrize("layers", [1, 2, 5, 8])
def test_the_best_layers_are_the_best_of_all_choices(layers, kind):
    rng = random.Random(layers)
    chosen = set()
    for _ in range(40):
        active = rng.uniform(0.1, 0.95)
        damage = [rng.lognormvariate(0, 2) for _ in range(layers)]
        found = best_dense_layers(damage, active, kind)
        chosen.add(len(found))
        totals = {c: expected_damage(damage, active, c) for c in candidates(layers, kind)}
        possible = {c: total for c, total in totals.items() if total is not None}
        assert found in possible
        assert possible[found] == pytest.approx(min(possible.values()))
    assert len(chosen) > 1 or layers < 5 or kind == "none"


@pytest.mark.parametrize(
    ("damage", "active", "kind", "expected"),
    [
        ([1, 1, 50, 1, 1, 1], 0.5, "any", (2,)),
        ([1, 40, 1, 1, 1, 50], 0.5, "any", (1, 5)),
        ([1, 1, 50, 1, 1, 1], 0.5, "none", ()),
        ([50, 1, 1, 1, 1, 1], 0.5, "prefix", (0,)),
        ([1, 50, 1, 1, 1, 1], 0.5, "prefix", (0, 1)),
        ([1, 1, 1, 1, 1, 50], 0.5, "prefix", ()),
        ([1, 1, 1, 1, 1, 1], 0.5, "any", ()),
        ([1, 1, 50, 1, 1, 1], 0.1, "any", ()),  # one layer alone is more than a tenth
        ([0, 0, 0], 0.5, "any", ()),
    ],
)
def test_layers_stay_dense_if_that_pays(damage, active, kind, expected):
    assert best_dense_layers(damage, active, kind) == expected


@pytest.mark.parametrize(
    ("most", "expected"), [(None, (1, 5)), (5, (1, 5)), (2, (1, 5)), (1, (5,)), (0, ())]
)
def test_no_more_layers_stay_dense_than_can(most, expected):
    assert best_dense_layers([1, 40, 1, 1, 1, 50], 0.5, "any", most) == expected


@pytest.mark.parametrize("kind", ["any", "prefix"])
def test_no_layer_need_stay_dense_where_nothing_is_cut(kind):
    assert best_dense_layers([0.0, 0.0, 0.0], 1.0, kind) == ()


# --- conversions -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sensitive(dense, tmp_path_factory):
    """A model in which one layer's FFN puts out a hundred times as much as the others'."""

    def make(layer, family="llama"):
        folder = tmp_path_factory.mktemp("sensitive")
        shutil.copytree(dense(family, num_hidden_layers=DEEP), folder, dirs_exist_ok=True)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("down_proj.weight") and f".{layer}." not in name:
                tensor *= 0.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.mark.parametrize(
    ("family", "layer"), [("llama", 0), ("llama", 2), ("qwen2", DEEP - 1), ("qwen3", 3)]
)
def test_a_sensitive_layer_stays_dense_and_the_share_is_kept(
    sensitive, text, tmp_path, family, layer
):
    settings = AUTO | {"calibration": str(text)}
    done = upcycle.convert(str(sensitive(layer, family)), tmp_path / "out", **settings)
    assert done.plan.spec.dense_layers == (layer,)
    assert done.plan.geometry.expert_size == F // 24
    assert ACTIVE - 1 / 24 < done.plan.active_ffn_ratio <= ACTIVE
    report = read_json(tmp_path / "out" / "upcycle.json")
    assert [each["dense"] for each in report["layers"]] == [i == layer for i in range(DEEP)]
    assert read_json(tmp_path / "out" / "config.json")["mlp_only_layers"] == [layer]
    load(tmp_path / "out")


def test_a_target_that_can_keep_only_the_first_layers_dense_keeps_those(sensitive, text, tmp_path):
    settings = AUTO | {"calibration": str(text), "target": "glm4_moe"}
    for layer, expected in ((0, (0,)), (DEEP - 1, ())):
        out = tmp_path / str(layer)
        plan = upcycle.convert(str(sensitive(layer)), out, **settings).plan
        assert plan.spec.dense_layers == expected
        assert read_json(out / "config.json")["first_k_dense_replace"] == len(expected)
        assert plan.active_ffn_ratio <= ACTIVE


@pytest.mark.parametrize("target", ["mixtral", "granitemoeshared"])
def test_a_target_that_can_keep_none_measures_none(sensitive, text, tmp_path, monkeypatch, target):
    monkeypatch.setattr(conversion, "choose_dense_layers", lambda *_: pytest.fail("measured"))
    settings = AUTO | {"calibration": str(text), "target": target}
    plan = upcycle.convert(str(sensitive(1)), tmp_path / "out", **settings).plan
    assert (plan.target, plan.spec.dense_layers) == (target, ())
    assert plan.active_ffn_ratio == 7 / 24


def test_auto_has_the_bytes_of_naming_the_layers(sensitive, text, tmp_path):
    source, settings = str(sensitive(2)), AUTO | {"calibration": str(text)}
    for place, keep_dense in (("auto", "auto"), ("named", [2])):
        upcycle.convert(source, tmp_path / place, **settings | {"keep_dense": keep_dense})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


def test_auto_with_all_experts_on_keeps_none(dense, text, tmp_path):
    settings = PLAIN | {"keep_dense": "auto", "calibration": str(text), "experts": 8, "top_k": 8}
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.spec.dense_layers == ()


def test_auto_never_keeps_more_than_leaves_experts_to_route(dense, text, tmp_path, monkeypatch):
    """With one layer dense, a token has a quarter of the other two, and that is shared."""
    monkeypatch.setattr(sensitivity, "measure_damage", lambda *_: [9.0, 0.1, 0.1])
    settings = AUTO | {"calibration": str(text), "experts": 6, "shared": 0.25, "active": 0.5}
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.spec.dense_layers == ()
    assert plan.active_ffn_ratio == 0.5


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"experts": 8, "active": 0.5}, (0,)),  # two of eight in the others, if nothing is shared
        ({"experts": 8, "active": 0.4}, ()),  # a tenth would be left
        ({"active": 0.36}, ()),  # as would be a 25th
        ({"active": 0.38}, (0,)),
        ({"experts": 6, "active": 0.5, "shared": 0.25}, ()),
        ({"experts": 8, "top_k": 3, "shared": 0}, (0,)),  # three of eight as ever
    ],
)
@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe"])
def test_auto_keeps_as_many_as_leave_an_expert(
    dense, text, tmp_path, monkeypatch, asked, expected, target
):
    monkeypatch.setattr(sensitivity, "measure_damage", lambda *_: [1e9, 0.1, 0.1])
    settings = PLAIN | {"keep_dense": "auto", "calibration": str(text), "target": target} | asked
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.spec.dense_layers == expected
    if "active" in asked:
        assert plan.active_ffn_ratio <= asked["active"]


def test_named_layers_are_not_measured(dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "choose_dense_layers", lambda *_: pytest.fail("measured"))
    settings = AUTO | {"calibration": str(text), "keep_dense": [1], "active": 0.6}
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.spec.dense_layers == (1,)


def test_copies_are_refused_in_one_sentence(dense):
    with pytest.raises(UpcycleError) as caught:
        upcycle.plan(str(dense()), method="copy", keep_dense="auto")
    assert str(caught.value) == "--keep-dense auto goes with a split: copies do no damage"


def test_copies_by_the_default_recipe_keep_none(dense):
    plan = upcycle.plan(str(dense()), method="copy")
    assert not plan.undecided
    assert plan.spec.dense_layers == ()


# --- resuming --------------------------------------------------------------------------------


def stop(*_):
    raise RuntimeError("stopped")


@pytest.fixture
def started(sensitive, text, tmp_path, monkeypatch):
    """Begins a conversion, stops it where the named function is called, and returns how to go on
    with it."""
    source, settings = str(sensitive(2)), AUTO | {"calibration": str(text)}

    def go_on(out="out", **more):
        return upcycle.convert(source, tmp_path / out, **settings | more).plan

    def start(name):
        with monkeypatch.context() as patch:
            patch.setattr(conversion, name, stop)
            with pytest.raises(RuntimeError, match="stopped"):
                go_on(resume=True)
        return go_on

    return start


def test_a_resumed_run_does_not_measure_twice(started, tmp_path, monkeypatch):
    go_on = started("convert_layer")
    journal = (partial_folder(tmp_path / "out") / "journal.jsonl").read_text().splitlines()
    (record,) = (e["record"] for e in map(json.loads, journal) if "keep dense" in e.get("unit", ""))
    assert record["layers"] == [2]
    assert max(record["damage"]) == record["damage"][2]
    assert len(record["damage"]) == DEEP
    go_on("another")
    monkeypatch.setattr(conversion, "choose_dense_layers", lambda *_: pytest.fail("measured"))
    assert go_on(resume=True).spec.dense_layers == (2,)
    for path in (tmp_path / "another").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_run_stopped_while_it_measures_measures_again(started, monkeypatch):
    go_on, choose, calls = started("choose_dense_layers"), conversion.choose_dense_layers, []
    monkeypatch.setattr(conversion, "choose_dense_layers", lambda *a: calls.append(a) or choose(*a))
    assert go_on(resume=True).spec.dense_layers == (2,)
    assert len(calls) == 1
