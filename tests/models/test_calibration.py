"""Calibration text: every source of it, packed without padding, what of it is held back for the
check, and every way it can be wrong."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

import upcycle
from upcycle import UpcycleError
from upcycle.conversion import run as conversion
from upcycle.conversion import writing
from upcycle.models import calibration as calibrate
from upcycle.models import own_text as writer
from upcycle.models import tokens as packing
from upcycle.models.calibration import CHECK_WINDOW, calibration
from upcycle.models.opening import open_source
from upcycle.models.rows import Exchange
from upcycle.models.text import PROBES, shipped
from upcycle.models.tokens import open_reader

EOS = 257
TEXTS = ["first document", "", "zweites Dokument: äöü", "line\u2028separator"]


@pytest.fixture
def tiny(dense):
    return open_source(str(dense()))


@pytest.fixture(autouse=True)
def little_written(monkeypatch):
    monkeypatch.setattr(writer, "LENGTH", 12)
    monkeypatch.setattr(writer, "TOGETHER", 4)
    monkeypatch.setattr(writer, "paragraphs", lambda folder: {"en": ["one two"]})


def calibrated(source, text, sequences=2, seq_len=8, seed=0, windows=0):
    sizes = {"sequences": sequences, "windows": windows, "seq_len": seq_len}
    return calibration(source, str(text), seed=seed, device=torch.device("cpu"), **sizes)


def tokens(source, text, sequences=2, seq_len=8, seed=0):
    """What is fitted on."""
    return calibrated(source, text, sequences, seq_len, seed).fit_BL


def packed(source, texts) -> list[int]:
    """The texts' tokens, an end-of-sequence token after each that is not blank."""
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    written = (text for text in texts if text.strip())
    return [token for text in written for token in [*tokenizer.encode(text), EOS]]


def first(source, name, wanted):
    return open_reader(source.folder, 300).first(str(name), wanted, seed=0)


def refusal(source, text, **sizes) -> str:
    with pytest.raises(UpcycleError) as caught:
        tokens(source, text, **sizes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


# --- builtin ---------------------------------------------------------------------------------


def test_builtin_is_the_same_every_time(tiny):
    first = tokens(tiny, "builtin", 4, 64)
    assert torch.equal(first, tokens(tiny, "builtin", 4, 64))
    assert not torch.equal(first, tokens(tiny, "builtin", 4, 64, seed=1))
    assert first.shape == (4, 64)


def test_builtin_is_enough_for_the_default(tiny):
    assert tokens(tiny, "builtin", 64, 512).shape == (64, 512)


# --- files -----------------------------------------------------------------------------------


def test_text_is_packed_without_padding(tiny, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("0123456789" * 3)
    expected = packed(tiny, ["0123456789" * 3])
    found = tokens(tiny, path, 3, 10)
    assert found.shape == (3, 10)
    assert found.flatten().tolist() == expected[:30]


def test_jsonl_documents_are_joined_by_end_of_sequence(tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in TEXTS])
    path.write_text(path.read_text() + "\n")  # a blank line
    expected = packed(tiny, TEXTS)
    sequences = len(expected) // 8
    assert tokens(tiny, path, sequences).flatten().tolist() == expected[: 8 * sequences]


def test_parquet_documents_are_joined_likewise(tiny, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", text=[*TEXTS, None], n=[1] * 5)
    expected = packed(tiny, [text for text in TEXTS if text])
    sequences = len(expected) // 8
    assert tokens(tiny, path, sequences).flatten().tolist() == expected[: 8 * sequences]


def test_exactly_enough_text_is_enough(tiny, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 15)  # and the end-of-sequence token
    assert tokens(tiny, path).shape == (2, 8)
    path.write_text("x" * 14)
    assert refusal(tiny, path) == (
        f"text {str(path)!r} holds 15 tokens, but 16 are needed (check included): "
        "lower `calibration_tokens`, or give more text"
    )


def test_the_check_reads_every_text_however_little_is_fitted_on(tiny, tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("x" * 15)
    two.write_text("y" * 15)
    assert list(calibrated(tiny, f"{one}+{two}", 0, windows=2).held) == [
        str(one),
        str(two),
        *PROBES,
    ]
    two.write_text("y")
    with pytest.raises(UpcycleError, match="for the check: give more text, or pass `check=none`"):
        calibrated(tiny, f"{one}+{two}", 0, windows=2)


def test_of_one_sequence_fewer_tokens_are_no_remedy(tiny, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 4)
    assert refusal(tiny, path, sequences=1) == (
        f"text {str(path)!r} holds 5 tokens, but 8 are needed (check included): "
        "lower `seq_len`, add `check=none`, or give more text"
    )


def test_only_a_few_times_as_much_is_read_as_needed(tiny, monkeypatch):
    def endless(name, seed):
        for _ in range(packing.SPREAD):
            yield "x" * 15
        pytest.fail("more was read")

    monkeypatch.setattr(packing, "documents", endless)
    assert tokens(tiny, "builtin", 2, 8).shape == (2, 8)


def test_sequences_come_from_all_over_a_text_in_order(tiny, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(map(chr, range(32, 127))) * 8)
    every_BL = torch.tensor(packed(tiny, [path.read_text()])[:760]).view(-1, 8)
    found = tokens(tiny, path, 12)
    naive = [every_BL[round(i * (len(every_BL) - 1) / 11)] for i in range(12)]
    assert torch.equal(found, torch.stack(naive))


def watch_tokenised(monkeypatch):
    """Lengths of what is handed to the tokenizer."""
    lengths, ids = [], packing.Reader._ids

    def watched(self, text, **settings):
        lengths.append(len(text))
        return ids(self, text, **settings)

    monkeypatch.setattr(packing.Reader, "_ids", watched)
    return lengths


def numbered(count):
    """Words that tell their place."""
    return [f"word{i:06}" for i in range(count)]


def write_documents(path, documents):
    """Returns the path and the text that it is packed to, with ends of sequence as NUL."""
    if path.suffix == ".parquet":
        write_parquet(path, text=documents)
    elif path.suffix == ".jsonl":
        write_jsonl(path, [{"text": text} for text in documents])
    else:
        documents = [" ".join(documents)]
        path.write_text(documents[0])
    return path, "".join(document + "\0" for document in documents)


def decoded(source, tokens_BL):
    """Of printable letters, a token each; the end of sequence is NUL."""
    letters = AutoTokenizer.from_pretrained(source.folder).convert_ids_to_tokens
    rows = ("".join(letters(row)) for row in tokens_BL.tolist())
    return [row.replace("Ġ", " ").replace("</s>", "\0") for row in rows]


@pytest.fixture
def own(dense, tmp_path):
    """A copy of the model's folder, to be changed."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in dense().iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_windows_begin_evenly_over_a_long_file(tiny, tmp_path, name):
    words = numbered(2000)
    path, text = write_documents(tmp_path / name, words)
    found = decoded(tiny, tokens(tiny, path, sequences=7, seq_len=16))
    length = len(path.read_text()) if name == "a.txt" else sum(map(len, words))
    for place, window in enumerate(found):
        start = place * length // 7
        if name == "a.txt":
            start = text.find(" ", start) if place else 0
        else:
            start += start // len(words[0])  # an end of sequence after each word before
        assert window == text[start : start + 16]


def test_no_more_of_a_long_file_is_tokenised_than_is_wanted(tiny, tmp_path, monkeypatch):
    lengths = watch_tokenised(monkeypatch)
    path, _ = write_documents(tmp_path / "a.txt", numbered(50_000))
    assert tokens(tiny, path, sequences=4, seq_len=16).shape == (4, 16)
    assert len(lengths) == 4
    assert sum(lengths) <= 4 * 2 * packing.LENGTH_OF_TOKEN * 17


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_windows_of_a_short_file_reach_to_its_end(tiny, tmp_path, name):
    path, text = write_documents(tmp_path / name, numbered(100))
    assert packing.SPREAD * 64 < len(text) < packing.SPREAD * 64 * packing.LENGTH_OF_TOKEN
    found = decoded(tiny, tokens(tiny, path, sequences=4, seq_len=16))
    last = len(text) // 16 * 16
    assert (found[0], found[3]) == (text[:16], text[last - 16 : last])


def test_file_whose_windows_would_run_into_each_other_is_tokenised_whole(
    tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(packing, "LENGTH_OF_TOKEN", 1)
    monkeypatch.setattr(packing, "SPREAD", 1)
    path = tmp_path / "a.txt"
    path.write_text("x" * 14 + " yyy")
    whole = packed(tiny, [path.read_text()])
    assert tokens(tiny, path, sequences=2, seq_len=8).flatten().tolist() == whole[:16]


def test_windows_that_begin_in_a_chat_take_it_from_its_beginning(own, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (own / "chat_template.jinja").write_text(template)
    source = open_source(str(own))
    chats = [{"messages": [{"role": "user", "content": word}]} for word in numbered(400)]
    path = write_jsonl(tmp_path / "a.jsonl", chats)
    found = decoded(source, tokens(source, path, sequences=4, seq_len=16))
    assert found == [f"word{i:06}\0word{i + 1:06}"[:16] for i in (0, 100, 200, 300)]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_in_another_encoding(tiny, tmp_path, name):
    path = tmp_path / name
    path.write_bytes("ä".encode("latin-1") * 100)
    assert refusal(tiny, path).startswith(f"{path} is not UTF-8 text (")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{text: 1}", "is not JSON"),
        ('{"content": "x", "id": 1}', 'has none of "text", "messages", '),
        ('{"content": "x", "id": 1}', "(it has content, id)"),
        ('{"text": 5}', '"text" holds int, not a string'),
        ('"text"', "is str, not an object with fields"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_jsonl_line_that_is_wrong(tiny, tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    sentence = refusal(tiny, path)
    assert sentence.startswith(f"{path}, line 2")
    assert words in sentence


@pytest.mark.parametrize("letters", ["abc de", "🙂"], ids=["short tokens", "several per letter"])
@pytest.mark.parametrize("wanted", [1, 100, 1000])
def test_long_text_is_read_as_far_as_needed(tiny, tmp_path, monkeypatch, letters, wanted):
    path = tmp_path / "long.txt"
    path.write_text("".join(random.Random(0).choices(letters + "\n", k=200_000)))
    whole = packed(tiny, [path.read_text()])[:wanted]
    lengths = watch_tokenised(monkeypatch)
    assert first(tiny, path, wanted).tolist() == whole
    assert max(lengths) <= 16 * (wanted + 1 + packing.CUT_TOKENS)


def test_long_text_of_few_tokens_is_read_whole(tiny, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("ab" * 50)
    assert first(tiny, path, 1000).tolist() == packed(tiny, ["ab" * 50])


def test_half_of_a_character_is_a_question_mark(tiny, tmp_path):
    """As scraped text holds that was cut inside an emoji."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83d here \\ud83d\\ude00"}\n')
    assert tokens(tiny, path).flatten().tolist() == packed(tiny, ["cut ? here 😀"])[:16]


def test_mark_that_windows_begins_a_file_with(tiny, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a line of letters"}\n', encoding="utf-8-sig")
    assert tokens(tiny, path).flatten().tolist() == packed(tiny, ["a line of letters"])[:16]


def test_parquet_that_is_wrong(tiny, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", content=["x"], n=[1])
    assert refusal(tiny, path).endswith(" (it has content, n)")
    write_parquet(path, text=[1, 2])
    assert refusal(tiny, path) == f'{path}, row 1: "text" holds int, not a string'
    path.write_bytes(b"PAR1 no")
    assert refusal(tiny, path).startswith(f"{path} is not a parquet file: ")


def test_empty_files(tiny, tmp_path):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text("")
        assert "holds 0 tokens, but 16 are needed" in refusal(tiny, tmp_path / name)
    empty = write_parquet(tmp_path / "a.parquet", text=pyarrow.array([], pyarrow.string()))
    assert "holds 0 tokens, but 16 are needed" in refusal(tiny, empty)


# --- hf: -------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """A dataset folder with two splits and two columns of text."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split in ("train", "test"):
        rows = [
            {"text": f"{split} text {i}", "body": f"{split} body {i}", "n": i} for i in range(9)
        ]
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.mark.parametrize(
    ("suffix", "begins"),
    [
        ("", "train text 0"),
        (":test", "test text 0"),
        (":test:body", "test body 0"),
        ("::body", "train body 0"),
    ],
)
def test_dataset_split_and_column(tiny, dataset, suffix, begins):
    found = tokens(tiny, f"hf:{dataset}{suffix}", 1, 24).flatten().tolist()
    expected = packed(tiny, [begins])
    assert found[: len(expected)] == expected


@pytest.mark.parametrize(
    ("suffix", "words"),
    [
        (":train:txt", "has no column 'txt' (it has text, body, n)"),
        (":train:n", "column 'n' holds int, not strings"),
        (":dev", "can't be loaded: "),
    ],
)
def test_dataset_that_is_wrong(tiny, dataset, suffix, words):
    sentence = refusal(tiny, f"hf:{dataset}{suffix}")
    assert sentence.startswith(f"hf:{dataset}")
    assert words in sentence


def test_dataset_that_does_not_exist(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(tiny, f"hf:{tmp_path}/none").startswith(f"hf:{tmp_path}/none can't be loaded: ")


def test_dataset_while_the_network_fails(tiny, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("datasets.load_dataset", fail)
    assert refusal(tiny, "hf:org/name") == "hf:org/name can't be loaded: no route to host"


# --- self ------------------------------------------------------------------------------------


def test_self_is_drawn_from_the_model(tiny):
    found = tokens(tiny, "self", 3, 100)
    assert found.shape == (3, 100)
    assert torch.equal(found, tokens(tiny, "self", 3, 100))
    assert not torch.equal(found, tokens(tiny, "self", 3, 100, seed=1))
    assert len({tuple(row) for row in found.tolist()}) == 3


def test_self_leaves_the_random_state_alone(tiny):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tokens(tiny, "self", 1, 8)
    assert torch.equal(torch.rand(3), expected)


# --- several texts ---------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path, dataset):
    """Texts of three kinds, each of which only its own digits or words begin."""
    digits = tmp_path / "digits.txt"
    digits.write_text("0123456789" * 40)
    lines = write_jsonl(tmp_path / "lines.jsonl", [{"text": f"line {i}"} for i in range(99)])
    return [str(digits), str(lines), f"hf:{dataset}:test:body"]


@pytest.mark.parametrize("sequences", [3, 4, 5, 6])
def test_joined_texts_take_turns_in_equal_parts(tiny, three, sequences):
    found = tokens(tiny, "+".join(three), sequences)
    for place, text in enumerate(three):
        part = found[place::3]
        assert len(part) in (sequences // 3, -(-sequences // 3))
        assert torch.equal(part, tokens(tiny, text, len(part)))


@pytest.mark.parametrize("other", ["builtin", "self"])
def test_texts_that_are_no_files_can_be_joined(tiny, three, other):
    found = tokens(tiny, f"{other}+{three[0]}", 5, seed=3)
    assert torch.equal(found[0::2], tokens(tiny, other, 3, seed=3))
    assert torch.equal(found[1::2], tokens(tiny, three[0], 2))


def test_their_order_matters(tiny, three):
    first, second = (tokens(tiny, "+".join(texts), 2) for texts in (three[:2], three[1::-1]))
    assert torch.equal(first, second.flip(0))


def test_one_text_is_not_changed_by_what_others_may_do(tiny, three):
    assert calibrate.texts(three[0]) == [three[0]]
    assert calibrate.texts("+".join(three)) == three


def test_file_with_a_plus_in_its_name_is_one_text(tiny, tmp_path, monkeypatch):
    path = tmp_path / "c++.txt"
    path.write_text("int main" * 20)
    assert tokens(tiny, path).flatten().tolist() == packed(tiny, ["int main" * 20])[:16]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert calibrate.texts("~/c++.txt") == ["~/c++.txt"]


def test_too_little_of_one_text_names_that_text_and_its_part(tiny, three, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("x" * 14)
    assert refusal(tiny, f"{three[0]}+{short}", sequences=4) == (
        f"text {str(short)!r} holds 15 tokens, but 16 are needed (check included): "
        "lower `calibration_tokens`, or give more text"
    )


def test_one_text_that_can_not_be_read_is_named(tiny, three, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"\xff" * 100)
    assert refusal(tiny, f"{three[0]}+{bad}").startswith(f"{bad} is not UTF-8 text (")
    lines = write_jsonl(tmp_path / "bad.jsonl", [{"text": "fine"}, {"body": "x"}])
    assert refusal(tiny, f"{three[0]}+{lines}").startswith(f"{lines}, line 2, has none of")


@pytest.mark.parametrize(
    ("joined", "words"),
    [
        (
            "builtin+nowhere.txt",
            "`calibration='nowhere.txt'` is not a file: give mixed, builtin, self",
        ),
        ("hf:+builtin", "`calibration='hf:'` names no dataset"),
        ("builtin+", "`calibration=''` is not a file"),
        ("+", "`calibration=''` is not a file"),
        ("builtin+builtn", "`calibration='builtn'` is not a file"),
        (f"self+{__file__}", "ends in '.py': known are .txt"),
    ],
)
def test_the_plan_refuses_joined_texts_of_which_one_is_none(dense, joined, words):
    with pytest.raises(UpcycleError) as caught:
        upcycle.plan(str(dense()), calibration=joined)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("joined", ["builtin+none", "none+builtin", "none+none"])
def test_none_is_not_joined_to_anything(dense, joined):
    with pytest.raises(UpcycleError):
        upcycle.plan(str(dense()), calibration=joined)


@pytest.mark.parametrize("names", [("{}", "builtin"), ("{}", "self")])
def test_more_texts_than_sequences(tiny, three, names):
    joined = "+".join(names).format(three[0])
    assert torch.equal(tokens(tiny, joined, 1), tokens(tiny, three[0], 1))


def test_text_that_the_model_writes_comes_last(tiny, three, tmp_path, monkeypatch):
    """It takes longest, and another text may be at fault."""
    monkeypatch.setattr(calibrate, "written_tokens", lambda *_: pytest.fail("written"))
    short = tmp_path / "short.txt"
    short.write_text("x")
    assert "holds 2 tokens" in refusal(tiny, f"self+{short}+{three[0]}", sequences=3)


# --- mixed -----------------------------------------------------------------------------------


def planned_text(dense, calibration, **settings):
    plan = upcycle.plan(str(dense()), calibration=calibration, check="none", **settings)
    return plan.recipe.calibration, [note for note in plan.warnings if "own writing" in note]


def test_mixed_is_both(dense, three):
    assert planned_text(dense, "mixed") == ("builtin+self", [])
    assert planned_text(dense, f"{three[0]}+mixed") == (f"{three[0]}+builtin+self", [])
    assert upcycle.plan(str(dense())).recipe.calibration == "builtin+self"


def test_mixed_is_the_first_alone_where_nothing_is_fitted(dense):
    assert planned_text(dense, "mixed", method="copy") == ("builtin", [])


@pytest.mark.parametrize(("spare", "expected"), [(1, "builtin+self"), (-1, "builtin")])
def test_mixed_is_the_first_alone_where_the_model_does_not_fit(dense, monkeypatch, spare, expected):
    weights = sum(i.nbytes for i in open_source(str(dense())).tensors.values())
    free = SimpleNamespace(available=1.5 * weights + spare, total=2**40)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    found, notes = planned_text(dense, "mixed")
    assert found == expected
    assert len(notes) == (expected == "builtin")
    assert all("`calibration=mixed+FILE`" in note for note in notes)


# --- the tokenizer ---------------------------------------------------------------------------


def test_tokens_outside_the_vocabulary(dense):
    small = open_source(str(dense(vocab_size=100, bos_token_id=None, eos_token_id=None)))
    sentence = refusal(small, "builtin")
    assert sentence.startswith(f"the tokenizer in {small.folder} makes token ")
    assert sentence.endswith("but vocab_size is 100: it belongs to another model")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"model": {"type": "bogus"}, "added_tokens": []}']
)
def test_tokenizer_that_is_corrupt(dense, tmp_path, content):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in dense().iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text(content)
    sentence = refusal(open_source(str(folder)), "builtin")
    assert sentence.startswith(f"{folder} holds no tokenizer that transformers reads")


# --- what is held back -----------------------------------------------------------------------


def test_held_back_tokens_are_not_among_the_fitted(dense, tmp_path, monkeypatch):
    seen = {}
    stream = writing.HiddenStream

    def spy_on_stream(config, embed_VD, fit_BL, device):
        seen["fit"] = fit_BL
        return stream(config, embed_VD, fit_BL, device)

    def spy_on_check(plan, folder, held, progress, all_on):
        seen["held"] = held[plan.recipe.calibration]

    monkeypatch.setattr(writing, "HiddenStream", spy_on_stream)
    monkeypatch.setattr(conversion, "run_check", spy_on_check)
    text = tmp_path / "a.txt"
    text.write_text("".join(map(chr, range(33, 126))) * 60)
    sizes = {"calibration_tokens": 200, "seq_len": 64, "keep_dense": "none"}
    upcycle.convert(str(dense()), tmp_path / "out", calibration=str(text), **sizes)
    assert seen["fit"].shape == (3, 64)
    assert seen["held"].shape == (16, 64)
    everything = packed(open_source(str(dense())), [text.read_text()])
    windows = [everything[start : start + 64] for start in range(0, len(everything) - 63, 64)]
    places = [round(i * (len(windows) - 1) / 18) for i in range(19)]
    assert len(set(places)) == 19  # so those held back come after those fitted on
    both = torch.cat([seen["fit"], seen["held"]]).tolist()
    assert both == [windows[place] for place in places]


def test_of_each_text_the_last_sequences_are_held_back(tiny, three):
    found = calibrated(tiny, "+".join(three[:2]), 5, windows=2)
    for place, name in enumerate(three[:2]):
        mine = len(found.fit_BL[place::2])
        every_BL = tokens(tiny, name, mine + 2)
        assert torch.equal(found.fit_BL[place::2], every_BL[:mine])
        assert torch.equal(found.held[name], every_BL[mine:])
    assert list(found.held) == [*three[:2], *PROBES]


def test_what_the_model_writes_is_held_back_too(tiny):
    found = calibrated(tiny, "self", 3, 16, windows=2)
    every_BL = tokens(tiny, "self", 5, 16)
    assert torch.equal(torch.cat([found.fit_BL, found.held["self"]]), every_BL)


def test_builtin_text_has_probes_in_its_place(tiny):
    found = calibrated(tiny, "builtin", 3, windows=2)
    assert torch.equal(found.fit_BL, tokens(tiny, "builtin", 3))
    assert list(found.held) == list(PROBES)


@pytest.mark.parametrize("windows", [2, 1000])
@pytest.mark.parametrize("calibration", ["builtin", "none"])
def test_probes_are_of_every_kind_from_their_beginning(tiny, calibration, windows):
    found = calibrated(tiny, calibration, 0, 64, windows=windows).held
    for name in PROBES:
        documents = shipped("probes", name.removeprefix("probe:"))
        said = [
            each if isinstance(each, str) else "\n\n".join(turn["content"] for turn in each)
            for each in documents
        ]
        expected = torch.tensor(packed(tiny, said))
        count = min(windows, len(expected) // 64)
        assert torch.equal(found[name], expected[: count * 64].view(count, 64))


def test_probe_that_is_shorter_than_a_window_is_one(tiny, monkeypatch):
    monkeypatch.setattr(packing, "documents", lambda name, seed: iter(["x" * 20]))
    found = calibrate.probes(open_reader(tiny.folder, 300), 3, 64)
    assert {held.shape for held in found.values()} == {(1, 21)}


def test_windows_are_no_longer_than_probes_allow(tiny, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(map(chr, range(33, 126))) * 60)
    found = calibrated(tiny, path, 2, 1024, windows=3)
    every_BL = tokens(tiny, path, 4, 1024)
    assert torch.equal(found.fit_BL, every_BL[:2])
    assert torch.equal(found.held[str(path)], every_BL[2:].flatten().view(4, 512)[:3])
    assert {held.shape[1] for held in found.held.values()} == {CHECK_WINDOW}


def test_without_windows_nothing_is_held_back(tiny, three):
    assert calibrated(tiny, three[0], 3).held == {}


@pytest.mark.parametrize("name", ["builtin", "self", "none", "nowhere.txt"])
def test_text_of_which_nothing_is_wanted_is_not_read(tiny, monkeypatch, name):
    for place, reader in ((packing, "documents"), (calibrate, "written_tokens")):
        monkeypatch.setattr(place, reader, lambda *_: pytest.fail("read"))
    found = calibrated(tiny, name, 0)
    assert found.fit_BL.shape == (0, 8)
    assert found.held == {}


# --- chats -----------------------------------------------------------------------------------


def test_our_chats_are_plain_text_where_there_is_no_template(tiny):
    said = "\n\n".join(turn["content"] for turn in shipped("probes", "chat")[0])
    found = first(tiny, "probe:chat", 10_000).tolist()
    expected = packed(tiny, [said])
    assert found[: len(expected)] == expected


@pytest.mark.parametrize(
    ("file", "missing", "named"),
    [
        ("tokenizer.model", {"sentencepiece"}, "sentencepiece"),
        ("spiece.model", {"google.protobuf"}, "protobuf"),
        ("spiece.model", {"google.protobuf", "sentencepiece"}, "sentencepiece and protobuf"),
        ("qwen.tiktoken", {"tiktoken"}, "tiktoken"),
    ],
)
def test_a_library_that_a_tokenizer_needs_is_named(tmp_path, monkeypatch, file, missing, named):
    (tmp_path / file).write_bytes(b"x")
    monkeypatch.setattr(packing, "_is_installed", lambda module: module not in missing)
    with pytest.raises(UpcycleError) as found:
        packing.load_tokenizer(tmp_path)
    assert str(found.value) == (
        f"{tmp_path / file} is a tokenizer that is read by {named}: `pip install "
        "upcycle[sentencepiece]`"
    )


def test_libraries_are_looked_for():
    assert packing._is_installed("tokenizers")
    assert not packing._is_installed("nowhere_at_all")
    assert not packing._is_installed("nowhere_at_all.module")


def test_why_a_tokenizer_is_none_is_said(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Nonesuch"}}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    with pytest.raises(UpcycleError, match=r"that transformers reads.*: KeyError"):
        packing.load_tokenizer(tmp_path)


def test_a_tokenizer_that_panics_is_named(dense, tmp_path):
    for path in dense().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(UpcycleError, match=r"^the tokenizer in .* does not work: no entry found"):
        open_reader(tmp_path, 300).first("builtin", 10, seed=0)


def test_chats_in_a_file_need_a_template(tiny, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": shipped("probes", "chat")[0]}])
    assert "has no chat template" in refusal(tiny, path)


def test_a_chat_of_ours_that_the_template_refuses_is_plain_text(own):
    (own / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    reader = open_reader(own, 300)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert reader.ids(Exchange(chat), 100) == [*reader.tokenizer("ab\n\nc")["input_ids"], EOS]
    with pytest.raises(UpcycleError, match="refuses the messages"):
        reader.ids(chat, 100)


def test_what_mixed_stands_for_is_part_of_a_runs_identity(dense):
    """A resume with less memory free would fit on another text."""
    plan = upcycle.plan(str(dense()), calibration="mixed", seq_len=64)
    assert plan.recipe.calibration == "builtin+self"
    other = replace(plan, recipe=plan.recipe.model_copy(update={"calibration": "builtin"}))
    assert conversion.identity(other, 1) != conversion.identity(plan, 1)
