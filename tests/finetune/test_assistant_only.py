"""Loss on the assistant's turns alone: which tokens these are, and what is learnt from them."""

import json
import shutil

import pytest
import torch
from reference import load, logits
from tiny import make_tokenizer
from torch.nn import functional

from upcycle import UpcycleError
from upcycle.finetune.assistant import assistant_tokens
from upcycle.finetune.data import training_data
from upcycle.finetune.run import finetune
from upcycle.models.tokens import Reader, front_tokens

PLAIN = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'][0] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'][0] }}]"
    "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% else %}…{% endif %}</s>"
    "{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
"""It leaves earlier answers out, as templates do with thoughts."""
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "good day"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
ANSWERS = "good day</s>so long</s>"


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def reader_with(template, folder):
    tokenizer = tokenizer_with(template)
    return Reader(folder, tokenizer, 272, front_tokens(tokenizer))


def spelt(tokenizer, ids):
    """The text of tokens that are bytes."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    return "".join(pieces).replace("Ġ", " ")


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "by marks"])
def test_the_assistants_tokens_are_its_answers(tmp_path, template):
    reader = reader_with(template, tmp_path)
    tokenizer = reader.tokenizer
    ids, inside = assistant_tokens(reader, CHAT)
    assert spelt(tokenizer, ids) == "[u]hello</s>[a]good day</s>[u]bye</s>[a]so long</s>"
    assert spelt(tokenizer, [i for i, own in zip(ids, inside, strict=True) if own]) == ANSWERS


@pytest.mark.parametrize(
    ("template", "document", "sentence"),
    [
        (FORGETFUL, CHAT, r"has no \{% generation %\} marks .* or drop `assistant_only_loss`"),
        (None, CHAT, "needs a chat template, and the tokenizer in .* has none"),
        (PLAIN, "no chat", "the text is not all chats"),
        ("{{ raise_exception('odd') }}", CHAT, "refuses the messages .*: odd"),
    ],
)
def test_what_tells_nothing_is_refused_in_one_sentence(tmp_path, template, document, sentence):
    with pytest.raises(UpcycleError, match=sentence) as caught:
        assistant_tokens(reader_with(template, tmp_path), document)
    assert "\n" not in str(caught.value)


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(60)))
    return path


@pytest.fixture
def chatty(moe, dense, tmp_path):
    """A converted model whose tokenizer has a template."""
    folder = tmp_path / "chatty"
    shutil.copytree(moe(dense()), folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    return folder


def read(folder, path, seq_len=16, tokens=320):
    return training_data(
        folder, 272, str(path), seq_len=seq_len, train_tokens=tokens, validation_tokens=32,
        seed=0, assistant_only=True,
    )  # fmt: skip


def test_every_sequence_holds_something_to_learn_and_only_answers_are_scored(chatty, chats):
    tokenizer = tokenizer_with(PLAIN)
    train, held = read(chatty, chats, seq_len=8)
    for data in (train, held):
        assert data.scored_BL[:, 1:].any(1).all()
        assert bool(data.mask_BL.all())
        scored = spelt(tokenizer, data.tokens_BL[data.scored_BL].tolist())
        assert set(scored.replace("</s>", "")) <= set("good dayso long")
        assert set(scored) & set("gdlns")
    (used,) = train.used
    assert used.tokens == train.tokens_BL.numel()


def test_chats_without_an_answer_are_not_too_short(chatty, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text((json.dumps({"messages": CHAT[:1]}) + "\n") * 60)
    with pytest.raises(UpcycleError, match="no words of the assistant: give chats in which"):
        read(chatty, path)


def test_the_loss_is_that_of_the_answers_alone(chatty, chats, tmp_path):
    settings = {"steps": 2, "seq_len": 32, "batch_size": 2, "validation_tokens": 64, "lr": 1e-3}
    done = finetune(
        str(chatty), tmp_path / "out", preset="specialise", data=str(chats),
        assistant_only_loss=True, **settings,
    )  # fmt: skip
    _, held = training_data(
        chatty, 272, str(chats), seq_len=32, train_tokens=128, validation_tokens=64, seed=0,
        assistant_only=True,
    )  # fmt: skip
    model, losses = load(chatty), []
    for tokens_L, scored_L in zip(held.tokens_BL, held.scored_BL, strict=True):
        z_LV = logits(model, tokens_L[None])[0]
        each = functional.cross_entropy(z_LV[:-1], tokens_L[1:], reduction="none")
        losses.append(each[scored_L[1:]])
    assert done.before["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)
    assert done.last["loss"] > 0


def test_micro_batches_change_no_loss_where_sequences_hold_unequal_amounts_to_learn(
    chatty, dense, tmp_path
):
    """What is a mean over all tokens, or over those that foretell, is that of the whole step."""
    path = tmp_path / "uneven.jsonl"
    answers = ["ok" if number % 3 else "so long, and a good day " * 3 for number in range(60)]
    path.write_text(
        "".join(
            json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": answer}]}) + "\n"
            for answer in answers
        )
    )
    settings = {
        "preset": "specialise", "steps": 2, "seq_len": 16, "batch_size": 4, "lr": 1e-3,
        "validation_tokens": 32, "data": str(path), "assistant_only_loss": True,
        "teacher": str(dense()), "distill": 1.0, "match_layers": 1.0,
        "router_losses": {"cv2": 0.1, "entropy": 0.1},
    }  # fmt: skip
    parts = finetune(str(chatty), tmp_path / "parts", micro_batch=1, **settings)
    whole = finetune(str(chatty), tmp_path / "whole", micro_batch=4, **settings)
    names = "loss", "next_token", "distill", "match_layers", "balance", "z_loss", "cv2", "entropy"
    for one, other in zip(parts.log, whole.log, strict=True):
        for name in (*names, "grad_norm") if "loss" in one else ():
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
