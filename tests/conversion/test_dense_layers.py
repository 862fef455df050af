"""Which layers stay dense: a trial against the conversion that it stands for, the choice by made-up
trials and by damage against all choices, and a conversion that makes it."""

import json
import math
import random
import shutil
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from reference import load, logits, read_json
from safetensors.torch import load_file, save_file
from tiny import PLAIN_SPLIT, SIZES

import upcycle
from upcycle import UpcycleError
from upcycle.conversion import dense_layers, writing
from upcycle.conversion import run as conversion
from upcycle.conversion.dense_layers import (
    Sample,
    best_dense_layers,
    choose_dense_layers,
    try_layers,
)
from upcycle.conversion.planning import make_plan
from upcycle.models import own_text as writer
from upcycle.models.record.conversion import Trial
from upcycle.models.workspace import partial_folder

F, LAYERS = SIZES["intermediate_size"], SIZES["num_hidden_layers"]
DEEP = 6
PLAIN = PLAIN_SPLIT | {
    "experts": None,
    "top_k": None,
    "split": "random",
    "router": "normal",
    "sequential": True,
    "calibration_tokens": 256,
    "seq_len": 64,
    "check": "none",
    "keep_dense": "auto",
}
ACTIVE = 0.3
"""Of six layers one can stay dense: two are more than this share."""
AUTO = PLAIN | {"active": ACTIVE, "calibration": "self"}


def quiet(stage, done, total):
    pass


# --- a trial ---------------------------------------------------------------------------------


def losses(folder, tokens_BL):
    """Each sequence's loss by transformers."""
    log_probs_BLV = logits(load(folder), tokens_BL).double().log_softmax(-1)
    targets_BL1 = tokens_BL[:, 1:, None]
    return (-log_probs_BLV[:, :-1].gather(2, targets_BL1)[..., 0]).mean(1).tolist()


REFIT = {"router": "ridge", "compensate": {"name": "least_squares", "feedback": 0}}


@pytest.mark.parametrize(
    ("family", "layers", "settings"),
    [
        ("llama", (), REFIT | {"active": 0.5}),
        ("llama", (1,), REFIT | {"active": 0.5, "router_spread": 0.3}),
        ("llama", (0, 2), {"experts": 8, "top_k": 3, "target": "qwen2_moe"}),
        ("qwen2", (0,), REFIT | {"experts": 6, "top_k": 2, "target": "glm4_moe"}),
        ("olmo2", (), REFIT | {"active": 0.6}),
        ("granite", (), REFIT | {"active": 0.5}),
        ("llama", (1,), {"method": "prune", "experts": 3, "active": 0.6, "router": "membership"}),
    ],
)
def test_a_trial_is_the_conversion_that_it_stands_for(
    dense, text, tmp_path, family, layers, settings
):
    settings = PLAIN | {"calibration": str(text), "calibration_tokens": 512} | settings
    plan = upcycle.plan(str(dense(family)), **settings)
    fit_BL = conversion._tokens(plan, quiet).fit_BL
    held_BL = torch.randint(0, 256, (3, 64), generator=torch.Generator().manual_seed(3))
    dense_losses = losses(dense(family), held_BL)
    sample = Sample(fit_BL, held_BL, ("a", "b", "a"))
    trial = try_layers(plan, layers, sample, dense_losses)
    named = settings | {"keep_dense": list(layers), "target": plan.target}
    upcycle.convert(str(dense(family)), tmp_path / "out", **named)
    worse = [
        moe - alone
        for moe, alone in zip(losses(tmp_path / "out", held_BL), dense_losses, strict=True)
    ]
    assert trial.layers == layers
    # Rounding sends a token that is between two experts to either.
    assert trial.ratios == pytest.approx(
        {"a": math.exp((worse[0] + worse[2]) / 2), "b": math.exp(worse[1])}, rel=0.01
    )
    assert max(map(abs, worse)) > 0.05  # so that a mix-up would show


@pytest.mark.parametrize("family", ["llama", "gemma", "granite"])
def test_losses_of_the_dense_model_are_its_own(dense, family):
    plan = upcycle.plan(str(dense(family)), **PLAIN)
    tokens_BL = torch.randint(0, 256, (5, 40), generator=torch.Generator().manual_seed(4))
    stream = dense_layers._stream_dense(plan, tokens_BL)
    found = dense_layers._losses(stream, plan, 3)
    assert found == pytest.approx(losses(dense(family), tokens_BL)[2:], rel=1e-5)


def test_a_trial_of_more_than_can_be_paid_for_is_refused(dense, text):
    plan = upcycle.plan(str(dense()), **AUTO | {"calibration": str(text)})
    tokens_BL = torch.zeros(2, 64, dtype=torch.int64)
    with pytest.raises(UpcycleError, match=r"`active=0\.3`, with 2 of 3 layers dense"):
        try_layers(plan, (0, 1), Sample(tokens_BL, tokens_BL, ("a", "a")), [1.0, 1.0])


def test_mean_and_worst_of_a_trial():
    trial = Trial((), {"a": 1.0, "b": 4.0, "c": 2.0})
    assert (trial.mean, trial.worst) == (pytest.approx(2.0), 4.0)


# --- what it is tried on ---------------------------------------------------------------------


def numbered(rows, texts, seq_len):
    """Sequences that hold their text and their place in it."""
    return torch.tensor([[row % texts * 1000 + row // texts] * seq_len for row in range(rows)])


def no_gradients(layer, rows):
    return None


@pytest.mark.parametrize(
    ("rows", "texts", "seq_len", "fit", "held"),
    [
        (64, 1, 512, 4, 2),
        (64, 2, 512, 2, 1),
        (63, 3, 512, 1, 1),  # a third of 2048 and 1024 tokens
        (64, 2, 64, 16, 8),
        (16, 5, 512, 1, 1),
        (512, 1, 4096, 1, 1),  # one is more than all that is wanted
    ],
)
def test_a_sample_takes_of_every_text_from_all_over_it(rows, texts, seq_len, fit, held):
    names = [f"text {i}" for i in range(texts)]
    fit_BL = numbered(rows, texts, seq_len)
    sample = dense_layers._sample(fit_BL, names, no_gradients)
    assert sample.names == tuple(name for name in names for _ in range(held))
    for place in range(texts):
        fitted, kept = (
            [int(row[0]) % 1000 for row in part if int(row[0]) // 1000 == place]
            for part in (sample.fit_BL, sample.held_BL)
        )
        assert (len(fitted), len(kept)) == (fit, held)
        own = len(fit_BL[place::texts])
        assert not set(fitted) & set(kept)
        assert {min(fitted + kept), max(fitted + kept)} == {0, own - 1}
        assert [names.index(name) * 1000 for name in sample.names] == [
            int(row[0]) // 1000 * 1000 for row in sample.held_BL
        ]


def test_a_sample_looks_at_the_gradients_of_its_own_sequences():
    fit_BL, asked = numbered(64, 2, 512), []
    sample = dense_layers._sample(fit_BL, ["a", "b"], lambda layer, rows: asked.append(rows))
    sample.loss(0)
    assert torch.equal(fit_BL[asked[0]], sample.fit_BL)


def test_a_sample_of_few_sequences_leaves_none_out():
    for rows in (1, 2, 3):
        sample = dense_layers._sample(numbered(rows, 2, 512), ["a", "b"], no_gradients)
        held = sample.held_BL[:, 0].tolist()
        assert held == [0, 1000][:rows]
        assert sample.names == ("a", "b")[:rows]
        # Of one sequence each nothing else is there to fit on.
        assert sample.fit_BL[:, 0].tolist() == (held if rows < 3 else [1])


@pytest.mark.parametrize(
    ("rows", "seq_len", "pieces"),
    [(4, 512, 4), (2, 1024, 4), (30, 60, 4), (1, 50, 1), (1, 128, 2), (1, 200, 3)],
)
def test_damage_is_measured_on_short_pieces_of_all_sequences(rows, seq_len, pieces):
    tokens_BL = torch.arange(rows * seq_len).view(rows, seq_len)
    cut_BL = dense_layers._cut(tokens_BL, 0)
    assert cut_BL.shape == (pieces, min(seq_len, dense_layers.DAMAGE_LENGTH))
    assert (cut_BL.diff(dim=1) == 1).all()
    sources = [int(piece[0]) // seq_len for piece in cut_BL]
    assert sources == sorted(sources)
    assert {sources[0], sources[-1]} == {0, rows - 1}
    assert len({int(piece[0]) for piece in cut_BL}) == pieces


# --- the choice by trials --------------------------------------------------------------------


def made_up(worth):
    """An attempt that finds these ratios, or that a choice can't be carried out; and what was
    tried."""
    tried = []

    def attempt(layers):
        tried.append(layers)
        ratios = worth[layers]
        if ratios is None:
            return None
        return Trial(layers, ratios if isinstance(ratios, dict) else {"a": ratios})

    return attempt, tried


@pytest.mark.parametrize(
    ("worth", "expected"),
    [
        ({(): 2.0, (2,): 1.5, (0, 5): 1.6}, (2,)),
        ({(): 2.0, (2,): 1.97, (0, 5): 1.97}, ()),  # 2 % better it would have to be
        ({(): 2.0, (2,): 1.96, (0, 5): 1.95}, (2,)),
        ({(): 2.0, (2,): 1.97, (0, 5): 1.95}, (0, 5)),
        ({(): 2.0, (2,): 1.5, (0, 5): 1.4}, (0, 5)),
        ({(): 2.0, (2,): 1.5, (0, 5): None}, (2,)),
        ({(): 2.0, (2,): None, (0, 5): 2.5}, ()),
        # The mean counts: 2.0 before, then 1.73 with a worse worst text.
        ({(): {"a": 2.0, "b": 2.0}, (2,): {"a": 3.0, "b": 1.0}, (0, 5): 2.0}, (2,)),
    ],
)
def test_at_a_fixed_active_share_the_best_mean_wins(dense, worth, expected):
    plan = upcycle.plan(str(dense(num_hidden_layers=DEEP)), **PLAIN | {"active": 0.5})
    attempt, tried = made_up(worth)
    best = dense_layers._most_worth(plan, [1, 1, 50, 1, 1, 1], attempt)
    assert best.layers == expected
    assert tried == [(), (2,), (0, 5)]


def test_where_only_the_first_layers_can_be_dense_one_is_tried(dense):
    settings = PLAIN | {"active": 0.5, "target": "glm4_moe"}
    plan = upcycle.plan(str(dense(num_hidden_layers=DEEP)), **settings)
    attempt, tried = made_up({(): 2.0, (0,): 1.9, (0, 1): 1.5})
    assert dense_layers._most_worth(plan, [1, 50, 1, 1, 1, 1], attempt).layers == (0, 1)
    assert tried == [(), (0,), (0, 1)]


KINDS = {"any": "qwen2_moe", "prefix": "glm4_moe", "ends": "ernie4_5_moe"}


@pytest.mark.parametrize(
    ("worth", "expected", "kind"),
    [
        ({(): 2.0, (0, 5): 1.9, (1, 3): 1.8}, (1, 3), "any"),
        ({(): 2.0, (0, 5): 1.8, (1, 3): 1.9}, (0, 5), "any"),
        ({(): 2.0, (0, 5): 1.93, (1, 3): 1.95}, (), "any"),  # two must be worth 4 %
        ({(): 2.0, (0, 5): None, (1, 3): 1.8}, (1, 3), "any"),
        ({(): 2.0, (0, 5): 1.8, (1, 3): None}, (0, 5), "any"),
        ({(): 2.0, (0,): 1.9, (0, 1): 1.8}, (0, 1), "prefix"),
        ({(): 2.0, (0,): 1.9, (0, 1): 1.88}, (0,), "prefix"),
        ({(): 2.0, (0,): 1.97, (0, 1): 1.94}, (), "prefix"),  # not worth its memory
        # The worst text counts, though the mean is worse.
        ({(): {"a": 2.0, "b": 1.0}, (0, 5): 2.1, (1, 3): 1.9}, (1, 3), "any"),
        # From the ends inwards: the first layer, equal to the last, then the second.
        ({(): 2.0, (0, 1): 1.8, (0, 5): 1.9}, (0, 1), "ends"),
    ],
)
def test_beside_a_fixed_top_k_few_layers_stay_dense_that_better_the_worst_text(
    worth, expected, kind
):
    plan = SimpleNamespace(target=KINDS[kind])
    attempt, tried = made_up(worth)
    assert dense_layers._few(plan, [1, 5, 1, 9, 1, 1], attempt).layers == expected
    assert tried == list(worth)


@pytest.mark.parametrize(
    ("layers", "many"),
    [(24, (12, 22)), (29, (12, 22)), (30, (0, 22, 29)), (40, (0, 12, 22, 39))],
)
def test_one_layer_in_ten_is_the_most_that_nobody_pays_for(layers, many):
    """With the first and the last among them, if there is room for others; each must better the
    worst text by 2 %."""
    damage = [1.0] * layers
    damage[12], damage[22] = 5.0, 9.0
    plan, ends = SimpleNamespace(target="qwen2_moe"), (0, layers - 1)
    more = 1.02 ** (len(many) - len(ends))
    for gain, expected in ((1.001, many), (0.999, ends)):
        attempt, tried = made_up({(): 2.0, ends: 1.8, many: 1.8 / more / gain})
        assert dense_layers._few(plan, damage, attempt).layers == expected
        assert tried == [(), *sorted([ends, many], key=lambda c: (len(c), c))]


@pytest.mark.parametrize(
    ("settings", "proposed"),
    [({"active": 0.5}, (1,)), ({"experts": 8, "top_k": 3}, (0, 1))],
    ids=str,
)
def test_all_trials_are_reported_and_none_is_made_twice(
    dense, text, monkeypatch, settings, proposed
):
    calls, steps = [], []

    def tried(plan, layers, sample, dense_losses):
        calls.append(layers)
        if layers == (0, 2):
            raise UpcycleError("too many")
        return Trial(layers, {"a": 2.0 - len(layers) / 2})

    monkeypatch.setattr(dense_layers, "try_layers", tried)
    monkeypatch.setattr(dense_layers, "measure_damage", lambda *_: [0.1, 9.0, 0.1])
    plan = upcycle.plan(str(dense()), **PLAIN | {"calibration": str(text)} | settings)
    fit_BL = conversion._tokens(plan, quiet).fit_BL
    chosen = choose_dense_layers(plan, fit_BL, (), no_gradients, lambda *step: steps.append(step))
    assert chosen.layers == proposed
    assert chosen.damage == [0.1, 9.0, 0.1]
    assert [trial.layers for trial in chosen.trials] == [(), proposed]
    assert len(set(calls)) == len(calls) == 3
    assert steps[0] == ("trying dense layers", 0, 1)
    assert steps[-1] == ("trying dense layers", 2, 2)


# --- the choice by damage --------------------------------------------------------------------


def expected_damage(damage, active, dense):
    """What is left with these layers dense, or None if they alone are above the share."""
    layers = len(damage)
    share = (active * layers - len(dense)) / (layers - len(dense))
    if share <= 0:
        return None
    growth = ((1 - share) / (1 - active)) ** dense_layers.DAMAGE_EXPONENT
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


@pytest.mark.parametrize(("most", "expected"), [(None, (1, 5)), (2, (1, 5)), (1, (5,)), (0, ())])
def test_no_more_stay_dense_than_leave_experts_to_the_others(most, expected):
    assert best_dense_layers([1, 40, 1, 1, 1, 50], 0.5, "any", most) == expected


@pytest.mark.parametrize("kind", ["any", "prefix"])
def test_no_layer_need_stay_dense_where_nothing_is_cut(kind):
    assert best_dense_layers([0.0, 0.0, 0.0], 1.0, kind) == ()


# --- conversions -----------------------------------------------------------------------------


@pytest.fixture
def own_text(monkeypatch):
    """Models write little, and hardly begin with text of ours."""
    monkeypatch.setattr(writer, "openers", lambda kind: list("abcdefgh"))
    monkeypatch.setattr(writer, "paragraphs", lambda folder: {"en": ["one two"]})
    monkeypatch.setattr(writer, "LENGTH", 48)


@pytest.fixture(scope="module")
def sensitive(dense, tmp_path_factory):
    """A model in which one layer's FFN puts out a hundred times as much as the others'. On text of
    its own, that is: on any other a random model is as good when it is damaged."""

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


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("qwen2", DEEP - 1), ("qwen3", 3)])
def test_a_sensitive_layer_stays_dense_and_the_share_is_kept(
    sensitive, own_text, tmp_path, family, layer
):
    done = upcycle.convert(str(sensitive(layer, family)), tmp_path / "out", **AUTO)
    assert done.plan.spec.dense_layers == (layer,)
    assert done.plan.design.geometry.expert_size == F // 24
    assert ACTIVE - 1 / 24 < done.plan.active_ffn_ratio <= ACTIVE
    report = read_json(tmp_path / "out" / "upcycle.json")
    assert [each["dense"] for each in report["layers"]] == [i == layer for i in range(DEEP)]
    assert read_json(tmp_path / "out" / "config.json")["mlp_only_layers"] == [layer]
    load(tmp_path / "out")


def test_a_target_that_can_keep_only_the_first_layers_dense_keeps_those(
    sensitive, own_text, tmp_path
):
    settings = AUTO | {"target": "glm4_moe"}
    for layer, expected in ((0, (0,)), (DEEP - 1, ())):
        out = tmp_path / str(layer)
        plan = upcycle.convert(str(sensitive(layer)), out, **settings).plan
        assert plan.spec.dense_layers == expected
        assert read_json(out / "config.json")["first_k_dense_replace"] == len(expected)
        assert plan.active_ffn_ratio <= ACTIVE


@pytest.mark.parametrize("target", ["mixtral", "granitemoeshared"])
def test_a_target_that_can_keep_none_keeps_none(sensitive, text, tmp_path, monkeypatch, target):
    monkeypatch.setattr(conversion, "choose_dense_layers", lambda *_: pytest.fail("measured"))
    settings = AUTO | {"calibration": str(text), "target": target}
    plan = upcycle.convert(str(sensitive(1)), tmp_path / "out", **settings).plan
    assert (plan.target, plan.spec.dense_layers) == (target, ())
    assert plan.active_ffn_ratio == 7 / 24


def test_auto_has_the_bytes_of_naming_the_layers(sensitive, own_text, tmp_path):
    source = str(sensitive(0))
    for place, keep_dense in (("auto", "auto"), ("named", [0])):
        upcycle.convert(source, tmp_path / place, **AUTO | {"keep_dense": keep_dense})
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "auto" / name).read_bytes() == (tmp_path / "named" / name).read_bytes()


def test_auto_with_all_experts_on_keeps_none(dense, text, tmp_path):
    settings = PLAIN | {"calibration": str(text), "experts": 8, "top_k": 8}
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.spec.dense_layers == ()


@pytest.mark.parametrize("settings", [{"active": 0.5}, {"experts": 8, "top_k": 3}], ids=str)
def test_the_only_layer_does_not_stay_dense(dense, text, tmp_path, settings):
    settings = PLAIN | {"calibration": str(text)} | settings
    plan = upcycle.convert(str(dense(num_hidden_layers=1)), tmp_path / "out", **settings).plan
    assert plan.spec.dense_layers == ()


def test_what_can_not_be_converted_at_all_is_left_to_the_conversion_to_say(
    dense, text, tmp_path, monkeypatch
):
    """As weights that are too large for float16: no trial comes to its end."""

    def refuse(*_):
        raise UpcycleError("overflows")

    monkeypatch.setattr(dense_layers, "try_layers", refuse)
    settings = PLAIN | {"calibration": str(text), "active": 0.5}
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.spec.dense_layers == ()
    assert read_json(tmp_path / "out" / "upcycle.json")["dense_layers"]["trials"] == []


@pytest.fixture
def the_more_the_better(monkeypatch):
    """Trials find that each dense layer helps, the first one most."""

    def tried(plan, layers, sample, dense_losses):
        decided = {"keep_dense": layers, "target": plan.target}
        make_plan(plan.source, plan.request.model_copy(update=decided))
        return Trial(layers, {"a": 9.0 - len(layers)})

    monkeypatch.setattr(dense_layers, "try_layers", tried)
    monkeypatch.setattr(dense_layers, "measure_damage", lambda *_: [1e9, 0.1, 0.1])


@pytest.mark.parametrize(
    ("target", "asked", "expected"),
    [
        ("qwen2_moe", {"active": 0.36}, ()),  # a 25th would be left
        ("qwen2_moe", {"active": 0.38}, (0,)),
        ("qwen2_moe", {"experts": 6, "active": 0.5, "shared": 0.25}, ()),
        ("glm4_moe", {"experts": 6, "active": 0.5, "shared": 0.25}, ()),
        ("qwen2_moe", {"experts": 8, "top_k": 3, "shared": 0}, (0, 1)),  # three of eight as ever
        ("glm4_moe", {"experts": 8, "top_k": 3, "shared": 0}, (0, 1)),
    ],
)
def test_auto_keeps_as_many_as_leave_an_expert(
    dense, text, tmp_path, the_more_the_better, target, asked, expected
):
    settings = PLAIN | {"calibration": str(text), "target": target} | asked
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
    assert str(caught.value) == "`keep_dense=auto` goes with a split: copies do no damage"


def test_copies_by_the_default_recipe_keep_none(dense):
    plan = upcycle.plan(str(dense()), method="copy")
    assert not plan.undecided
    assert plan.spec.dense_layers == ()


# --- resuming --------------------------------------------------------------------------------


def stop(*_):
    raise RuntimeError("stopped")


@pytest.fixture
def started(sensitive, own_text, tmp_path, monkeypatch):
    """Begins a conversion, stops it where the named function is called, and returns how to go on
    with it."""
    source = str(sensitive(0))

    def go_on(out="out", **more):
        return upcycle.convert(source, tmp_path / out, **AUTO | more).plan

    def start(module, name):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(RuntimeError, match="stopped"):
                go_on(resume=True)
        return go_on

    return start


def test_a_resumed_run_does_not_measure_twice(started, tmp_path, monkeypatch):
    go_on = started(writing, "convert_layer")
    journal = (partial_folder(tmp_path / "out") / "journal.jsonl").read_text().splitlines()
    (record,) = (e["record"] for e in map(json.loads, journal) if "keep dense" in e.get("unit", ""))
    assert record["layers"] == [0]
    assert max(record["damage"]) == record["damage"][0]
    assert len(record["damage"]) == DEEP
    assert [0] in [trial["layers"] for trial in record["trials"]]
    go_on("another")
    monkeypatch.setattr(conversion, "choose_dense_layers", lambda *_: pytest.fail("measured"))
    assert go_on(resume=True).spec.dense_layers == (0,)
    for path in (tmp_path / "another").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_run_stopped_while_it_measures_measures_again(started, monkeypatch):
    go_on = started(conversion, "choose_dense_layers")
    choose, calls = conversion.choose_dense_layers, []
    monkeypatch.setattr(conversion, "choose_dense_layers", lambda *a: calls.append(a) or choose(*a))
    assert go_on(resume=True).spec.dense_layers == (0,)
    assert len(calls) == 1


def test_dense_layers_from_the_ends_inwards():
    """The more damaged of the outermost two, though one within would be worse."""
    damage = [1.0, 9.0, 9.0, 1.0, 3.0, 2.0]
    assert dense_layers._by_damage(damage, "ends") == [5, 4, 0, 1, 2, 3]
    assert dense_layers._by_damage(damage, "ends", (0, 5)) == [0, 5, 1, 2, 4, 3]
