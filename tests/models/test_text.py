"""Texts: what their names stand for, and what ships with upcycle."""

import json
from collections import Counter
from itertools import accumulate, islice

import pytest

from upcycle import UpcycleError
from upcycle.models import text
from upcycle.models.text import (
    KINDS,
    PROBES,
    builtin,
    check_text,
    documents,
    openers,
    paragraphs,
    shipped,
)

CODE = "standard library"


def letters(document):
    """A document as a text, of a chat all that is said."""
    if isinstance(document, str):
        return document
    return "\n".join(message["content"] for message in document)


def kind_of(folder):
    """The kind of each document of builtin text."""
    found = {letters(document): kind for kind in KINDS for document in shipped(folder, kind)}
    return found | {letters(module): CODE for module in text._standard_library()}


# --- builtin ---------------------------------------------------------------------------------


def test_builtin_is_every_document_of_every_kind_once():
    expected = kind_of("docs")
    assert Counter(map(letters, builtin(0))) == Counter(list(expected))
    assert set(expected.values()) == {*KINDS, CODE}


def test_order_of_builtin_is_the_seeds():
    first, again, other = (list(map(letters, documents("builtin", seed))) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)


@pytest.mark.parametrize("seed", [0, 1])
def test_kinds_are_mixed_evenly_from_beginning_to_end(seed):
    """Of n documents a kind has its share, but for what halves of documents add up to."""
    kinds = kind_of("docs")
    order = [kinds[letters(document)] for document in builtin(seed)]
    total, each = len(order), Counter(order)
    for n, seen in enumerate(accumulate((Counter([k]) for k in order), Counter.__add__), 1):
        for kind, count in each.items():
            share = count / total
            assert abs(seen[kind] - n * share) <= 0.5 + share * len(each) / 2


def test_builtin_is_enough_for_the_default():
    """Sequences are taken from all over a text: it is to be several times what is taken."""
    assert sum(len(letters(document)) for document in builtin(0)) > 16 * 32768


def test_no_kind_outweighs_the_others():
    """There is more of code, which looks less alike."""
    sizes = Counter()
    for document, kind in kind_of("docs").items():
        sizes[kind] += len(document)
    assert max(sizes.values()) < 4 * min(sizes.values())


def test_modules_that_this_python_lacks_are_left_out(monkeypatch):
    monkeypatch.setattr(text, "MODULES", ["none_such", "json/decoder"])
    (module,) = text._standard_library()
    assert module.startswith('"""Implementation of JSONDecoder')
    assert len(module) == text.MODULE_MOST


# --- the corpus ------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["docs", "probes"])
def test_documents_of_the_corpus_are_whole(folder):
    for kind in KINDS:
        found = shipped(folder, kind)
        assert len(found) > 1 or (folder, kind) == ("probes", "code")
        assert all(letters(document).strip() for document in found)
        assert not any(line == "%" for d in found for line in letters(d).splitlines())
        assert all(isinstance(document, str) for document in found) == (kind != "chat")


@pytest.mark.parametrize("folder", ["docs", "probes"])
def test_chats_take_turns(folder):
    for chat in shipped(folder, "chat"):
        roles = [message["role"] for message in chat if message["role"] != "system"]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]
        assert roles[-1] == "assistant"


def lines_of(folder):
    """Lines that are long enough to be found by no chance."""
    every = [letters(d) for kind in KINDS for d in shipped(folder, kind)]
    every += [each for found in paragraphs(folder).values() for each in found]
    return {line.strip() for each in every for line in each.splitlines() if len(line) > 40}


def test_nothing_of_the_probes_is_fitted_on():
    docs, probes = lines_of("docs"), lines_of("probes")
    assert not docs & probes
    begun = {line for kind in KINDS for line in openers(kind) if len(line) > 20}
    assert not any(line.startswith(tuple(begun)) for line in probes)


@pytest.mark.parametrize("folder", ["docs", "probes"])
def test_every_language_has_the_same_paragraphs(folder):
    found = paragraphs(folder)
    assert len(found) > 5
    assert {len(texts) for texts in found.values()} == {len(found["en"])}
    assert len({each for texts in found.values() for each in texts}) == sum(
        map(len, found.values())
    )


def test_openers_are_as_many_of_every_kind():
    counts = {kind: len(set(openers(kind))) for kind in KINDS}
    assert set(counts.values()) == {24}
    assert all("\\n" not in opener and opener for kind in KINDS for opener in openers(kind))
    assert any("\n" in opener for opener in openers("code"))


# --- names -----------------------------------------------------------------------------------


def test_a_probe_is_its_kinds_documents():
    assert tuple(f"probe:{kind}" for kind in KINDS) == PROBES
    for name, kind in zip(PROBES, KINDS, strict=True):
        assert list(documents(name, 3)) == shipped("probes", kind)


def test_probes_are_all_of_them():
    found = [letters(document) for document in documents("probes", 0)]
    assert Counter(found) == Counter(letters(d) for kind in KINDS for d in shipped("probes", kind))
    kinds = {letters(d): kind for kind in KINDS for d in shipped("probes", kind)}
    most = max(Counter(kinds.values()).values())
    assert {kinds[each] for each in islice(found, 2 * most)} >= {"chat", "web", "news"}


def test_file_of_an_own_name_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    assert list(documents(str(path), 0)) == ["some text"]
    chat = [{"role": "user", "content": "hello"}]
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"messages": chat}) + "\n" + json.dumps({"text": "plain"}))
    assert list(documents(str(lines), 0)) == [chat, "plain"]


@pytest.mark.parametrize("name", ["builtin", "self", "mixed", "none", "hf:org/name", "hf:a:b:c"])
def test_names_of_calibration_texts(name):
    check_text(name)


@pytest.mark.parametrize("name", ["builtin", "probes", "probe:code", "hf:org/name"])
def test_names_of_texts_to_measure_on(name):
    check_text(name, "text")


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("probes", "calibration"),
        ("probe:web", "calibration"),
        ("probe:none", "text"),
        ("self", "text"),
        ("mixed", "text"),
        ("none", "text"),
        ("nowhere.txt", "calibration"),
        ("hf:", "text"),
        ("hf::train", "text"),
        (__file__, "text"),
    ],
)
def test_texts_that_are_refused(name, field):
    with pytest.raises(UpcycleError) as caught:
        check_text(name, field)
    assert str(caught.value).startswith(f"`{field}={name!r}` ")
    assert "\n" not in str(caught.value)
