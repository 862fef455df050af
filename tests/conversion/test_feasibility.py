"""What a plan that is whole may come to grief on: text, tokens, and the place of the result."""

import json
import shutil

import pytest
from reference import weights
from refusals import refusal
from tiny import PLAIN_SPLIT
from torch.nn import functional

import upcycle
from upcycle import UpcycleError
from upcycle.conversion import dense_layers
from upcycle.core.clustering import balanced_kmeans
from upcycle.models.record.conversion import Trial
from upcycle.models.workspace import partial_folder
from upcycle.router_init import kmeans

# --- text ------------------------------------------------------------------------------------


def test_no_text_for_a_split(dense):
    assert refusal(dense, calibration="none") == (
        "`calibration=none`: this conversion needs text for its router (ridge, split)"
    )


def test_no_text_for_the_check_of_copies(dense):
    assert refusal(dense, calibration="none", method="copy") == (
        "`calibration=none` leaves no text for the check: add `check=none`"
    )


def test_sequences_longer_than_the_model_reads(dense):
    assert refusal(dense, fields={"max_position_embeddings": 64}, seq_len=128) == (
        "`seq_len=128` is more than the model's 64 positions (max_position_embeddings): "
        "give `seq_len=64`"
    )


def test_unchecked_copies_need_no_text(dense):
    assert not upcycle.plan(str(dense()), calibration="none", method="copy", check="none").streams


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "nowhere.txt",
            "`calibration='nowhere.txt'` is not a file: give mixed, builtin, self, none",
        ),
        ("probes", "`calibration='probes'` is for `text` alone: nothing is ever fitted on"),
        ("builtin+probe:code", "`calibration='probe:code'` is for `text` alone"),
        ("hf:", "`calibration='hf:'` names no dataset"),
        (__file__, "ends in '.py': known are .txt"),
    ],
)
def test_calibration_text_that_is_none(dense, text, words):
    assert words in refusal(dense, calibration=text)


def test_model_without_a_tokenizer(dense, tmp_path):
    for path in dense().iterdir():
        if not path.name.startswith("token"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UpcycleError, match=r"holds no tokenizer .* tokenizer files\):"):
        upcycle.plan(str(tmp_path))
    with pytest.raises(UpcycleError, match=r"tokenizer files, or pass `check=none`\):"):
        upcycle.plan(str(tmp_path), method="copy")
    assert upcycle.plan(str(tmp_path), method="copy", check="none").params_total


# --- tokens ----------------------------------------------------------------------------------


def test_fewer_tokens_than_experts(dense):
    with pytest.raises(UpcycleError, match="`calibration_tokens=8` is too few for 24 experts"):
        upcycle.plan(str(dense()), experts=24, shared=0, calibration_tokens=8, seq_len=8)


SHIFTING = {
    "seq_len": 9, "split": "random", "keep_dense": "auto", "check": "none",
    "calibration": "builtin",
}  # fmt: skip
"""18 experts are routed, and 21 once one of three layers stays dense."""


def test_tokens_that_suffice_until_a_layer_stays_dense(dense, tmp_path, monkeypatch):
    def try_layers(plan, layers, *_):
        return Trial(layers, {"builtin": 1.0 if layers == (0,) else 2.0})

    monkeypatch.setattr(dense_layers, "measure_damage", lambda *_: [9.0, 0.1, 0.1])
    monkeypatch.setattr(dense_layers, "try_layers", try_layers)
    assert upcycle.plan(str(dense()), **SHIFTING).design.geometry.num_experts == 18
    assert refusal(dense, **SHIFTING, calibration_tokens=18) == (
        "`calibration_tokens=18` is too few for 21 experts: give thousands"
    )
    plan = upcycle.convert(str(dense()), tmp_path / "out", **SHIFTING, calibration_tokens=27).plan
    assert (plan.spec.dense_layers, plan.design.geometry.num_experts) == ((0,), 21)


@pytest.mark.parametrize("fixed", [{"shared": 0.25}, {"top_k": 6}])
def test_tokens_that_suffice_because_the_request_fixes_what_is_shared(dense, tmp_path, fixed):
    settings = SHIFTING | {"calibration_tokens": 18} | fixed
    plan = upcycle.convert(str(dense()), tmp_path / "out", **settings).plan
    assert plan.design.geometry.num_experts == 18


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"split": {"name": "token_clusters", "tokens": 5}},
            "split.tokens=5 looks at 4 of 16 calibration tokens, too few for 8 experts: "
            "give thousands",
        ),
        (
            {"router": {"name": "kmeans", "tokens": 15}, "experts": 12, "top_k": 2},
            "router.tokens=15 looks at 8 of 16 calibration tokens, too few for 12 experts: "
            "give thousands",
        ),
        (
            {"router": {"name": "kmeans", "tokens": 7}, "method": "copy"},
            "router.tokens=7 looks at 6 of 16 calibration tokens, too few for 8 experts: "
            "give thousands",
        ),
    ],
)
def test_sample_of_fewer_tokens_than_experts(dense, settings, words):
    settings = {
        "calibration_tokens": 16,
        "seq_len": 8,
        "experts": 8,
        "shared": 0,
    } | settings
    assert refusal(dense, **settings) == words


@pytest.mark.parametrize(
    "settings",
    [
        {"split": {"name": "token_clusters", "tokens": 8}},
        {"router": {"name": "kmeans", "tokens": 8}},
    ],
)
def test_sample_of_one_token_per_expert_is_enough(dense, tmp_path, settings, monkeypatch):
    """Each expert then is one token's: its neurons are a whole part, its centroid is the token."""
    clustered = []

    def cluster(x_TD, *rest):
        clustered.append(x_TD)
        return balanced_kmeans(x_TD, *rest)

    monkeypatch.setattr(kmeans, "balanced_kmeans", cluster)
    tokens = {"calibration_tokens": 16, "seq_len": 8, "check": "none"}
    plain = PLAIN_SPLIT | {"shared": 0} | tokens
    upcycle.convert(str(dense()), tmp_path / "out", **plain | settings)
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    for layer in record["layers"]:
        assert sorted(layer["permutation"]) == list(range(192))
    assert len(clustered) == (3 if "router" in settings else 0)
    for layer, x_ED in enumerate(clustered):
        router_ED = weights(tmp_path / "out")[f"model.layers.{layer}.mlp.gate.weight"]
        x_ED = x_ED - x_ED.mean(0)  # what all experts have in common chooses none
        alike_EE = functional.cosine_similarity(router_ED[:, None], x_ED[None], dim=-1)
        assert alike_EE.max(0).values.min() > 1 - 1e-5
        assert alike_EE.max(1).values.min() > 1 - 1e-5


# --- the place of the result -----------------------------------------------------------------


def test_disk_that_is_too_small(dense, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(9 * 10**6, 7 * 10**6, 2 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "below" / "out"
    sentence = f"`out={out}` needs 0.1 GB, but {tmp_path} has 0.0 GB free"
    assert refusal(dense, out=out) == sentence
    with pytest.raises(UpcycleError, match=r"needs 0\.1 GB"):
        upcycle.convert(str(dense()), out, resume=True)


def test_room_that_an_interrupted_run_takes_counts_as_free(dense, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plan = upcycle.plan(str(dense()))
    needed = plan.bytes + plan.aside_bytes() + 64 * 2**20
    usage = shutil._ntuple_diskusage(2 * needed, needed + 1, needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "free" in refusal(dense, out=out)
    (partial_folder(out) / "aside").mkdir(parents=True)
    (partial_folder(out) / "aside" / "layer 0.safetensors").write_bytes(b"x")
    (partial_folder(out) / "journal.jsonl").write_text('{"fingerprint": "a", "threads": 1}\n')
    assert upcycle.plan(str(dense()), out).out == out


def test_place_that_holds_something(dense, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    assert refusal(dense, out=tmp_path) == (
        f"`out={tmp_path}` exists and is not empty: choose another, or `overwrite`"
    )
    assert refusal(dense, out=tmp_path, overwrite=True) == (
        f"`out={tmp_path}` was not written by upcycle, so `overwrite` leaves it alone"
    )


def test_place_that_is_a_file(dense, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    assert refusal(dense, out=file) == f"`out={file}` is a file: give a folder"
    below = file / "out"
    assert refusal(dense, out=below) == f"`out={below}`: {file} is a file: give another folder"


def test_place_that_holds_the_source(dense):
    model = dense()
    for out in (model, model.parent, model / ".." / model.name):
        sentence = refusal(dense, out=out, overwrite=True)
        assert sentence == f"`out={out.resolve()}` holds the source: give another folder"


@pytest.mark.parametrize(("tokens", "said"), [(512, True), (1024, False)])
def test_descent_without_tokens_for_a_step_is_least_squares(dense, tokens, said):
    settings = {"compensate": "descent", "calibration": "builtin", "seq_len": 64}
    found = upcycle.plan(str(dense()), calibration_tokens=tokens, **settings).warnings
    note = "`compensate=descent` refits in closed form alone: its steps take 1,024 tokens"
    assert any(each.startswith(note) for each in found) == said


def test_place_that_holds_the_calibration_text(dense, tmp_path):
    text = tmp_path / "out" / "notes.txt"
    text.parent.mkdir()
    text.write_text("a text of some words, " * 400)
    (text.parent / "upcycle.json").write_text("{}")
    sentence = refusal(dense, out=text.parent, overwrite=True, calibration=str(text))
    assert sentence == f"`out={text.parent}` holds {text}, which is read: give another folder"


def test_place_that_is_the_working_directory(dense, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert upcycle.plan(str(dense()), ".").out == tmp_path / "out"
