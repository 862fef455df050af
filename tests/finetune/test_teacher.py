"""The teacher's predictions, stored once: those for held-out text, and those for all text in place
of a teacher that runs in every step."""

import gc
import weakref

import pytest
import torch
from reference import load, logits
from torch.nn import functional

from upcycle import UpcycleError
from upcycle.finetune import preparing
from upcycle.finetune import teacher as teacher_module
from upcycle.finetune.data import training_data
from upcycle.finetune.preparing import Watch
from upcycle.finetune.run import finetune
from upcycle.finetune.settings import Training
from upcycle.finetune.teacher import fill, is_stored, open_store, size
from upcycle.models.workspace import partial_folder

V = 272
QUICK = {
    "preset": "heal", "steps": 6, "seq_len": 32, "batch_size": 2, "micro_batch": 2,
    "validation_tokens": 64, "validate_every": 3, "lr": 3e-3,
}  # fmt: skip


@pytest.fixture
def short(tmp_path):
    """A text of fewer sequences than six steps see, so that they come again."""
    path = tmp_path / "short.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 7)
    return path


@pytest.fixture
def train(dense, moe, short, tmp_path):
    def run(name="out", **settings):
        return finetune(str(moe(dense())), tmp_path / name, data=str(short), **(QUICK | settings))

    return run


@pytest.fixture
def teachers(monkeypatch):
    """Every teacher that is loaded, weakly."""
    found, load_teacher = [], preparing._load_teacher

    def watched(*args):
        model = load_teacher(*args)
        found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(preparing, "_load_teacher", watched)
    return found


def one_thread_alone(number):
    return number, 1, lambda: None


def test_all_words_kept_are_the_teacher_itself(train, teachers, tmp_path):
    """Over sequences that come again, softened; and the teacher is gone before the first step."""
    settings = {"distill_temperature": 2.0}
    live = train("live", **settings)
    alive = []

    def look(row, done, total):
        gc.collect()
        alive.append(teachers[-1]() is not None)

    kept = train("kept", teacher_top_k=10**6, watch=Watch(row=look), **settings)
    assert len(teachers) == 2
    assert not any(alive)
    assert kept.tokens > sum(used.tokens for used in kept.used)
    for row, expected in zip(kept.log, live.log, strict=True):
        for name in row.keys() & {"loss", "next_token", "distill", "grad_norm"}:
            assert row[name] == pytest.approx(expected[name], rel=1e-3), name
        if "validation" in row:
            assert row["validation"] == pytest.approx(expected["validation"], rel=1e-4)
    assert not partial_folder(tmp_path / "kept").exists()


def test_a_stopped_run_goes_on_from_the_stored_predictions(train, teachers, tmp_path):
    """To the same bytes, whether it was stopped while they were stored or later."""
    settings = {"teacher_top_k": 5, "next_token": 0.0, "lr": 1e-3}
    whole = train("whole", **settings)
    assert whole.after["kl"] < whole.before["kl"]

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(watch=Watch(teacher=stop), **settings)
    aside = partial_folder(tmp_path / "out") / "aside"
    assert [path.name for path in aside.iterdir()] == ["teacher-train.draft"]
    told = []
    again = Watch(row=lambda row, done, _: stop(done, 0), teacher=lambda *done: told.append(done))
    with pytest.raises(KeyboardInterrupt):
        train(watch=again, resume=True, **settings)
    assert len(teachers) == 3
    assert told[0][0] == 5
    resumed = train(resume=True, **settings)
    assert len(teachers) == 3
    one, other = (done.out / "model.safetensors" for done in (resumed, whole))
    assert one.read_bytes() == other.read_bytes()
    assert resumed.after == whole.after


def test_the_teacher_reads_held_out_text_once(train, monkeypatch):
    """Besides a batch in every step, however often the model is validated."""
    calls, read, load_teacher = [], [], preparing._load_teacher

    def counted(*args):
        model = load_teacher(*args)
        model.register_forward_hook(lambda *_: calls.append(1))
        return model

    monkeypatch.setattr(preparing, "_load_teacher", counted)
    watch = Watch(teacher=lambda done, total: read.append((done, total)))
    done = train(validate_every=1, watch=watch)
    assert sum("validation" in row for row in done.log) == 7
    assert read == [(number, len(read)) for number in range(1, len(read) + 1)]
    assert len(calls) == 6 + len(read)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balance_bias": 0.001}, "has no effect on qwen2_moe"),
        ({"router_losses": {"labels": 1}}, "there is one text alone"),
        ({"gating": "sparse_mixer", "dense_router_gradient": True}, "a gradient of its own"),
    ],
)
def test_what_can_not_work_is_refused_before_the_teacher_reads(train, teachers, settings, message):
    with pytest.raises(UpcycleError, match=message):
        train(teacher_top_k=8, **settings)
    assert not teachers


def test_a_dense_model_is_refused_before_the_teacher_reads(dense, short, teachers, tmp_path):
    with pytest.raises(UpcycleError, match="has no experts: it is dense"):
        finetune(str(dense()), tmp_path / "out", data=str(short), **QUICK)
    assert not teachers


def test_only_tokens_that_are_learnt_from_are_stored(dense, text, tmp_path):
    """With the loss of the teacher on those that count, by plain transformers."""
    _, data = training_data(
        dense(), V, str(text), seq_len=32, train_tokens=1000, validation_tokens=96, seed=0
    )
    data.scored_BL[:, :20] = False
    model, path = load(dense()), tmp_path / "teacher.bin"
    seen = []
    fill(
        path, data, lambda tokens_BL: logits(model, tokens_BL), 7, 1.0, one_thread_alone(0),
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert path.stat().st_size == size(3 * 13, 7)
    assert is_stored(path, data, 7)
    assert not is_stored(path, data, 8)
    store = open_store(path, data, 7)
    for row in range(3):
        z_LV = logits(model, data.tokens_BL[row : row + 1])[0]
        expected = functional.cross_entropy(z_LV[19:-1], data.tokens_BL[row, 20:])
        assert store.loss(row, 12) == pytest.approx(float(expected), rel=1e-5)
    kept = store.kept(torch.tensor([2, 0]), torch.device("cpu"))
    assert kept.words_TN.shape == (26, 7)
    z_TV = logits(model, data.tokens_BL[[2, 0]])[:, 19:].flatten(0, 1)
    p_TV = z_TV.softmax(-1)
    torch.testing.assert_close(kept.log_probs_TN.exp(), p_TV.gather(1, kept.words_TN))
    assert torch.equal(kept.words_TN, z_TV.topk(7).indices)
    torch.testing.assert_close(kept.rest_T.exp(), 1 - kept.log_probs_TN.exp().sum(1))


def test_processes_share_the_sequences(dense, text, tmp_path):
    """Each writes its own, in whatever order they come to it."""
    _, data = training_data(
        dense(), V, str(text), seq_len=32, train_tokens=1000, validation_tokens=96, seed=0
    )
    teach = {"teacher": lambda tokens_BL: logits(model, tokens_BL), "words": 7, "temperature": 1.0}
    model, alone, shared = load(dense()), tmp_path / "alone.bin", tmp_path / "shared.bin"
    fill(alone, data, processes=one_thread_alone(0), watch=lambda *_: None, **teach)

    def other():  # the first process waits for the second one, which is done by then
        draft = shared.with_suffix(".draft")
        if draft.is_file() and not draft.stat().st_size:
            fill(shared, data, processes=(1, 2, lambda: None), watch=lambda *_: None, **teach)

    fill(shared, data, processes=(0, 2, other), watch=lambda *_: None, **teach)
    assert shared.read_bytes() == alone.read_bytes()


def test_a_full_disk_leaves_no_half_of_a_file(dense, text, tmp_path, monkeypatch):
    _, data = training_data(
        dense(), V, str(text), seq_len=32, train_tokens=1000, validation_tokens=96, seed=0
    )

    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "teacher.bin"
    monkeypatch.setattr(teacher_module, "_records", full)
    with pytest.raises(OSError, match="No space"):
        fill(path, data, lambda x: x, 7, 1.0, one_thread_alone(0), lambda *_: None)
    assert not is_stored(path, data, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_top_k": 8, "match_layers": 1.0}, "compares hidden states: set one of them to 0"),
        ({"teacher_top_k": 8, "distill": 0.0}, "give `distill=1`, or set it to 0"),
        ({"distill_temperature": 2.0, "distill": 0.0}, "give `distill=1`, or set it to 1"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(UpcycleError, match=message):
        Training(**{"distill": 1.0, "teacher": "dense"} | settings)
