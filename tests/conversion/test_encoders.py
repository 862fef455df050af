"""Encoders: every token sees all others, and hidden states are what the model is for."""

import json
import shutil

import pytest
import torch
from reference import TOKENS, TOLERANCE, gap, load_all_on, logits, read_json, weights
from safetensors.torch import save_file
from tiny import PLAIN_SPLIT, make_dense, make_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import upcycle
from upcycle.cli import app
from upcycle.console.conversion import show_conversion
from upcycle.console.listing import show_inspection
from upcycle.console.output import out
from upcycle.conversion.inspection import inspect_model
from upcycle.core.errors import UpcycleError
from upcycle.evaluation.encoders import evaluate_any, summary_of
from upcycle.evaluation.run import evaluate
from upcycle.finetune.run import finetune
from upcycle.models.calibration import calibration
from upcycle.models.opening import open_source
from upcycle.models.record.check import EncoderReport
from upcycle.models.record.file import read_record
from upcycle.models.stream import HiddenStream
from upcycle.models.tokens import open_reader

SPLIT = {"experts": 8, "top_k": 3, "shared": 0}
COPY = {"method": "copy", "experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    """Written as sentence-transformers writes an encoder: without a head, and without `model.`."""
    folder = make_dense(tmp_path_factory.mktemp("headless"), "eurobert")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert not any(name.startswith(("model.", "lm_head")) for name in weights(folder))
    return folder


@torch.no_grad()
def hidden(folder, mask=None, **settings):
    """Last hidden states [2, L, D] by AutoModel, and what found no place in the model."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **settings)
    assert not info["missing_keys"]
    found = model.eval()(input_ids=TOKENS, attention_mask=mask).last_hidden_state
    return found, set(info["unexpected_keys"])


def sees_what_follows(model):
    """Whether the first tokens' logits change with the last token."""
    other = TOKENS.clone()
    other[:, -1] = (other[:, -1] + 1) % 256
    return gap(logits(model)[:, :4], logits(model, other)[:, :4]) > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("target", ["mixtral", "qwen2_moe", "glm4_moe", "granitemoeshared"])
def test_hidden_states_are_the_dense_models_beside_padding_too(dense, moe, target, attention):
    source = dense("eurobert")
    out = moe(source, target=target, **COPY)
    mask = torch.ones_like(TOKENS)
    mask[1, 25:] = 0
    for each in (None, mask):
        expected, _ = hidden(source, each)
        found, unexpected = hidden(out, each, attn_implementation=attention)
        seen = slice(None) if each is None else each.bool()
        assert gap(found[seen], expected[seen]) < TOLERANCE["mean"]
        assert unexpected == {"lm_head.weight"}


@pytest.mark.parametrize("settings", [COPY, SPLIT], ids=["copy", "split"])
def test_without_a_head_it_is_the_same_encoder(headless, moe, settings):
    out = moe(headless, target="mixtral", **settings)
    assert read_json(out / "config.json")["architectures"] == ["MixtralModel"]
    assert "lm_head.weight" not in weights(out)
    every = {} if settings is COPY else {"num_experts_per_tok": 8}
    model, info = AutoModel.from_pretrained(out, output_loading_info=True, **every)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if settings is SPLIT:
        for layer in model.layers:
            layer.mlp.experts.down_proj.data *= 8 / 3
    with torch.no_grad():
        found = model.eval()(input_ids=TOKENS).last_hidden_state
    assert gap(found, hidden(headless)[0]) < TOLERANCE["mean" if settings is COPY else "sum"]


@pytest.mark.parametrize(("family", "fields"), [("llama", {}), ("mistral", {"sliding_window": 20})])
def test_decoder_that_sees_both_sides_goes_on_seeing_them(dense, moe, family, fields):
    """By the switch in config.json that transformers' masks heed; a window reaches both ways."""
    source = dense(family, is_causal=False, **fields)
    dense_model = AutoModelForCausalLM.from_pretrained(source)
    assert sees_what_follows(dense_model)
    out = moe(source, target="qwen2_moe", **SPLIT)
    config = read_json(out / "config.json")
    assert (config["is_causal"], config["use_cache"]) == (False, False)
    model = load_all_on(out)
    assert gap(logits(model), logits(dense_model)) < TOLERANCE["sum"]
    assert sees_what_follows(model)


def test_decoder_says_nothing_of_it(dense, moe):
    assert "is_causal" not in read_json(moe(dense(), target="mixtral", **COPY) / "config.json")


@pytest.mark.parametrize("family", ["eurobert", "llama"])
def test_calibration_tokens_see_both_sides(dense, family):
    """The stream's hidden states are those that transformers has after each layer."""
    fields = {} if family == "eurobert" else {"is_causal": False}
    source = open_source(str(dense(family, **fields)))
    with torch.no_grad():
        model = AutoModel.from_pretrained(source.folder)
        expected = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    outer = source.read(source.outer_names())
    stream = HiddenStream(source.config, outer, TOKENS, torch.device("cpu"))
    for layer in range(2):
        stream.through(layer, source.read_layer(layer))
        assert gap(stream.entering(), expected[layer + 1].flatten(0, 1)) < 1e-5


def test_windows_begin_and_end_as_the_tokenizer_has_it(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("ab cd")
    text = str(tmp_path / "text.txt")
    windows = open_reader(tmp_path, 272, encoder=True).windows(text, 1, 6, seed=0)
    assert tokenizer("ab c")["input_ids"] == windows[0].tolist()
    of_decoder = open_reader(tmp_path, 272).windows(text, 1, 7, seed=0)
    assert of_decoder[0].tolist() == tokenizer("ab cd")["input_ids"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory, headless, text):
    """A lossy split by the default recipe, with its check, of an encoder without a head."""
    out = tmp_path_factory.mktemp("lossy") / "out"
    settings = {"experts": 8, "top_k": 2, "target": "qwen2_moe", "calibration": str(text)}
    sizes = {"calibration_tokens": 1024, "seq_len": 64}
    return upcycle.convert(str(headless), out, **settings, **sizes)


def test_check_compares_last_hidden_states(converted, headless):
    """By the numbers of one kind of text, worked out here."""
    check = converted.check
    assert isinstance(check, EncoderReport)
    assert 0 < check.exact_error < check.exact_tolerance
    kind = check.kinds[0]
    windows = held_windows(converted.plan, kind.kind)
    with torch.no_grad():
        mine, theirs = (
            AutoModel.from_pretrained(f).eval()(input_ids=windows).last_hidden_state
            for f in (converted.out, headless)
        )
    error = (mine - theirs).square().mean().sqrt() / theirs.std()
    assert kind.error == pytest.approx(float(error), rel=1e-3)
    assert 0.01 < kind.error <= kind.worst_window
    cosine = (mine * theirs).sum(-1) / (mine.norm(dim=-1) * theirs.norm(dim=-1))
    assert kind.cosine == pytest.approx(float(cosine.mean()), abs=1e-4)
    mine, theirs = mine.mean(1), theirs.mean(1)
    pooled = (mine * theirs).sum(-1) / (mine.norm(dim=-1) * theirs.norm(dim=-1))
    assert kind.pooled_cosine == pytest.approx(float(pooled.mean()), abs=1e-4)


def held_windows(plan, kind):
    recipe = plan.recipe
    found = calibration(
        plan.source,
        recipe.calibration,
        sequences=plan.fit_tokens // recipe.seq_len,
        windows=plan.check_windows,
        seq_len=recipe.seq_len,
        seed=recipe.seed,
        device=torch.device("cpu"),
    )
    return found.held[kind]


def test_record_and_card_speak_of_hidden_states_alone(converted):
    read = read_record(converted.out / "upcycle.json").check
    assert isinstance(read, EncoderReport)
    assert read.worst.error == pytest.approx(converted.check.worst.error)
    fields = json.loads((converted.out / "upcycle.json").read_text())["check"]
    assert fields["hidden_error"] == max(kind["error"] for kind in fields["kinds"])
    card = (converted.out / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "AutoModel.from_pretrained" in card
    assert "cosine of hidden states" in card
    assert "perplexity" not in card
    assert "text-generation" not in card
    assert "upcycle eval" not in card
    assert "predicts masked tokens" not in card


def test_terminal_speaks_of_hidden_states_alone(converted, capsys, monkeypatch):
    monkeypatch.setattr(out, "_width", 200)
    show_conversion(converted)
    show_inspection(inspect_model(str(converted.out)))
    said = capsys.readouterr().out
    assert "all experts on, refit weights in both: hidden states differ by" in said
    assert "loads with AutoModel.from_pretrained" in said
    worst = converted.check.worst
    assert f"off by up to {worst.error:.2g} σ, with a cosine of {worst.cosine:.3f}" in said
    assert f"error of hidden states │ {worst.error:.3f}" in said.replace("  ", "")
    assert "erplexity" not in said


def test_copies_with_their_head_are_checked_by_logits(tmp_path, dense):
    """Which hold the hidden states and the head; the card says what loads it."""
    made = upcycle.convert(str(dense("eurobert")), tmp_path / "out", target="mixtral", **COPY)
    assert made.plan.source.arch.output == "logits"
    assert made.check.exact_error < 1e-5
    assert all(kind.cosine > 0.9999 and kind.error < 1e-4 for kind in made.check.kinds)
    card = (made.out / "README.md").read_text()
    assert "The head that predicts masked tokens is kept: `AutoModelForCausalLM`" in card


def test_no_layer_is_kept_dense_unasked(converted):
    assert converted.plan.spec.dense_layers == ()
    assert any("encoder" in warning for warning in converted.plan.warnings)


def test_other_runtimes_look_back_only(converted):
    assert all("see only those before" in why for why in converted.plan.runtimes.values())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"calibration": "self"}, "`calibration=self`.*encoder"),
        ({"calibration": "builtin+self"}, "encoder, which writes no text"),
        ({"runtimes": ("vLLM",)}, "no target of this model runs there"),
    ],
)
def test_what_only_a_decoder_does_is_refused(dense, settings, sentence):
    with pytest.raises(UpcycleError, match=sentence):
        upcycle.plan(str(dense("eurobert")), **settings)


def test_merge_is_refused(dense, tmp_path):
    source = str(dense("eurobert"))
    with pytest.raises(UpcycleError, match="is an encoder, and a merge"):
        upcycle.merge([source, source], tmp_path / "out", router="random")


def test_evaluation_and_training_are_refused(dense, moe, tmp_path):
    for model in (dense("eurobert"), moe(dense("eurobert"), target="mixtral", **COPY)):
        with pytest.raises(UpcycleError, match="is an encoder, whose tokens see the next one"):
            evaluate(str(model), ["probes"])
        with pytest.raises(UpcycleError, match="is an encoder, whose tokens see the next one"):
            finetune(str(model), tmp_path / "out", data="builtin")


def test_classifiers_weights_are_not_dropped(dense, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(dense("eurobert"), num_labels=3)
    model.save_pretrained(tmp_path)
    shutil.copy(dense("eurobert") / "tokenizer.json", tmp_path)
    with pytest.raises(UpcycleError, match="would be lost"):
        upcycle.plan(str(tmp_path))


# --- how far it is from the dense model -------------------------------------------------------


def test_evaluation_compares_hidden_states(dense, moe, text, tmp_path):
    source = dense("eurobert")
    settings = {"against": str(source), "tokens": 128, "seq_len": 64}
    same = evaluate_any(str(moe(source, target="mixtral", **COPY)), [str(text)], **settings)
    assert same.texts[0].error < 1e-4
    assert same.texts[0].cosine == pytest.approx(1, abs=1e-5)
    split = moe(source, target="mixtral", **SPLIT)
    found = evaluate_any(str(split), [str(text), "builtin"], **settings)
    assert [result.kind for result in found.texts] == [str(text), "builtin"]
    assert found.tokens == 128
    assert [len(layer.load) for layer in found.routing] == [8] * 3
    assert found.params.active < found.params.active_against
    # The same by plain transformers, on the first of two windows.
    model, reader = AutoModel.from_pretrained(split), open_reader(source, 272)
    windows_WL = reader.windows(str(text), 2, 64, seed=1)
    other = AutoModel.from_pretrained(source)
    with torch.no_grad():
        own, theirs = (m.eval()(input_ids=windows_WL).last_hidden_state for m in (model, other))
    error = (own - theirs).square().mean().sqrt() / theirs.std()
    assert found.texts[0].error == pytest.approx(float(error), rel=1e-4)
    means = torch.nn.functional.cosine_similarity(own.mean(1), theirs.mean(1), dim=-1)
    assert found.texts[0].pooled_cosine == pytest.approx(float(means.mean()), rel=1e-4)
    assert summary_of(found)["texts"][0]["kind"] == text.name


def test_evaluation_says_what_it_needs(dense, moe, headless):
    out = str(moe(headless, target="mixtral", **COPY))
    with pytest.raises(UpcycleError, match="predicts no next token: give `against=DENSE`"):
        evaluate_any(out, ["probes"], against=None)
    with pytest.raises(UpcycleError, match=r"is a decoder, but .* is an encoder"):
        evaluate_any(out, ["probes"], against=str(dense()))
    for asked in ({"speed": True}, {"tasks": ["x"]}, {"top_ks": [1]}):
        with pytest.raises(UpcycleError, match="is measured by next tokens, which"):
            evaluate_any(out, ["probes"], against=str(headless), **asked)


def test_command_shows_and_writes_it(headless, moe, text, tmp_path):
    out = moe(headless, target="mixtral", **COPY)
    words = ["eval", out, "--against", headless, "--text", text, "--tokens", 64, "--seq-len", 32]
    shown = CliRunner().invoke(app, list(map(str, [*words, "--output", tmp_path / "found.json"])))
    assert shown.exit_code == 0, shown.stderr
    assert "cosine of means" in shown.stdout
    assert read_json(tmp_path / "found.json")["texts"][0]["error"] < 1e-4


# --- what sentence-transformers puts behind it ------------------------------------------------

KINDS = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate(KINDS.items())
]


@pytest.fixture
def embedder(headless, tmp_path):
    """The encoder as sentence-transformers saves it."""
    folder = shutil.copytree(headless, tmp_path / "embedder")
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "cosine"}')
    for name in ("1_Pooling", "2_Dense"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"of": name}))
    save_file({"linear.weight": torch.ones(4, 48)}, folder / "2_Dense" / "model.safetensors")
    return folder


def test_what_makes_one_vector_of_a_text_goes_along(embedder, moe):
    out = moe(embedder, **COPY)
    names = {str(path.relative_to(embedder)) for path in embedder.rglob("*.json")}
    for name in (names | {"2_Dense/model.safetensors"}) - {"config.json"}:
        assert (out / name).read_bytes() == (embedder / name).read_bytes(), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "modules.json").write_text('[{"path": "../other"}]'), "'../other', which"),
        (lambda f: (f / "modules.json").write_text('[{"path": "/etc"}]'), "'/etc', which is no"),
        (lambda f: (f / "modules.json").write_text('{"path": "1_Pooling"}'), "not a list of mod"),
        (lambda f: (f / "2_Dense/pytorch_model.bin").write_bytes(b"x"), "is pickled, which is not"),
        (lambda f: (f / "1_Pooling/x.json").symlink_to("/etc/hostname"), "is a link out of its"),
    ],
)
def test_modules_that_may_not_go_along_are_refused_by_the_plan(embedder, change, words):
    change(embedder)
    with pytest.raises(UpcycleError, match=words):
        upcycle.plan(str(embedder), **(PLAIN_SPLIT | COPY | {"split": "random"}))
