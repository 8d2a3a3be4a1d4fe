"""Templates that are rendered without a watch: only those whose cost is bounded by their size."""

from __future__ import annotations

import time

import jinja2
import pytest
from jinja2.ext import loopcontrols

from services.common.chat_template import ChatTemplate
from services.common.conversation import Message
from services.common.errors import ArgumentInvalid
from services.common.template_bounds import PLAIN_CHARS_MAX, PLAIN_MESSAGES_MAX, is_plain

TURN = "{{ '<|' + message['role'] + '|>' + message.content | trim + '<|end|>' }}"
PLAIN = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for message in messages[1:] %}{% if loop.first and message.role != 'user' %}"
    "{{ raise_exception('a user begins') }}{% endif %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt is defined and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def plain(source: str) -> bool:
    """What is said of a template."""
    return is_plain(source, jinja2.Environment(extensions=[loopcontrols], autoescape=True).parse(source))


def test_a_template_that_goes_through_the_turns_once_is_plain() -> None:
    """As most are that know no tools."""
    assert plain(PLAIN)


@pytest.mark.parametrize(
    "source",
    [
        "{% for message in messages %}{% for other in messages %}{% endfor %}{% endfor %}",
        "{% for a in range(9) %}{% endfor %}",
        "{% for c in messages[0].content %}{% endfor %}",
        "{% for m in messages if range(9999)|list %}{% endfor %}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{% set x = 'a' %}",
        "{% set n = namespace(x='a') %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% call m() %}{% endcall %}",
        "{{ 'x' * 9999 }}",
        "{{ 'x' ~ 'y' }}",
        "{{ 9 ** 9 }}",
        "{{ messages | tojson }}",
        "{{ messages | map('length') | list }}",
        "{{ range(99999) }}",
        "{{ 'a'.join(messages) }}",
        "{{ [messages, messages] }}",
        "{% with x = 'a' %}{% endwith %}",
        "{% filter upper %}{% endfilter %}",
        "{% if raise_exception(range(9)|list) %}{% endif %}",
        "{{ 'a' }}" + " " * PLAIN_CHARS_MAX,
    ],
    ids=range(21),
)
def test_what_repeats_grows_or_calls_is_watched(source: str) -> None:
    """Whatever is not known to be harmless."""
    assert not plain(source)


def test_the_same_comes_out_watched_or_not() -> None:
    """One more turn than a plain template may have without a watch changes nothing but the turns."""
    template = ChatTemplate(PLAIN, {})
    few, many = (
        template.render([Message("user", "hi")] * (turns + 1))
        for turns in (PLAIN_MESSAGES_MAX - 1, PLAIN_MESSAGES_MAX)
    )
    assert many == few.replace("<|user|>hi<|end|>", "<|user|>hi<|end|>" * 2, 1)
    with pytest.raises(ArgumentInvalid, match="a user begins"):
        template.render([Message("user", "hi"), Message("tool", "no")])


def test_the_dearest_plain_template_is_cheap() -> None:
    """As much source as it may have, over as many turns: far from what a watch would stop."""
    turn = "{{ message.content + message.role }}"
    body = turn * ((PLAIN_CHARS_MAX - 60) // len(turn))
    template = ChatTemplate("{% for message in messages %}" + body + "{% endfor %}", {})
    assert template._is_plain
    began_s = time.thread_time()
    template.render([Message("user", "x" * 15)] * PLAIN_MESSAGES_MAX)
    assert time.thread_time() - began_s < 1
