"""Chat templates: rendered as transformers renders them, in a process that is ended in time."""

import pytest
from tiny import make_tokenizer

from upcycle import UpcycleError
from upcycle.models import chat
from upcycle.models.chat import ChatRefused, render_chat

CHAT = [{"role": "user", "content": "é \ud83d <b>"}, {"role": "assistant", "content": None}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content | tojson }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", [TEMPLATE, {"default": TEMPLATE, "tool_use": "x"}])
def test_the_text_is_transformers_own(template, prompt):
    tokenizer = with_template(template)
    expected = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=prompt)
    assert render_chat(tokenizer, CHAT[:1], add_generation_prompt=prompt) == expected


def test_a_field_that_is_null_is_not_there():
    template = "{{ messages[1].content is defined }}"
    tokenizer = with_template(template)
    assert render_chat(tokenizer, CHAT) == "False"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == "False"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 1/0 }}", "division by zero"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ [", "unexpected"),
        ("{{ strftime_now(3) }}", "must be str"),
        ("{{ messages[7].content.x }}", "no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_fails(template, words):
    with pytest.raises(ChatRefused, match=words):
        render_chat(with_template(template), CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{{ 'a' * 10 ** 12 }}",
    ],
)
def test_a_template_without_end(template, monkeypatch):
    render_chat(with_template("x"), CHAT)  # so that the process is there
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    with pytest.raises(UpcycleError, match="chat template does not come to an end"):
        render_chat(with_template(template), CHAT)
    monkeypatch.undo()
    assert render_chat(with_template("then {{ messages[0].role }}"), CHAT) == "then user"
