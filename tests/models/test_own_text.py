"""What a model writes: on from our openers, the same every time, and kept for the next time."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from reference import load

from upcycle import UpcycleError
from upcycle.models import own_text as writer
from upcycle.models.opening import open_source
from upcycle.models.own_text import repetition, written_tokens
from upcycle.models.text import KINDS, openers, paragraphs
from upcycle.models.tokens import load_tokenizer

EOS, WANTED = 257, 700
CPU = torch.device("cpu")
TOKENIZER = SimpleNamespace(tokenize=lambda text: ["as", "long", "as", "any"])
PROSE = [kind for kind in KINDS if kind != "chat"]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and little to write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(writer, "LENGTH", 12)
    monkeypatch.setattr(writer, "TOGETHER", 4)
    monkeypatch.setattr(writer, "MOST_LANGUAGES", 0)
    monkeypatch.setattr(writer, "paragraphs", lambda _: {"en": ["one two"]})
    return tmp_path / "cache" / "upcycle" / "written"


@pytest.fixture
def own(dense, tmp_path):
    """A copy of the model's folder, to be changed."""
    return shutil.copytree(dense(), tmp_path / "own")


def written(folder, wanted=WANTED, seed=0):
    return written_tokens(open_source(str(folder)), load_tokenizer(folder), wanted, seed, CPU)


def begun(folder, places):
    """The openers' tokens: one of every kind in turn."""
    turns = [opener for row in zip(*map(openers, PROSE), strict=True) for opener in row]
    return [load_tokenizer(folder)(turns[place])["input_ids"] for place in places]


def no_model(*_, **__):
    pytest.fail("the model was loaded")


# --- what is written -------------------------------------------------------------------------


def test_documents_go_on_from_openers_of_every_kind_in_turn(dense):
    found = written(dense(), 2000).tolist()
    assert len(found) >= 2000
    for prompt in begun(dense(), range(8)):
        length = len(prompt)
        assert found[:length] == prompt
        end = found.index(EOS)
        assert 0 <= end - length <= 12
        found = found[end + 1 :]


@pytest.fixture
def few(monkeypatch):
    """Two openers of each kind."""
    monkeypatch.setattr(writer, "openers", lambda kind: openers(kind)[:2])


def test_openers_begin_again_with_other_endings_until_there_is_enough(dense, few):
    wanted = 6000
    tokens = written(dense(), wanted)
    starts = [0, *((tokens == EOS).nonzero()[:, 0] + 1).tolist()]
    assert starts.pop() == len(tokens)  # all are ended
    assert starts[-4] < wanted  # no batch more than that
    first = begun(dense(), [0])[0]
    endings = [
        tuple(tokens[start + len(first) :][:5].tolist())
        for start in starts
        if tokens[start : start + len(first)].tolist() == first
    ]
    assert len(set(endings)) == len(endings) > 1


def test_another_seed_writes_something_else(dense):
    first, other = written(dense()), written(dense(), seed=1)
    length = min(len(first), len(other))
    assert not torch.equal(first[:length], other[:length])


def test_random_state_is_left_alone(dense):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    written(dense())
    assert torch.equal(torch.rand(3), expected)


def test_progress_ends_with_all_that_is_wanted(dense):
    seen = []
    source = open_source(str(dense()))
    progress = lambda *step: seen.append(step)  # noqa: E731
    written_tokens(source, load_tokenizer(source.folder), WANTED, 0, CPU, progress)
    assert seen[0] == ("writing text", 0, WANTED)
    assert seen[-1] == ("writing text", WANTED, WANTED)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def stub(replies, eos=EOS, parameters=10):
    """A model that gives these answers, and what it was asked for."""
    asked = {}

    def generate(ids_BL, **settings):
        asked.update(settings, ids=ids_BL)
        longest = max(map(len, replies))
        rows = [reply + [eos] * (longest - len(reply)) for reply in replies]
        return torch.cat([ids_BL, torch.tensor(rows)], dim=1)

    model = SimpleNamespace(
        device=CPU,
        generate=generate,
        parameters=lambda: iter([SimpleNamespace(numel=lambda: parameters)]),
        generation_config=SimpleNamespace(eos_token_id=eos),
    )
    return model, asked


def answers(model, prompts, eos=EOS):
    return list(writer._write(model, SimpleNamespace(eos_token_id=eos), prompts))


def test_prompts_of_different_length_end_together():
    model, asked = stub([[7, 8], [9]])
    assert answers(model, [[1, 2, 3], [4]]) == [[1, 2, 3, 7, 8, EOS], [4, 9, EOS]]
    assert asked["ids"].tolist() == [[1, 2, 3], [EOS, EOS, 4]]
    assert asked["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_document_ends_at_any_of_the_models_ends():
    model, asked = stub([[7, 300, 8], [9, EOS, 8]])
    model.generation_config.eos_token_id = [300, 301]
    assert answers(model, [[1], [2]]) == [[1, 7, EOS], [2, 9, EOS]]
    assert asked["eos_token_id"] == [EOS, 300, 301]


def test_documents_that_repeat_themselves_are_left_out():
    model, _ = stub([[5, 6] * 6, list(range(12)), [1, 2, 3, 4] * 3])
    assert answers(model, [[1], [2], [3]]) == [[2, *range(12), EOS]]


def test_nothing_joins_documents_where_the_tokenizer_has_no_end():
    model, _ = stub([[7, 8], [9, 6]], eos=None)
    assert answers(model, [[1], [2]], eos=None) == [[1, 7, 8], [2, 9, 6]]


@pytest.mark.parametrize(("parameters", "temperature"), [(10**9 - 1, 0.9), (10**9, 1.0)])
def test_small_models_write_cooler(parameters, temperature):
    model, asked = stub([[1]], parameters=parameters)
    answers(model, [[1]])
    assert asked["temperature"] == temperature
    assert (asked["top_p"], asked["top_k"], asked["do_sample"]) == (0.95, 0, True)


def test_model_that_only_repeats_itself_is_an_error(dense, few, monkeypatch):
    monkeypatch.setattr(writer, "repetition", lambda tokens: 1.0)
    with pytest.raises(
        UpcycleError, match=r"repeats itself in all that it writes.*builtin"
    ) as error:
        written(dense())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0),
        ([1, 1, 1], 0),  # too few for a run of four
        ([1, 2, 3, 4, 5], 0),
        ([1, 1, 1, 1, 1], 1 / 2),
        ([1, 2, 1, 2, 1, 2, 1], 1 / 2),  # 1212 2121 1212 2121
        ([1, 2, 3, 4, 9, 1, 2, 3, 4], 1 / 6),  # 1234 again
    ],
)
def test_repetition_by_hand(tokens, share):
    assert repetition(tokens) == pytest.approx(share)


# --- chats -----------------------------------------------------------------------------------


def prompts(folder):
    return writer._prompts(load(folder).requires_grad_(False), load_tokenizer(folder))


def tokens_of(folder, texts):
    return [load_tokenizer(folder)(text)["input_ids"] for text in texts]


def test_without_a_template_there_are_no_chats(own):
    turns = [opener for row in zip(*map(openers, PROSE), strict=True) for opener in row]
    assert prompts(own) == tokens_of(own, turns)


def test_with_a_template_every_eighth_is_a_question(own):
    (own / "chat_template.jinja").write_text(TEMPLATE)
    found = prompts(own)
    assert len(found) == 24 * len(KINDS)
    expected = [f"[user]{question}[assistant]" for question in openers("chat")]
    assert found[7::8] == tokens_of(own, expected)


# --- languages -------------------------------------------------------------------------------


@pytest.fixture
def nats(monkeypatch):
    """What the paragraphs of each language cost, two of a language."""
    cost = {"en": 10.0, "de": 15.0, "fr": 20.0, "pl": 20.1, "zh": 12.0, "fi": 40.0}
    texts = {name: [f"{name} {i}" for i in range(2)] for name in cost}
    monkeypatch.setattr(writer, "paragraphs", lambda folder: {"docs": texts}[folder])
    monkeypatch.setattr(writer, "_nats", lambda model, tokenizer, text: cost[text[:2]])
    monkeypatch.setattr(writer, "MOST_LANGUAGES", 8)


def test_foreign_languages_are_those_that_cost_at_most_twice_as_much(nats):
    found = writer._foreign_paragraphs(None, TOKENIZER)
    assert found == ["zh 0", "zh 1", "de 0", "de 1", "fr 0", "fr 1"]


def test_only_the_best_known_languages_are_written_in(nats, monkeypatch):
    monkeypatch.setattr(writer, "MOST_LANGUAGES", 1)
    assert writer._foreign_paragraphs(None, TOKENIZER) == ["zh 0", "zh 1"]


def test_prompts_of_other_languages_lie_between_the_openers(nats, own):
    found, every = prompts(own), len(PROSE) + 1
    expected = ["zh 0", "zh 1", "de 0", "de 1", "fr 0", "fr 1"]
    assert found[every - 1 : 6 * every : every] == tokens_of(own, expected)
    assert len(found) == 24 * len(PROSE) + 6


def test_cost_of_a_text_is_its_loss_by_transformers(dense):
    model, tokenizer = load(dense()), load_tokenizer(dense())
    ids = torch.tensor([tokenizer("Guten Tag.")["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
        nats = writer._nats(model, tokenizer, "Guten Tag.")
    assert nats == pytest.approx(loss * (ids.numel() - 1), rel=1e-5)


@pytest.mark.parametrize("language", ["de", "ja", "zh"])
def test_beginnings_of_paragraphs_are_a_few_words(language):
    for text in paragraphs("docs").get(language, ["ein Wort " * 40]):
        begin = writer._beginning(text)
        assert text.startswith(begin)
        spaced = text.count(" ") > 24
        assert len(begin.split(" ")) == 12 if spaced else len(begin) == 24


# --- what is kept ----------------------------------------------------------------------------


def test_what_is_kept_is_given_again_without_the_model(dense, cache, monkeypatch):
    first = written(dense())
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(writer, "load_whole", no_model)
    assert torch.equal(written(dense()), first)
    assert first.dtype == written(dense()).dtype == torch.int64


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2", b"{}", b"null", b"7", b"[[1]]", b"\xff"])
def test_corrupt_cache_is_rewritten(dense, cache, content):
    first = written(dense())
    (place,) = cache.iterdir()
    whole = place.read_bytes()
    place.write_bytes(content)
    assert torch.equal(written(dense()), first)
    assert place.read_bytes() == whole


def test_cache_that_holds_too_little_is_rewritten(dense, cache):
    first = written(dense())
    (place,) = cache.iterdir()
    place.write_text("[1, 2, 3]")
    assert torch.equal(written(dense()), first)


def test_cache_that_can_not_be_written_is_no_error(dense, cache, monkeypatch):
    cache.parents[1].write_text("a file where the folder would be")
    first = written(dense())
    assert torch.equal(written(dense()), first)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(cache.parents[1]))
    assert torch.equal(written(dense()), first)


def test_by_default_it_is_in_the_home_folder(dense, cache, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    written(dense())
    assert len(list((tmp_path / "home" / ".cache" / "upcycle" / "written").iterdir())) == 1
    assert not cache.exists()


@pytest.mark.parametrize("change", ["wanted", "seed", "template", "weights", "openers"])
def test_what_the_text_depends_on_tells_caches_apart(own, cache, monkeypatch, change):
    def place(wanted=WANTED, seed=0):
        return writer._cache(open_source(str(own)), wanted, seed, CPU)

    first = place()
    assert place() == first
    if change == "template":
        (own / "chat_template.jinja").write_text(TEMPLATE)
    elif change == "weights":
        file = own / "model.safetensors"
        half = file.stat().st_size // 2
        file.write_bytes(file.read_bytes()[:half] + bytes(half))
    elif change == "openers":
        monkeypatch.setattr(writer, "openers", lambda kind: ["once"])
    other = {"wanted": lambda: place(WANTED + 1), "seed": lambda: place(seed=1)}
    assert other.get(change, place)() != first
    assert first.parent == cache


def test_a_template_that_refuses_a_question_is_asked_none(dense):
    tokenizer = load_tokenizer(dense())
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert writer._asked(tokenizer, "Why?") == []


def test_a_template_brings_its_own_special_tokens():
    seen = []

    def tokenize(text, **settings):
        seen.append((text, settings["add_special_tokens"]))
        return {"input_ids": [1, 2]}

    class Tokenizer(SimpleNamespace):
        __call__ = staticmethod(tokenize)

    template = "{{ bos_token }}{{ messages[0].content }}"
    tokenizer = Tokenizer(
        chat_template=template,
        get_chat_template=lambda: template,
        special_tokens_map={"bos_token": "<s>"},
    )
    assert writer._asked(tokenizer, "Why?") == [[1, 2]]
    assert seen == [("<s>Why?", False)]
