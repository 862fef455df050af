"""What a model goes on to write."""

import pytest
import torch
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from upcycle.evaluation.sample import PROMPTS, TOKENS, continuation, samples

CHAT = "{% for m in messages %}<s>{{ m.content }}{% endfor %}</s>"
STOP = 257


def likeliest(model, text):
    """The likeliest tokens after a text, found without a cache."""
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    while len(ids) < start + TOKENS and STOP not in ids[start:]:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.fixture
def model(dense):
    return AutoModelForCausalLM.from_pretrained(dense())


def test_text_is_continued_by_the_likeliest_tokens(model):
    model.generation_config.update(do_sample=True, temperature=2.0, repetition_penalty=1.5)
    text = continuation(model, make_tokenizer(), "abc")
    assert text == likeliest(model, "abc")
    assert len(text) > 5


def test_a_chat_template_makes_it_an_answer(model):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    assert continuation(model, tokenizer, "abc") == likeliest(model, "<s>abc</s>")
    tokenizer.chat_template = "{{ raise_exception('a system message must come first') }}"
    assert continuation(model, tokenizer, "abc") == likeliest(model, "abc")


def test_both_models_write(dense, moe):
    source = dense()
    steps = []
    found = samples(str(moe(source)), str(source), lambda *step: steps.append(step))
    model = AutoModelForCausalLM.from_pretrained(source)
    assert [sample.prompt for sample in found] == list(PROMPTS)
    for sample in found:
        assert sample.against == likeliest(model, sample.prompt)
        assert sample.text != sample.against
    assert steps == [(0, 2), (1, 2), (2, 2)]
    alone = samples(str(source), None)
    assert [(s.text, s.against) for s in alone] == [(s.against, None) for s in found]
