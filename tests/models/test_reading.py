"""The forms that text comes in: the same documents, whatever file, folder or fields hold them."""

import csv
import gzip
import json
import tracemalloc

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from upcycle import UpcycleError
from upcycle.models import reading
from upcycle.models.calibration import text_fingerprint
from upcycle.models.rows import Part, row_document
from upcycle.models.text import DataSet, check_text, documents, parse

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "How far?"},
    {"role": "assistant", "content": "Not far."},
]
SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "How far?"},
    {"from": "gpt", "value": "Not far."},
]
ROWS = [
    ({"text": "some words\n"}, "some words\n"),
    ({"text": "words", "messages": CHAT}, "words"),
    ({"text": None, "messages": CHAT}, CHAT),
    ({"messages": CHAT}, CHAT),
    ({"messages": SHAREGPT}, CHAT),
    ({"conversations": SHAREGPT}, CHAT),
    ({"conversations": CHAT}, CHAT),
    ({"prompt": "The sky is", "completion": " blue."}, "The sky is blue."),
    ({"prompt": CHAT[:2], "completion": CHAT[2:]}, CHAT),
    ({"instruction": "How far?", "output": "Not far."}, CHAT[1:]),
    (
        {"instruction": "Translate.", "input": "loin", "output": "far"},
        [
            {"role": "user", "content": "Translate.\n\nloin"},
            {"role": "assistant", "content": "far"},
        ],
    ),
    ({"instruction": "How far?", "input": "", "output": "Not far."}, CHAT[1:]),
]
NOTHING = [
    None,
    {},
    {"text": None},
    {"text": ""},
    {"text": " \n\t"},
    {"text": None, "id": 3},
    {"messages": None},
    {"messages": []},
    {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": None}]},
    {"conversations": [{"from": "human", "value": ""}]},
    {"prompt": "", "completion": None},
    {"instruction": None, "output": " "},
]


def write(path, rows):
    """A file of rows, in the form that its name says."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    kind = reading.ending(path)
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        return str(path)
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        elif kind == ".json":
            json.dump(rows, file, indent=2)
        else:
            names = list(dict.fromkeys(name for row in rows for name in row))
            table = csv.DictWriter(file, names, delimiter="\t" if kind == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return str(path)


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "document"), ROWS)
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL.GZ", "a.json", "a.Json.gz", "a.parquet"])
def test_what_a_row_says(tmp_path, name, row, document):
    path = write(tmp_path / name, [row, row])
    check_text(path)
    assert list(documents(path, 0)) == [document] * 2


@pytest.mark.parametrize(("row", "document"), ROWS)
def test_what_a_row_of_a_data_set_says(tmp_path, row, document):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", [row, row])
    assert list(documents(f"hf:{tmp_path}/data", 0)) == [document] * 2


@pytest.mark.parametrize("row", NOTHING)
def test_a_row_that_says_nothing_is_no_document(tmp_path, row):
    path = write(tmp_path / "a.jsonl", [row, {"text": "words"}, row])
    assert list(documents(path, 0)) == ["words"]
    assert row_document(row, "") is None


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "A.CSV.gz", "a.json", "a.parquet", "data"])
def test_blank_rows_are_left_out_everywhere(tmp_path, name):
    rows = [{"text": text, "id": "7"} for text in ('says "hi",\nleaves', "", " ", "ends\t", None)]
    path = tmp_path / name
    if name == "data":
        path.mkdir()
        write(path / "train.parquet", rows)
    else:
        write(path, rows)
    assert list(documents(str(path), 0)) == ['says "hi",\nleaves', "ends\t"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.TXT.gz"])
@pytest.mark.parametrize(("text", "found"), [("", []), (" \n", []), ("\n word ", ["\n word "])])
def test_blank_plain_text_is_no_document(tmp_path, name, text, found):
    path = tmp_path / name
    with (gzip.open if name.endswith("gz") else open)(path, "wt") as file:
        file.write(text)
    assert list(documents(str(path), 0)) == found


def test_columns_that_hold_a_list_of_turns(tmp_path):
    turns = {"from": ["human", "gpt"], "value": ["How far?", "Not far."]}
    path = write(tmp_path / "a.jsonl", [{"conversations": turns}])
    assert list(documents(path, 0)) == [CHAT[1:]]


def test_fields_that_only_other_messages_have_are_no_fields(tmp_path):
    calls = [{"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}]
    path = write(tmp_path / "a.parquet", [{"messages": CHAT}, {"messages": calls}])
    first, second = documents(path, 0)
    assert first == CHAT
    assert second == [{"role": "assistant", "tool_calls": [{"name": "look"}]}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "data"])
def test_an_error_names_the_fields_of_the_row(tmp_path, name):
    path = tmp_path / name
    if name == "data":
        path.mkdir()
        write(path / "train.jsonl", [{"body": "x", "prompt": "y"}])
    else:
        write(path, [{"body": "x", "prompt": "y"}])
    with pytest.raises(UpcycleError) as caught:
        list(documents(str(path), 0))
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(
        'has none of "text", "messages", "conversations", "prompt" with "completion", '
        '"instruction" with "output" (it has body, prompt)'
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": 5}, '"text" holds int, not a string'),
        ({"messages": "hi"}, '"messages" holds str, not a list of messages'),
        ({"conversations": ["hi"]}, '"conversations" holds list, not a list of messages'),
        ({"prompt": "x", "completion": 1}, '"completion" holds int, not a string'),
        ([1], "is list, not an object with fields"),
    ],
)
def test_a_field_of_another_type(tmp_path, row, words):
    with pytest.raises(UpcycleError, match=r"a\.jsonl, line 2") as caught:
        list(documents(write(tmp_path / "a.jsonl", [{"text": "x"}, row]), 0))
    assert str(caught.value).endswith(words)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a ] b"}, {"text": "c"}]',
        '\n[\n{"text": "a ] b"}\n,\n{"text": "c"}]\n',
        '{"text": "a ] b"}\n{"text": "c"}\n',
    ],
)
def test_json_is_read_object_by_object(tmp_path, monkeypatch, content, piece):
    monkeypatch.setattr(reading, "PIECE", piece)
    (tmp_path / "a.json").write_text(content)
    assert list(documents(str(tmp_path / "a.json"), 0)) == ["a ] b", "c"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_that_is_cut_off(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a"}\n{"text": "b')
    with pytest.raises(UpcycleError, match="is not JSON"):
        list(documents(str(tmp_path / name), 0))


def test_compressed_file_that_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    write(path, [{"text": str(i) * 50} for i in range(100)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UpcycleError, match="can't be read"):
        list(documents(str(path), 0))


def test_parts_of_a_long_file_end_where_words_do(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 50)
    text = " ".join(f"word{i}" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    *parts, last = documents(str(tmp_path / "a.txt"), 0)
    assert all(isinstance(part, Part) for part in parts)
    assert not isinstance(last, Part)
    assert "".join([*parts, last]) == text
    assert all(part.startswith(" word") for part in [*parts[1:], last])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch, name):
    monkeypatch.setattr(reading, "PIECE", 2**12)
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("some words " * 200_000)
    else:
        write(path, [{"text": "some words " * 40}] * 5000)
    tracemalloc.start()
    try:
        assert sum(map(len, documents(str(path), 0))) == 2_200_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**18


# --- folders and hub -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["b.md", "a/c.txt", ".git/x.txt", "figure.png"], ["a/c.txt", "b.md"]),
        (["wiki.test.raw", "wiki.train.raw", "readme.txt"], ["readme.txt", "wiki.train.raw"]),
        (["training.txt", "testimony.txt"], ["testimony.txt", "training.txt"]),
    ],
)
def test_a_folder_of_plain_text_holds_a_document_per_file(tmp_path, files, found):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n\nits second line\n")
    check_text(str(tmp_path), "data")
    assert list(documents(str(tmp_path), 0)) == [f"{name}\n\nits second line\n" for name in found]
    assert parse(str(tmp_path)).files == [tmp_path / name for name in found]


def test_a_card_beside_rows_is_no_text(tmp_path):
    (tmp_path / "README.md").write_text("a card\n")
    assert isinstance(parse(str(tmp_path)), DataSet)
    write(tmp_path / "train.jsonl", [{"text": "a row"}])
    (tmp_path / "LICENSE.txt").write_text("free")
    assert list(documents(str(tmp_path), 0)) == ["a row"]


def test_folders_that_datasets_has_saved(tmp_path):
    rows = datasets.Dataset.from_list([{"messages": CHAT}, {"messages": None}])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict({"text": ["a", ""], "body": ["c", "d"]}),
            "dev": datasets.Dataset.from_dict({"text": ["b", None], "body": ["e", "f"]}),
        }
    ).save_to_disk(tmp_path / "several")
    for name, found in {
        f"{tmp_path}/one": [CHAT],
        f"hf:{tmp_path}/one": [CHAT],
        f"{tmp_path}/several": ["a"],
        f"hf:{tmp_path}/several:dev": ["b"],
        f"hf:{tmp_path}/several:dev:body": ["e", "f"],
    }.items():
        check_text(name, "data")
        assert list(documents(name, 0)) == found
    with pytest.raises(UpcycleError, match=r"no split 'test' \(it has train, dev\)"):
        list(documents(f"hf:{tmp_path}/several:test", 0))


@pytest.fixture
def languages(tmp_path):
    """A data set of two configurations."""
    folder = tmp_path / "languages"
    lines = ["---", "configs:"]
    for name in ("fr", "nl"):
        (folder / name).mkdir(parents=True)
        write(folder / name / "train.jsonl", [{"text": name, "other": [*name]}])
        write(folder / name / "test.jsonl", [{"text": f"{name} test", "other": [*name]}])
        lines += [f"- config_name: {name}", f"  data_dir: {name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.mark.parametrize(
    ("suffix", "found"),
    [("@nl", "nl"), ("@fr:test", "fr test"), ("@nl:test:text", "nl test"), ("@fr::text", "fr")],
)
def test_a_configuration_is_named_after_the_data_set(languages, suffix, found):
    assert list(documents(f"hf:{languages}{suffix}", 0)) == [found]


@pytest.mark.parametrize(
    ("suffix", "words"),
    [("", "['fr', 'nl'] as hf:DATASET@CONFIG"), ("@en", "Available: ['fr', 'nl']")],
)
def test_configurations_are_named_by_the_error(languages, suffix, words):
    with pytest.raises(UpcycleError) as caught:
        list(documents(f"hf:{languages}{suffix}", 0))
    assert str(caught.value).endswith(words)


def test_what_the_name_of_a_data_set_says(tmp_path):
    assert parse("hf:org/d") == DataSet("hf:org/d", "org/d")
    assert parse("hf:org/d@c:s:t") == DataSet("hf:org/d@c", "org/d", "c", "s", "t")
    folder = tmp_path / "me@home"
    folder.mkdir()
    assert parse(f"hf:{folder}:test") == DataSet(f"hf:{folder}", str(folder), "", "test")


def test_files_of_a_folder_are_part_of_a_texts_identity(dense, languages):
    before = text_fingerprint(dense(), f"{languages}+builtin+self")
    write(languages / "nl" / "train.jsonl", [{"text": "another"}])
    assert text_fingerprint(dense(), f"{languages}+builtin+self") != before
