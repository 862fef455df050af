"""The packer: windows as they were where no token begins a text, and with one in front where one
does; one end of sequence after each document, whoever put it there."""

import itertools
import json
import random
import shutil
from itertools import accumulate

import pytest
import torch
from reference import load
from tiny import make_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer

from upcycle import UpcycleError
from upcycle.conversion.dense_layers import DAMAGE_LENGTH, _cut
from upcycle.evaluation.run import evaluate
from upcycle.finetune.data import training_data
from upcycle.models import calibration as calibrate
from upcycle.models import own_text as writer
from upcycle.models import reading
from upcycle.models.opening import open_source
from upcycle.models.text import PROBES
from upcycle.models.tokens import front_tokens, load_tokenizer, open_reader

BOS, EOS, VOCAB = 256, 257, 272
TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>\n{% endfor %}"
CPU = torch.device("cpu")


def with_special(folder, single, template=None):
    """Let the tokenizer in a folder put special tokens around a text."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(dense, tmp_path):
    """A model, and how its tokenizer is to treat texts."""

    def make(single="$A", template=None):
        folder = tmp_path / "model"
        shutil.copytree(dense(), folder)
        return with_special(folder, single, template)

    return make


def write_rows(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def letters(count, seed=0):
    return "".join(random.Random(seed).choices("abcdefgh \n", k=count))


# --- a naive packer, which knows nothing of ours ---------------------------------------------


def naive_stream(documents):
    """Of one token per letter."""
    return [token for text in documents for token in [*make_tokenizer().encode(text), EOS]]


def naive_windows(documents, count, length, front=()):
    """Evenly from all over a text: from its characters, if it is long."""
    body = length - len(front)
    characters = sum(map(len, documents))
    if characters > 64 * count * body:
        rows = [naive_from(documents, place * characters // count, body) for place in range(count)]
    else:
        stream = naive_stream(documents)
        every = [stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]
        rows = [every[round(i * (len(every) - 1) / (count - 1))] for i in range(count)]
    return [[*front, *row] for row in rows]


def naive_from(documents, start, body):
    """What follows a character of all documents put together, from white space in its document on
    unless it begins the document."""
    ends = list(accumulate(map(len, documents)))
    number = next(i for i, end in enumerate(ends) if start < end)
    text = documents[number]
    start -= ends[number] - len(text)
    if start:
        start = next((i for i in range(start, len(text)) if text[i].isspace()), start)
    return naive_stream([text[start:], *documents[number + 1 :]])[:body]


TEXTS = {
    "short": [letters(70, seed) for seed in range(12)],
    "long": [letters(60 + seed % 50, seed) for seed in range(300)],
    "one": [letters(20_000)],
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(("single", "front"), [("$A", ()), ("<s> $A", (BOS,))])
@pytest.mark.parametrize("blank", [[], ["", " \n", "\t"]], ids=["", "blank rows"])
def test_windows_are_those_of_a_naive_packer(model, tmp_path, name, single, front, blank):
    documents = TEXTS[name]
    rows = [text for document in documents for text in (*blank, document)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    reader = open_reader(model(single), VOCAB)
    assert reader.front == front
    found = reader.windows(path, 5, 16, seed=0)
    assert found.tolist() == naive_windows(documents, 5, 16, front)


@pytest.mark.parametrize("single", ["$A", "<s> $A"])
def test_a_file_that_is_read_in_pieces_is_one_document(model, tmp_path, monkeypatch, single):
    monkeypatch.setattr(reading, "PIECE", 700)
    reader = open_reader(model(single), VOCAB)
    for count in (5000, 20_000):
        text = letters(count, count)
        (tmp_path / "a.txt").write_text(text)
        found = reader.windows(str(tmp_path / "a.txt"), 9, 16, seed=0)
        assert found.tolist() == naive_windows([text], 9, 16, reader.front)
    assert reader.first(str(tmp_path / "a.txt"), 10**6, seed=0).tolist() == naive_stream([text])


# --- what is put around a document -----------------------------------------------------------


@pytest.mark.parametrize(
    ("single", "front"),
    [("$A", ()), ("<s> $A", (BOS,)), ("$A </s>", ()), ("<s> $A </s>", (BOS,))],
)
def test_a_document_has_one_end_and_only_a_window_a_beginning(model, tmp_path, single, front):
    reader = open_reader(model(single), VOCAB)
    assert reader.front == front
    rows = ["abc", "<s>abc", "abc</s>", "<s>abc</s></s>"]
    if not front:  # then it is a text's own
        rows = [row.removeprefix("<s>") for row in rows]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert list(reader.documents(path, 0)) == [naive_stream(["abc"])] * len(rows)


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>"])
def test_a_template_that_brings_both_brings_no_second(model, tmp_path, single):
    reader = open_reader(model(single, TEMPLATE), VOCAB)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"messages": chat}) + "\n") * 20)
    expected = [*naive_stream(["[user]ab"]), *naive_stream(["\n[assistant]c"])]
    assert list(reader.documents(str(path), 0)) == [expected] * 20
    found = reader.windows(str(path), 3, 16, seed=0)
    assert (found == BOS).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]


def test_a_tokenizer_without_an_end_parts_nothing(model, tmp_path):
    folder = model("<s> $A")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    path = write_rows(tmp_path / "a.jsonl", ["ab", "", "cd"] * 9)
    found = open_reader(folder, VOCAB).first(path, 6, seed=0)
    assert found.tolist() == make_tokenizer().encode("abcdab")


def test_what_the_tokenizer_puts_in_front_is_in_the_vocabulary(model, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", ["ab"])
    with pytest.raises(UpcycleError, match="makes token 256, but vocab_size is 256"):
        open_reader(model("<s> $A"), 256).first(path, 2, seed=0)


# --- every window of every stage begins alike ------------------------------------------------


def begins(tokens_BL):
    """Whether every window has one beginning, in front."""
    is_first_L = torch.arange(tokens_BL.shape[1]) == 0
    return torch.equal(tokens_BL == BOS, is_first_L.expand(len(tokens_BL), -1))


@pytest.mark.parametrize("seq_len", [64, 1024])
def test_calibration_and_check(model, tmp_path, seq_len):
    folder = model("<s> $A")
    path = tmp_path / "a.txt"
    path.write_text(letters(30_000))
    source = open_source(str(folder))
    found = calibrate.calibration(
        source, f"{path}+builtin", sequences=4, windows=3, seq_len=seq_len, seed=0, device=CPU
    )
    assert found.fit_BL.shape == (4, seq_len)
    assert found.front == (BOS,)
    assert list(found.held) == [str(path), *PROBES]
    for windows_WL in (found.fit_BL, *found.held.values()):
        assert begins(windows_WL)
    assert found.held[str(path)].shape == (3, min(seq_len, calibrate.CHECK_WINDOW))


def test_what_the_model_writes(model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(writer, "LENGTH", 12)
    monkeypatch.setattr(writer, "paragraphs", lambda folder: {"en": ["one two"]})
    source = open_source(str(model("<s> $A", TEMPLATE)))
    found = calibrate.calibration(
        source, "self", sequences=4, windows=0, seq_len=256, seed=0, device=CPU
    )
    assert begins(found.fit_BL)
    assert int((found.fit_BL == EOS).sum()) > 4


def test_a_beginning_that_the_model_writes_is_none(model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(writer, "_write", lambda *_: iter([[BOS, 5, BOS, 6, EOS]] * 9))
    source = open_source(str(model("<s> $A")))
    found = calibrate.calibration(
        source, "self", sequences=2, windows=0, seq_len=8, seed=0, device=CPU
    )
    assert found.fit_BL.tolist() == [
        [BOS, 5, 6, EOS, 5, 6, EOS, 5],
        [BOS, 6, EOS, *[5, 6, EOS], 5, 6],
    ]


@pytest.mark.parametrize(("rows", "seq_len"), [(3, 512), (2, 100)])
def test_trials_of_dense_layers(rows, seq_len):
    tokens_BL = torch.arange(rows * seq_len).view(rows, seq_len) + 1000
    tokens_BL[:, 0] = BOS
    cut_BL = _cut(tokens_BL, 1)
    assert begins(cut_BL)
    assert cut_BL.shape[1] == min(seq_len, DAMAGE_LENGTH)
    assert (cut_BL[:, 1:].diff(dim=1) == 1).all()


def test_evaluation_measures_the_model_as_it_is_used(model, tmp_path):
    folder = model("<s> $A")
    (tmp_path / "a.txt").write_text(letters(4000))
    (result,) = evaluate(str(folder), [str(tmp_path / "a.txt")], tokens=192, seq_len=64).texts
    rows = torch.tensor(naive_windows([letters(4000)], 3, 64, (BOS,)))
    network = load(folder)
    with torch.no_grad():
        log_probs = network(rows).logits[:, :-1].log_softmax(-1)
    scored = log_probs.gather(2, rows[:, 1:, None])
    assert result.perplexity == pytest.approx(float((-scored.mean()).exp()), rel=1e-4)


@pytest.mark.parametrize("letters_more", [0, 1, 7])
def test_training(model, tmp_path, letters_more):
    folder = model("<s> $A")
    text = letters(15 * 20 - 1 + letters_more)  # and an end of sequence
    (tmp_path / "a.txt").write_text(text)
    parts = training_data(
        folder, VOCAB, str(tmp_path / "a.txt"), seq_len=16, train_tokens=10**4,
        validation_tokens=32, seed=0,
    )  # fmt: skip
    tokens_BL = torch.cat([part.tokens_BL for part in parts])
    mask_BL = torch.cat([part.mask_BL for part in parts])
    assert begins(tokens_BL)
    assert bool(mask_BL[:, 0].all())
    body_BT = tokens_BL[:, 1:]
    assert body_BT[mask_BL[:, 1:]].tolist() == naive_stream([text])


def test_only_so_much_is_read_as_training_wants(model, tmp_path):
    (tmp_path / "a.txt").write_text(letters(9000))
    train, held = training_data(
        model("<s> $A"), VOCAB, str(tmp_path / "a.txt"), seq_len=16, train_tokens=320,
        validation_tokens=32, seed=0,
    )  # fmt: skip
    assert (len(train), len(held)) == (20, 2)
    assert bool(held.mask_BL.all())


def test_a_tokenizer_of_no_words_is_none(moe, dense, tmp_path):
    """As transformers makes it of a qwen2_moe model without tokenizer files."""
    folder = shutil.copytree(moe(dense()), tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UpcycleError, match=r"no tokenizer that .*: it has no vocabulary"):
        load_tokenizer(folder)


def test_front_of_a_tokenizer_is_what_it_adds_to_any_text():
    tokenizer = make_tokenizer()
    assert front_tokens(tokenizer) == ()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert front_tokens(tokenizer) == (BOS, EOS)


# --- what is held back -----------------------------------------------------------------------


@pytest.mark.parametrize("length", [900, 60_000], ids=["read whole", "read in places"])
def test_what_is_held_back_is_none_of_what_was_drawn(model, tmp_path, length):
    """Every body of a text of random letters is found at one place in it."""
    path, wanted, width = tmp_path / "text.txt", 6, 40
    path.write_text(letters(length))
    reader = open_reader(model(), VOCAB)
    text = "".join(map(chr, reader.first(str(path), length + 1, seed=0)))
    drawn = reader.drawn(str(path), wanted, width, seed=0).ids.view(-1, width)
    held = reader.held_back(str(path), wanted, 4, width, seed=0)
    assert held.shape == (4, width)
    places = [text.index("".join(map(chr, body))) for body in (*drawn, *held)]
    assert places[wanted:] == sorted(places[wanted:])
    assert max(places[wanted:]) - min(places[wanted:]) > length / 2
    assert min(b - a for a, b in itertools.pairwise(sorted(places))) >= width


@pytest.mark.parametrize("length", [100, 240, 250])
def test_of_a_text_that_is_all_drawn_nothing_is_held_back(model, tmp_path, length):
    path = tmp_path / "text.txt"
    path.write_text(letters(length))
    reader = open_reader(model(), VOCAB)
    assert reader.held_back(str(path), 6, 4, 40, seed=0).shape == (0, 40)
    assert len(reader.held_back(str(path), 0, 2, 40, seed=0)) == 2  # where nothing is fitted


def test_what_repeats_what_was_drawn_is_not_held_back(model, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text((letters(39) + "\n") * 30)
    reader = open_reader(model(), VOCAB)
    assert len(reader.held_back(str(path), 6, 4, 40, seed=0)) <= 1  # the end is another
