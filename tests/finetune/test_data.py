"""Training text: packing, padding, the held-out part, chats, and the order of batches."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from upcycle import UpcycleError
from upcycle.finetune.data import batch_rows, training_data, with_texts
from upcycle.models import text as text_module
from upcycle.models.text import public_texts, text_files, weighted

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no such role') }}{% endif %}"
    "<s>{{ m['role'][0] }}:{{ m['content'] }}</s>"
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def chatty(dense, tmp_path_factory):
    """A model's folder with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(dense(), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def read(folder, text, seq_len=16, train_tokens=10**6, validation_tokens=32):
    return training_data(
        folder, 272, str(text), seq_len=seq_len, train_tokens=train_tokens,
        validation_tokens=validation_tokens, seed=0,
    )  # fmt: skip


def tokens(*parts):
    return [data.tokens_BL[data.mask_BL] for data in parts]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- packing ---------------------------------------------------------------------------------


def test_documents_are_joined_cut_and_only_the_last_row_is_padded(dense, tmp_path):
    lines = [f"document {i} of some length." for i in range(40)]
    path = jsonl(tmp_path / "x.jsonl", *({"text": line} for line in lines))
    train, held = read(dense(), path)
    ids = torch.cat(tokens(train, held)).tolist()
    assert len(ids) == sum(len(line) + 1 for line in lines)
    letters = AutoTokenizer.from_pretrained(dense())
    text = letters.decode(ids).replace(" ", "").replace("Ġ", " ")
    assert text.split("</s>") == [*lines, ""]
    assert bool(train.mask_BL.all())
    assert len(held) == 2
    count = len(ids) % 16
    assert held.mask_BL[-1].tolist() == [True] * count + [False] * (16 - count)
    assert not held.tokens_BL[~held.mask_BL].any()


@pytest.mark.parametrize("letters", [100, 300])
def test_sequences_are_of_all_parts_of_a_text_and_its_end_validates(dense, tmp_path, letters):
    """Whether the text is tokenised whole or, where it is long, in places."""
    parts = "abcdefghij"
    path = jsonl(tmp_path / "x.jsonl", *({"text": p * letters} for p in parts for _ in range(20)))
    train, held = read(dense(), path, train_tokens=640, validation_tokens=48)
    assert (len(train), len(held)) == (40, 3)
    text = AutoTokenizer.from_pretrained(dense()).decode(train.tokens_BL.flatten())
    assert [text.count(part) > 10 for part in parts] == [True] * 10
    end = AutoTokenizer.from_pretrained(dense()).decode(held.tokens_BL.flatten())
    assert set(end) <= set("j </s>")
    (used,) = train.used
    assert (used.text, used.tokens, used.held_out) == ("x.jsonl", 640, 48)
    assert used.total == pytest.approx(200 * (letters + 1), rel=0.1)


def test_as_much_validates_as_is_asked_for_of_a_text_that_holds_it(dense, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a" * 1000)
    train, held = read(dense(), path, train_tokens=320, validation_tokens=480)
    assert (len(train), len(held)) == (20, 30)
    train, held = read(dense(), path, train_tokens=800, validation_tokens=480)
    assert (len(train), len(held)) == (57, 6)


@pytest.mark.parametrize(
    ("seq_len", "tokens", "remedy"), [(16, 128, "`validation_tokens=…`"), (128, 128, "`seq_len`")]
)
def test_what_is_validated_on_too_is_too_short_for_a_setting(
    dense, text, tmp_path, seq_len, tokens, remedy
):
    path = tmp_path / "x.txt"
    path.write_text("a" * 99)
    _, held = read(dense(), text, seq_len)
    with pytest.raises(UpcycleError, match=f"of `validate_also=.*`: lower {remedy}, or give more"):
        with_texts(held, dense(), 272, str(path), seq_len=seq_len, tokens=tokens, seed=0)


def test_a_text_that_is_used_up_says_so(dense, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("a" * 319)  # and the end of the sequence
    train, _ = read(dense(), path)
    (used,) = train.used
    assert (used.tokens, used.held_out, used.total) == (288, 32, 320)


def test_of_a_hub_dataset_the_first_sequences_train_and_the_next_validate(dense, monkeypatch):
    """Which is read no further: nobody knows where it ends."""
    rows = []

    def stream(*_, **named):
        for letter in "abcdefgh":
            rows.append(letter)
            yield letter * 159

    monkeypatch.setattr(text_module, "read_dataset", stream)
    train, held = read(dense(), "hf:some/data", train_tokens=320, validation_tokens=32)
    assert rows == ["a", "b", "c"]
    (used,) = train.used
    assert (used.text, used.tokens, used.total) == ("hf:some/data", len(train) * 16, None)
    assert set(AutoTokenizer.from_pretrained(dense()).decode(held.tokens_BL.flatten())) <= set("c ")


def test_rows_that_validate_never_train(dense, text):
    train, held = read(dense(), text)
    rows = {tuple(row) for row in train.tokens_BL.tolist()}
    assert not rows & {tuple(row) for row in held.tokens_BL.tolist()}
    assert batch_rows(len(train), 7, 100, 0).max() < len(train)


def test_texts_may_count_more_than_others(dense, tmp_path):
    """By what stands after a star, unless a file has that name; in both parts."""
    for name in ("a.txt", "b.txt", "c*2"):
        (tmp_path / name).write_text(name[0] * 9000)
    data = f"{tmp_path / 'a.txt'}*3+{tmp_path / 'b.txt'}*0.5+{tmp_path / 'c*2'}"
    assert [(Path(name).name, float(weight)) for name, weight in weighted(data)] == [
        ("a.txt", 3), ("b.txt", 0.5), ("c*2", 1),
    ]  # fmt: skip
    assert public_texts(data) == "a.txt*3+b.txt*0.5+c*2"
    joined = f"{tmp_path / 'a.txt'}*3+{tmp_path / 'b.txt'}"
    train, _ = read(dense(), joined, train_tokens=640, validation_tokens=64)
    assert [used.tokens for used in train.used] == [480, 160]
    assert [used.held_out for used in train.used] == [48, 16]
    assert [used.text for used in train.used] == ["a.txt", "b.txt"]
    assert train.text_B.bincount().tolist() == [30, 10]
    assert text_files(joined) == [tmp_path / "a.txt", tmp_path / "b.txt"]


def test_several_texts_give_equal_parts_to_both(dense, tmp_path):
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 3000)
    joined = f"{tmp_path / 'a.txt'}+{tmp_path / 'b.txt'}"
    train, held = read(dense(), joined, train_tokens=640, validation_tokens=64)
    for part, count in ((train, 20), (held, 2)):
        firsts_B = part.tokens_BL[:, 0]
        assert torch.equal(part.tokens_BL, firsts_B[:, None].expand(-1, 16))
        assert firsts_B.unique(return_counts=True)[1].tolist() == [count, count]


def test_of_every_text_two_sequences_are_taken_however_few_are_asked(dense, tmp_path):
    for letter in "abcd":
        (tmp_path / f"{letter}.txt").write_text(letter * 500)
    text = "+".join(str(tmp_path / f"{letter}.txt") for letter in "abcd")
    train, held = read(dense(), text, train_tokens=32, validation_tokens=2)
    assert len(train) == len(held) == 4
    assert [used.total for used in train.used] == [501] * 4  # with the mark of its end


def test_a_last_row_of_one_token_is_left_out(dense, tmp_path):
    """It would predict nothing, and its mean loss be 0 / 0."""
    path = tmp_path / "x.txt"
    path.write_text("a" * 160)  # and the end of the sequence
    _, held = read(dense(), path)
    assert bool(held.mask_BL.all())
    path.write_text("a" * 161)
    _, held = read(dense(), path)
    assert int(held.mask_BL[-1].sum()) == 2


# --- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sequences", "batch_size"), [(10, 4), (3, 8), (12, 4)])
def test_every_row_comes_once_per_pass_in_another_order(sequences, batch_size):
    steps = -(-3 * sequences // batch_size)
    rows = torch.cat([batch_rows(sequences, batch_size, step, 0) for step in range(steps)])
    assert len(rows) == steps * batch_size
    passes = [rows[i * sequences : (i + 1) * sequences].tolist() for i in range(3)]
    assert all(sorted(order) == list(range(sequences)) for order in passes)
    assert len({tuple(order) for order in passes}) > 1


def test_batches_depend_on_step_and_seed_alone():
    first = batch_rows(20, 4, 7, 0)
    torch.rand(3)
    assert torch.equal(batch_rows(20, 4, 7, 0), first)
    assert not torch.equal(batch_rows(20, 4, 8, 0), first)
    assert not torch.equal(batch_rows(20, 4, 7, 1), first)


# --- kinds of text ---------------------------------------------------------------------------


def test_chats_go_through_the_template(chatty, tmp_path):
    chat = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
    path = jsonl(tmp_path / "x.jsonl", *[{"messages": chat}] * 10)
    ids = torch.cat(tokens(*read(chatty, path))).tolist()
    plain = jsonl(tmp_path / "y.jsonl", *[{"text": "<s>u:hi there</s><s>a:hello</s>"}] * 10)
    assert ids == torch.cat(tokens(*read(chatty, plain))).tolist()
    assert ids[:3].count(256) == 1  # special tokens are the template's, and tokens


def test_text_is_preferred_and_both_kinds_may_mix(chatty, tmp_path):
    path = jsonl(
        tmp_path / "x.jsonl",
        {"text": "abc" * 20, "messages": []},
        {"messages": [{"role": "user", "content": "x" * 40}]},
    )
    assert sum(map(len, tokens(*read(chatty, path)))) == 61 + 1 + 2 + 40 + 1


def test_parquet_is_what_its_text_column_says(dense, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {i} of a table" for i in range(20)]
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "x.parquet")
    jsonl(tmp_path / "x.jsonl", *({"text": row} for row in rows))
    both = [torch.cat(tokens(*read(dense(), tmp_path / f"x.{k}"))) for k in ("parquet", "jsonl")]
    assert torch.equal(*both)
    parquet.write_table(pyarrow.table({"body": rows}), tmp_path / "y.parquet")
    with pytest.raises(UpcycleError, match=r'has none of "text", .* \(it has body\)'):
        read(dense(), tmp_path / "y.parquet")


USER = [{"role": "user", "content": "x" * 60}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", r"holds 0 tokens, but two sequences of 16 .* on: give more text"),
        ("x.txt", b"a" * 16, r"holds 17 tokens, but two sequences of 16 .* lower `seq_len`"),
        ("x.txt", b"caf\xe9" * 60, "is not UTF-8 text"),
        ("x.jsonl", b"", r"holds 0 tokens"),
        ("x.jsonl", b'{"body": "x"}', r'line 1, has none of "text", .* \(it has body\)'),
        ("x.jsonl", b'{"messages": []}', "holds 0 tokens"),
        (
            "x.jsonl",
            b'{"messages": ["hi"]}',
            'line 1: "messages" holds list, not a list of messages',
        ),
        ("x.jsonl", b'\n{"text": "x"', "line 2, is not JSON"),
        ("x.jsonl", json.dumps({"messages": USER}).encode(), "has no chat template"),
    ],
)
def test_text_that_does_not_serve_is_named(dense, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UpcycleError, match=message) as caught:
        read(dense(), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_chat_that_the_template_refuses_is_shown(chatty, tmp_path):
    path = jsonl(tmp_path / "x.jsonl", {"messages": [{"role": "tool", "content": "x"}]})
    with pytest.raises(UpcycleError, match=r"refuses the messages .*tool.*no such role"):
        read(chatty, path)
