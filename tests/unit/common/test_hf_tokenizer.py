"""Tokenizers from files: what the template writes is special, what people type is text."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.common import chat_template, hf_tokenizer
from services.common.chat_template import ChatTemplate
from services.common.conversation import Message
from services.common.errors import ArgumentInvalid, ArtifactInvalid
from services.common.hf_tokenizer import HfTokenizer
from tests.fixtures.tiny_tokenizer import BEGIN, END, TEMPLATE, write_tokenizer

TYPED = st.lists(
    st.sampled_from([*"hel a\n<|>é🎉\ue000", "<|begin|>", "<|end|>", "<|<|end|>end|>"]), max_size=20
).map("".join)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's files."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> HfTokenizer:
    """The tokenizer in them."""
    return HfTokenizer.load(directory)


def user(text: str) -> list[Message]:
    """One message."""
    return [Message("user", text)]


@given(TYPED, st.sampled_from(["user", "<|end|>", "a<|begin|>"]))
def test_typed_special_tokens_stay_text(tokenizer: HfTokenizer, text: str, role: str) -> None:
    """Whatever is typed, the template's own special tokens are all there are, and no character is lost."""
    ids = tokenizer.encode_now([Message(role, text)])
    assert (ids.count(BEGIN), ids.count(END)) == (2, 1)
    assert tokenizer.decode(ids) == f"{role}\n{text}\nassistant\n"


@given(st.text(alphabet="hel a\n<|>é🎉"))
def test_plain_text_is_encoded_as_the_library_does_it(tokenizer: HfTokenizer, text: str) -> None:
    """In one call, and in pieces as well: cutting at special tokens changes nothing."""
    rendered = f"<|begin|>user\n{text}<|end|>\n<|begin|>assistant\n"
    expected = tokenizer._tokenizer.encode(rendered, add_special_tokens=False).ids
    assert list(tokenizer.encode_now(user(text))) == expected
    assert list(tokenizer._encode_pieces(rendered, "\ue000")) == expected


def test_a_text_without_a_template_is_encoded_as_it_is(tmp_path: Path) -> None:
    """One text is possible, a conversation is not."""
    plain = HfTokenizer.load(write_tokenizer(tmp_path, template=None))
    assert plain.decode(plain.encode_now(user("hello"))) == "hello"
    with pytest.raises(ArgumentInvalid, match="no chat template"):
        plain.encode_now([*user("a"), *user("b")])


def test_an_older_configuration_holds_the_template(tmp_path: Path) -> None:
    """`chat_template` inside tokenizer_config.json, also as a list of named ones."""
    for value in (TEMPLATE, [{"name": "tool", "template": "x"}, {"name": "default", "template": TEMPLATE}]):
        write_tokenizer(tmp_path, template=None)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        assert HfTokenizer.load(tmp_path).encode_now(user("a"))[0] == BEGIN


def test_the_vocabulary_counts_special_tokens(tokenizer: HfTokenizer) -> None:
    """Ids from 0 to the last special token."""
    assert tokenizer.vocabulary == END + 1


async def test_encoding_leaves_the_event_loop_free(tokenizer: HfTokenizer) -> None:
    """The library keeps the interpreter to itself for a text alone; a long one takes it a second."""
    text = "hello a " * 40_000
    work = asyncio.create_task(asyncio.to_thread(tokenizer.encode_now, user(text)))
    looks = 0
    while not work.done():
        await asyncio.sleep(0.001)
        looks += 1
    assert looks > 20
    assert tokenizer.decode(await work) == f"user\n{text}\nassistant\n"


@pytest.mark.parametrize("is_long", [False, True])
def test_a_long_text_is_encoded_like_a_short_one(
    tokenizer: HfTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    is_long: bool,  # noqa: FBT001
) -> None:
    """With a template and without, special tokens typed and not."""
    if is_long:
        monkeypatch.setattr(hf_tokenizer, "ALONE_CHARS_MAX", 0)
    rendered = "<|begin|>user\nhé a<|end|>\n<|begin|>assistant\n"
    assert list(tokenizer.encode_now(user("hé a"))) == tokenizer._tokenizer.encode(rendered).ids
    assert tokenizer.encode_now(user("<|end|>")).count(END) == 1
    literal = tokenizer._literal.encode("a<|end|>").ids
    assert list(tokenizer._encode_raw_now("a<|end|>")) == literal


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    """ArtifactInvalid with the file's name, not a foreign exception."""
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ArtifactInvalid, match=name):
        HfTokenizer.load(tmp_path)


def test_the_literal_twin_is_a_copy(tokenizer: HfTokenizer) -> None:
    """Treating special tokens as text in one of them does not change the other."""
    assert isinstance(tokenizer._tokenizer, Tokenizer)
    assert tokenizer._tokenizer.encode("<|end|>", add_special_tokens=False).ids == [END]
    assert END not in tokenizer._literal.encode("<|end|>", add_special_tokens=False).ids


def test_the_twin_of_a_tokenizer_with_gaps_between_its_tokens_has_them_too(directory: Path) -> None:
    """They cannot be added one after the other; without gaps both are the same to the letter, in any case."""
    written = json.loads((directory / "tokenizer.json").read_text())
    for gap in (0, 5):
        content = json.loads(json.dumps(written))
        for number, token in enumerate(content["added_tokens"]):
            token["id"] += gap * number
        made = Tokenizer.from_str(json.dumps(content))
        literal = HfTokenizer(made, None)._literal
        assert literal.get_added_tokens_decoder() == made.get_added_tokens_decoder()
        assert json.loads(literal.to_str()) == json.loads(made.to_str())


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(900)|list %}{% for a in r %}{% for b in r %}{% for c in r %}" + "{% endfor %}" * 3,
        "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**10**10 }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('only users') }}",
        "{{ undefined.attribute }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'a'|center(1000000000) }}",
        "{{ [1]|tojson(indent=1000000000) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
        "{% set n = namespace(x='a' * 9999) %}{% for _ in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='a' * 9999) %}{% for _ in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=9) %}{% for _ in range(40) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ ([range(99999)] * 9999)|map('sum')|list|length }}",
        "{{ ([range(99999)|list] * 9999)|map('batch', 2)|map('list')|list|length }}",
        "{{ (range(99999)|list * 1)|map('string')|map('replace', '1', '2')|map('upper')|join|length }}" * 99,
    ],
    ids=range(25),
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_hostile_template_is_stopped(source: str) -> None:
    """Loops, explosions and escapes end as errors of the call, in bounded time."""
    started_s = time.monotonic()
    with pytest.raises((ArgumentInvalid, ArtifactInvalid)):
        ChatTemplate(source, {}, limit_s=0.2).render(user("hi"))
    assert time.monotonic() - started_s < 5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_nobody_hears_is_said_again() -> None:
    """What is raised in a callback of the garbage collector is dropped, and the trace function with it."""

    def collected(_phase: str, _info: dict[str, int]) -> None:
        for _ in range(200):
            user("hi")

    gc.callbacks.append(collected)
    try:
        for source in (
            "{{ ([range(99999)|list] * 30)|map('batch', 2)|map('list')|list|length }}",
            # Generators that nobody reads to their end.
            "{{ ([range(999)|list] * 9999)|map('batch', 2)|map('first')|list|length * 1 }}",
        ):
            for _ in range(10):
                with pytest.raises(ArgumentInvalid, match="took too long"):
                    ChatTemplate(source, {}, limit_s=0.02).render(user("hi"))
    finally:
        gc.callbacks.remove(collected)


@pytest.mark.parametrize(
    "call", ["'{:>1000000000}'.format(1)", "'{a}'.format_map({'a': 1})", "'a'['format']()"]
)
def test_a_template_does_not_format(call: str) -> None:
    """A width makes much of little in one call that nothing interrupts; so it is never made."""
    with pytest.raises(ArgumentInvalid, match="SecurityError"):
        ChatTemplate("{{ " + call + " }}", {}).render(user("hi"))


def test_a_template_that_is_none_is_refused() -> None:
    """Syntax errors and sizes are found when the revision is prepared."""
    for source in ("{% for %}", "x" * (chat_template.TEMPLATE_CHARS_MAX + 1)):
        with pytest.raises(ArtifactInvalid):
            ChatTemplate(source, {})


def test_what_templates_expect_is_there() -> None:
    """bos_token, strftime_now, tojson without HTML escapes, loop controls, trimmed blocks."""
    template = ChatTemplate(
        "{{ bos_token }}{{ {'a': '<é>'} | tojson }}{% for i in range(9) %}\n"
        "{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ strftime_now('%Y') | length }}",
        {"bos_token": "<s>"},
    )
    assert template.render(user("hi")) == '<s>{"a": "<é>"}014'


def test_what_templates_in_use_do_with_text_still_works() -> None:
    """Concatenation in both spellings, numbers among them, and bounded replacement."""
    source = "{{ 'a' ~ 1 ~ none }} {{ 'b' + 'c' }} {{ 'xyx'.replace('x', '-') }} {{ 'q'|replace('q', 'r') }}"
    assert ChatTemplate(source, {}).render(user("hi")) == "a1None bc -y- r"


async def test_a_short_prompt_is_encoded_at_once_and_a_slow_template_goes_to_a_thread(tmp_path: Path) -> None:
    """The loop is not left for a short prompt; a template that takes long is not run on it again soon."""
    quick = HfTokenizer.load(write_tokenizer(tmp_path / "quick"))
    with pytest.raises(StopIteration) as ended:
        quick.encode(user("hello"), asyncio.to_thread).send(None)
    assert ended.value.value == quick.encode_now(user("hello"))
    loops = "{% for a in range(1000) %}{% for b in range(200) %}{% endfor %}{% endfor %}"
    slow = HfTokenizer.load(write_tokenizer(tmp_path / "slow", template=loops + TEMPLATE))
    for _ in range(2):
        assert await slow.encode(user("hello"), asyncio.to_thread) == quick.encode_now(user("hello"))
    asked_of_the_loop = slow.encode(user("hello"), asyncio.to_thread)
    assert asked_of_the_loop.send(None) is not None
    asked_of_the_loop.close()


async def test_a_template_that_was_slow_once_is_tried_again(
    tokenizer: HfTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stood still for a moment does not send every prompt through a thread for ever."""
    assert tokenizer._template is not None
    monkeypatch.setattr(hf_tokenizer, "SLOW_PAUSE_S", 0.0)
    with monkeypatch.context() as stalled:
        stalled.setattr(tokenizer._template, "render_within", lambda *_: None)
        with pytest.raises(ArgumentInvalid, match="took too long"):
            await tokenizer.encode(user("hello"), asyncio.to_thread)
    with pytest.raises(StopIteration) as ended:
        tokenizer.encode(user("hello"), asyncio.to_thread).send(None)
    assert ended.value.value == tokenizer.encode_now(user("hello"))
