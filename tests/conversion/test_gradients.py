"""Gradients that a conversion puts aside, and what plan and methods make of them."""

import pytest
import torch
from reference import load
from tiny import PLAIN_SPLIT
from torch.nn.functional import cross_entropy
from transformers.activations import ACT2FN
from typer.testing import CliRunner

import upcycle
from upcycle import UpcycleError
from upcycle.cli import app
from upcycle.conversion.gradients import loss_gradient, put_gradients_aside
from upcycle.core.importance import taylor_by_text, taylor_by_token
from upcycle.core.types import LayerActivations
from upcycle.models.assemble import dense_ffn
from upcycle.models.stream import HiddenStream

LENGTH = 24
TAYLOR = PLAIN_SPLIT | {"shared_by": "taylor", "seq_len": LENGTH, "calibration_tokens": 96}
TOKENS_BL = torch.randint(0, 256, (4, LENGTH), generator=torch.Generator().manual_seed(6))


class Kept:
    """A workspace in memory."""

    def __init__(self):
        self.records, self.aside = {}, {}

    def keep(self, unit, tensors):
        self.aside[unit] = tensors

    def kept(self, unit):
        return self.aside[unit]

    def done(self, unit, record):
        self.records[unit] = record


def quiet(*step):
    pass


def put_aside(folder, tokens_BL=TOKENS_BL):
    plan, workspace = upcycle.plan(str(folder), **TAYLOR), Kept()
    put_gradients_aside(plan, tokens_BL, workspace, quiet)
    return plan, workspace


def differentiated(folder, layer, tokens_BL=TOKENS_BL):
    """What methods of this layer are given."""
    plan, workspace = put_aside(folder, tokens_BL)
    source, act = plan.source, ACT2FN[plan.source.arch.fields["hidden_act"]]
    outer = source.read(source.embedding_names())
    stream = HiddenStream(source.config, outer, tokens_BL, plan.device)
    for before in range(layer):
        stream.through(before, source.read_layer(before))
    x_TD, _ = stream.attend(layer, source.read_layer(layer))
    ffn = dense_ffn(source.canonical(source.read_layer(layer)), act)
    return LayerActivations(ffn, x_TD, loss=loss_gradient(plan, workspace, layer))


def total_loss(model, tokens_BL, reduce=torch.sum):
    logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits.double()
    nats = cross_entropy(logits_BLV[:, :-1].mT, tokens_BL[:, 1:], reduction="none")
    return reduce(nats)


@pytest.mark.parametrize("family", ["llama", "granite", "gemma"])
@pytest.mark.parametrize("layer", [0, 2])
def test_scaling_a_neurons_output_changes_the_loss_by_its_signed_score(dense, family, layer):
    """MoEBERT's importance, before absolute values are taken, is the loss's first order."""
    activations = differentiated(dense(family), layer, TOKENS_BL[:1])
    signed_F = torch.cat([effect_tF for _, effect_tF in activations.effects()]).sum(0)
    model, epsilon = load(dense(family)).double(), 1e-4
    down_DF = model.model.layers[layer].mlp.down_proj.weight
    for neuron in signed_F.abs().topk(4).indices.tolist():
        kept, losses = down_DF[:, neuron].clone(), []
        for scale in (1 - epsilon, 1 + epsilon):
            with torch.no_grad():
                down_DF[:, neuron] = scale * kept
                losses.append(float(total_loss(model, TOKENS_BL[:1])))
                down_DF[:, neuron] = kept
        slope = (losses[0] - losses[1]) / (2 * epsilon)
        assert slope == pytest.approx(-float(signed_F[neuron]), rel=1e-2)


def test_importance_is_autograds_on_the_whole_model(dense):
    """MoEBERT's of a text is the column's w ∂loss/∂w, in absolute value; LLaMA-MoE's is h ∂loss/∂h
    token by token."""
    model, hidden = load(dense()), []
    mlp = model.model.layers[1].mlp
    mlp.down_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    by_text_F, by_token_F = torch.zeros(2, mlp.down_proj.in_features)
    for ids_L in TOKENS_BL:
        loss = total_loss(model, ids_L[None])
        of_h, of_w = torch.autograd.grad(loss, [hidden[-1], mlp.down_proj.weight])
        by_token_F += (hidden[-1] * of_h).abs().flatten(0, 1).sum(0).detach()
        by_text_F += (mlp.down_proj.weight * of_w).sum(0).abs().detach()
    activations = differentiated(dense(), 1)
    torch.testing.assert_close(taylor_by_token(activations), by_token_F, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(taylor_by_text(activations), by_text_F, rtol=1e-3, atol=1e-3)


def test_a_dead_neuron_has_no_importance(dense):
    activations = differentiated(dense(), 1)
    activations.ffn.up_FD[7] = 0
    for score in (taylor_by_token, taylor_by_text):
        assert score(activations)[7] == 0
        assert (score(activations) > 0).sum() == activations.ffn.num_neurons - 1


def test_gradients_of_some_sequences_are_theirs_in_that_order(dense):
    plan, workspace = put_aside(dense())
    rows = torch.tensor([3, 0])
    whole, some = loss_gradient(plan, workspace, 1), loss_gradient(plan, workspace, 1, rows)
    expected = torch.cat([whole.y_TD[3 * LENGTH :], whole.y_TD[:LENGTH]])
    assert torch.equal(some.y_TD, expected)
    assert some.text_T.tolist() == [0] * LENGTH + [1] * LENGTH
    assert whole.text_T.tolist() == [text for text in range(4) for _ in range(LENGTH)]


def test_a_conversion_gives_methods_the_dense_models_gradients(dense, tmp_path, monkeypatch):
    """Though layers are fitted on converted ones; and only layers that are converted."""
    seen = []

    def convert_layer(plan, layer, ffn, activations, *rest):
        seen.append((layer, activations.loss))
        return made(plan, layer, ffn, activations, *rest)

    from upcycle.conversion import run, writing

    made, put = writing.convert_layer, run.put_gradients_aside
    given = []
    monkeypatch.setattr(writing, "convert_layer", convert_layer)
    monkeypatch.setattr(
        run, "put_gradients_aside", lambda p, ids, *rest: given.append(ids) or put(p, ids, *rest)
    )
    settings = TAYLOR | {"sequential": True, "keep_dense": [1], "check": "none"}
    upcycle.convert(str(dense()), tmp_path / "out", **settings)
    plan, workspace = put_aside(dense(), given[0])
    assert [layer for layer, _ in seen] == [0, 2]
    for layer, loss in seen:
        assert torch.equal(loss.y_TD, loss_gradient(plan, workspace, layer).y_TD)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"shared_by": "energy"}, False),
        ({"shared_by": "taylor"}, True),
        ({"shared_by": "taylor", "shared": 0}, False),  # no neuron is shared
        ({"shared_by": {"name": "consensus", "importance": "taylor"}}, True),
        ({"split": "common_neurons", "shared": 0}, True),
        ({"split": {"name": "sharing_inner", "importance": "taylor"}}, True),
        ({"split": "sharing_inner"}, False),
        ({"method": "copy", "shared_by": "taylor"}, False),
    ],
)
def test_a_plan_goes_back_only_where_a_method_looks_at_gradients(dense, settings, needed):
    plan = upcycle.plan(str(dense()), **TAYLOR | {"shared_by": "energy"} | settings)
    assert plan.needs_gradients == needed
    assert (plan.gradient_bytes > 0) == needed


def test_without_gradients_nothing_is_taken_up(dense):
    plan = upcycle.plan(str(dense()), **TAYLOR | {"shared_by": "energy"})
    assert loss_gradient(plan, Kept(), 0) is None


def test_the_plan_says_what_a_backward_pass_holds(dense):
    flags = ["--calibration-tokens", "4096", "--calibration", "builtin"]
    command = ["plan", str(dense()), *flags]
    shown = CliRunner().invoke(app, [*command, "--set", "shared_by=taylor"])
    words = " ".join(shown.stdout.replace("│", " ").split())
    # Three layers of 4,096 tokens, 48 numbers of four bytes each.
    expected = "one layer's weights in memory at a time, 2.4 MB put aside on the disk"
    assert f"backward pass through the dense model, {expected}" in words
    assert "backward" not in CliRunner().invoke(app, command).stdout


def test_a_gradient_that_overflows_is_refused_by_the_layer(dense, monkeypatch):
    back = HiddenStream.back
    monkeypatch.setattr(HiddenStream, "back", lambda *args, **kept: back(*args, **kept) * torch.inf)
    with pytest.raises(UpcycleError, match="gradient overflows in layer 2 on the calibration text"):
        put_aside(dense())


SHARING = {"num_kv_shared_layers": 1, "hidden_size_per_layer_input": 8}


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        ("eurobert", {}, "is an encoder, which has no loss of the next token"),
        ("gemma4_text", SHARING, "has layers that share keys and values"),
    ],
)
def test_a_model_without_a_way_back_is_refused(dense, family, fields, why):
    folder = str(dense(family, **fields))
    request = {"split": {"name": "token_clusters", "importance": "taylor"}, "shared": 0}
    settings = TAYLOR | {"shared_by": "energy"}
    with pytest.raises(
        UpcycleError, match=f"split=.*token_clusters.* needs a backward pass.*{why}"
    ):
        upcycle.plan(folder, **settings | request)
    upcycle.plan(folder, **settings | {"shared": 0})
    request["split"]["importance"] = "output"
    upcycle.plan(folder, **settings | request)
    with pytest.raises(UpcycleError, match=f"{why}.*: choose another$"):
        upcycle.plan(folder, **settings | {"shared": 0, "split": "common_neurons"})
