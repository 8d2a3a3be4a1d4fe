"""Structured output over real compilation: what comes out fits its shape, and hostile shapes do no harm."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer

from services.common.errors import ArgumentInvalid, InternalError
from services.worker.adapters import llguidance_formats, trial_process
from services.worker.adapters.llguidance_formats import LlguidanceCompiler, LlguidanceLibrary
from services.worker.adapters.torch_sampler import sample
from services.worker.adapters.trial_process import WAITING_MAX, TrialProcess
from services.worker.core.batch import Draw
from services.worker.core.format import (
    CHOICE_BYTES_MAX,
    CHOICES_MAX,
    Constraint,
    ConstraintBroken,
    Format,
    FormatBusy,
    FormatKind,
    format_flaw,
)
from services.worker.core.revision import ModelFacts
from services.worker.core.sequence import Sampling
from tests.fixtures.schemas import SCHEMAS
from tests.fixtures.tiny_tokenizer import END, write_tokenizer

# A few ids more than the tokenizer has, as models do.
VOCABULARY = 272
FACTS = ModelFacts(VOCABULARY, 512, frozenset({END}), 4_096, 1)
TOKENS_MAX = 400

# Both keep the library busy for minutes; nothing inside a process can stop it.
ENDLESS = (
    Format(
        FormatKind.JSON_SCHEMA,
        (json.dumps({"type": "string", "allOf": [{"pattern": f".*{at}.{{5}}x.*"} for at in range(1_500)]}),),
    ),
    Format(
        FormatKind.GRAMMAR,
        ("start: A\nA: " + " & ".join(f"/(.*{at}.{{30}}x.*)/" for at in range(2_500)),),
    ),
)


@pytest.fixture
async def trial() -> AsyncIterator[TrialProcess]:
    """A trial process, gone afterwards."""
    made = TrialProcess()
    yield made
    await made.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The files of a revision with the tiny tokenizer."""
    return write_tokenizer(tmp_path)


@pytest.fixture
def compiler(trial: TrialProcess, directory: Path) -> LlguidanceCompiler:
    """A compiler over the tiny tokenizer."""
    return LlguidanceLibrary(trial).open(directory, FACTS)


def schema_of(value: Any) -> Format:
    """A schema as a format."""
    return Format(FormatKind.JSON_SCHEMA, (json.dumps(value),))


def speak(
    constraint: Constraint, seed: int, emitted: tuple[int, ...] = (), *, tokens: int = TOKENS_MAX
) -> list[int]:
    """What a model that knows nothing says under a constraint, up to the end token, which comes last."""
    said = list(emitted)
    while len(said) < tokens and (not said or said[-1] != END):
        at = len(said)
        logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed * 1_000 + at))
        draw = Draw(Sampling(1.0, seed=seed), 0, at, [1, *said], 1, None, constraint)
        (choice,) = sample(logits, [draw])
        said.append(choice.token_id)
    return said


def follow(constraint: Constraint, said: list[int]) -> None:
    """Says the letter a for as long as the constraint can be followed; `said` takes in what was said."""
    while len(said) < TOKENS_MAX:
        constraint.allowed(said)
        said.append(ord("a") - ord("!"))


def text_of(directory: Path, said: list[int]) -> str:
    """The text of a complete answer."""
    assert said[-1] == END, "the answer is not complete"
    return str(Tokenizer.from_file(str(directory / "tokenizer.json")).decode(said[:-1]))


async def test_every_generation_fits_its_schema(compiler: LlguidanceCompiler, directory: Path) -> None:
    """200 answers of noise over 20 schemas: each one parses and validates."""
    for number, schema in enumerate(SCHEMAS):
        for seed in range(10):
            constraint = await compiler.constrain(schema_of(schema), ())
            said = text_of(directory, speak(constraint, 100 * number + seed))
            jsonschema.validate(json.loads(said), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (
            Format(FormatKind.REGEX, (r"[a-z]{2,5}@[a-z]{1,4}\.(com|org)",)),
            r"[a-z]{2,5}@[a-z]{1,4}\.(com|org)",
        ),
        (
            Format(FormatKind.CHOICE, ("yes", 'a "quoted" \\ one\n', "größer")),
            'yes|a "quoted" \\\\ one\n|größer',
        ),
        (Format(FormatKind.GRAMMAR, ('root ::= "a" [0-9] ("," [0-9])? "b"\n',)), "a[0-9](,[0-9])?b"),
        (Format(FormatKind.GRAMMAR, ('start: "a" /[0-9]/ "b"\n',)), "a[0-9]b"),
    ],
    ids=["regex", "choice", "ebnf", "lark"],
)
async def test_other_shapes_are_kept_to(
    compiler: LlguidanceCompiler, directory: Path, form: Format, pattern: str
) -> None:
    """Expressions, choices and grammars in both notations are matched in full."""
    for seed in range(10):
        said = text_of(directory, speak(await compiler.constrain(form, ()), seed))
        assert re.fullmatch(pattern, said), said


async def test_cut_and_continued_equals_uncut(compiler: LlguidanceCompiler) -> None:
    """Wherever an answer is cut, a fresh constraint over what was emitted goes on in the same way."""
    form = schema_of(SCHEMAS[12])
    whole = speak(await compiler.constrain(form, ()), 5)
    for cut in range(len(whole)):
        emitted = tuple(whole[:cut])
        assert speak(await compiler.constrain(form, emitted), 5, emitted) == whole


async def test_sequences_of_one_grammar_do_not_meet(compiler: LlguidanceCompiler) -> None:
    """Two sequences of the same compiled format that take turns say what each says alone."""
    form = schema_of(SCHEMAS[12])
    alone = [speak(await compiler.constrain(form, ()), seed) for seed in (1, 2)]
    both = [await compiler.constrain(form, ()) for _ in alone]
    said: list[list[int]] = [[], []]
    for at in range(max(map(len, alone))):
        for number, constraint in enumerate(both):
            if at < len(alone[number]):
                said[number] = speak(constraint, number + 1, tuple(said[number]), tokens=at + 1)
    assert said == alone


@pytest.mark.parametrize(
    ("form", "named"),
    [
        (schema_of({"type": "strin"}), "strin"),
        (schema_of(False), "no value"),
        (schema_of({"not": {"type": "string"}}), "not"),
        (schema_of({"$ref": "https://example.com/other.json"}), "example.com"),
        (Format(FormatKind.REGEX, ("[",)), "regex"),
        (Format(FormatKind.GRAMMAR, ("foo",)), "::="),
        (Format(FormatKind.GRAMMAR, ("root ::= " + "(" * 3_000 + '"a"' + ")" * 3_000,)), "format.grammar"),
        (schema_of({"properties": {f"p{number}": {} for number in range(1_200)}}), "items"),
    ],
    ids=range(8),
)
async def test_a_bad_shape_is_refused_in_words(
    compiler: LlguidanceCompiler, form: Format, named: str
) -> None:
    """The message begins with the field and says what is wrong, on one line."""
    with pytest.raises(ArgumentInvalid) as caught:
        await compiler.constrain(form, ())
    assert caught.value.message.startswith(f"format.{form.kind}: ")
    assert named in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("form", ENDLESS, ids=["schema", "grammar"])
async def test_an_endless_compilation_is_ended(compiler: LlguidanceCompiler, form: Format) -> None:
    """It is refused in bounded time while the event loop turns, and the next format is served."""
    await compiler.constrain(schema_of(True), ())
    began_s = time.monotonic()
    turning = asyncio.create_task(compiler.constrain(form, ()))
    turns = 0
    while not turning.done():
        await asyncio.sleep(0.01)
        turns += 1
    with pytest.raises(ArgumentInvalid, match="too complex"):
        await turning
    assert time.monotonic() - began_s < 5
    assert turns > 20
    await compiler.constrain(schema_of(SCHEMAS[0]), ())


@pytest.mark.parametrize(
    "regex",
    ["(.*a){25}.{40}b", "((((a{1,30}){1,30}){1,30}){1,30}){1,30}", "(.*a.{9})" * 400, "(a|aa)*(.*b.{99})"],
)
async def test_a_regex_bomb_is_refused_or_harmless(compiler: LlguidanceCompiler, regex: str) -> None:
    """Compilation and each step take bounded time, whatever becomes of it."""
    began_s = time.monotonic()
    try:
        constraint = await compiler.constrain(Format(FormatKind.REGEX, (regex,)), ())
    except ArgumentInvalid:
        return
    assert time.monotonic() - began_s < 5
    for at in range(60):
        began_s = time.monotonic()
        try:
            constraint.allowed((ord("a"),) * at)
        except ConstraintBroken:
            break
        assert time.monotonic() - began_s < 1


async def test_what_breaks_later_is_named_then_and_refused_at_the_next_start(
    compiler: LlguidanceCompiler,
) -> None:
    """In the same words, which begin with the field: a worker that goes on meets the limit before a slot."""
    form = Format(FormatKind.REGEX, ("((((a{1,30}){1,30}){1,30}){1,30}){1,30}",))
    constraint = await compiler.constrain(form, ())
    said: list[int] = []
    with pytest.raises(ConstraintBroken, match=r"^format\.regex: lexer error") as broken:
        follow(constraint, said)
    with pytest.raises(ArgumentInvalid) as refused:
        await compiler.constrain(form, said)
    assert refused.value.message == str(broken.value)


async def test_the_trial_process_may_die(compiler: LlguidanceCompiler, trial: TrialProcess) -> None:
    """A format that kills it is refused; a new one serves the next format."""
    await compiler.constrain(schema_of(True), ())
    assert trial._child is not None
    trial._child.kill()
    await trial._child.wait()
    await compiler.constrain(schema_of(SCHEMAS[1]), ())


async def test_the_longest_reply_within_the_bounds_is_read() -> None:
    """Each byte of as many choices as are allowed takes seven in it; the next format has its own reply."""
    longest = tuple("\x01" * (CHOICE_BYTES_MAX - 3) + f"{number:03}" for number in range(CHOICES_MAX))
    form = Format(FormatKind.CHOICE, longest)
    assert format_flaw(form) is None
    patient = TrialProcess(limit_s=20)
    try:
        assert longest[-1] in json.loads("[" + (await patient.compile(form)).rpartition("| ")[2] + "]")
    finally:
        await patient.close()


@pytest.mark.parametrize("choices", [10, 250], ids=["read whole", "more than is read ahead"])
async def test_a_reply_that_is_too_long_harms_no_other(
    trial: TrialProcess, monkeypatch: pytest.MonkeyPatch, choices: int
) -> None:
    """Its format is refused in bounded time; a new child serves the next one."""
    monkeypatch.setattr(trial_process, "LINE_BYTES_MAX", 1_024)
    long = Format(FormatKind.CHOICE, tuple("a" * 1_000 + str(number) for number in range(choices)))
    async with asyncio.timeout(20):
        with pytest.raises(ArgumentInvalid, match="too complex"):
            await trial.compile(long)
        assert '"yes"' in await trial.compile(Format(FormatKind.CHOICE, ("yes",)))


async def test_a_trial_that_fails_in_any_way_is_not_used_again(
    trial: TrialProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw is told as what it is, and its reply is not taken for another's."""
    await trial.compile(schema_of(True))
    failed = trial._child

    def fail(_: bytes) -> None:
        raise KeyError

    with monkeypatch.context() as patch:
        patch.setattr(json, "loads", fail)
        with pytest.raises(KeyError):
            await trial.compile(schema_of(True))
    assert trial._child is None
    assert failed is not None
    assert failed.returncode is not None
    assert await trial.compile(schema_of(SCHEMAS[0]))


async def test_a_trial_ends_without_its_worker() -> None:
    """Nobody kills it, as when its worker was killed: it ends itself all the same."""
    patient = TrialProcess(limit_s=30)
    began_s = time.monotonic()
    with pytest.raises(ArgumentInvalid, match="too complex"):
        await patient.compile(ENDLESS[0])
    assert time.monotonic() - began_s < 20


async def test_few_formats_wait_at_once(trial: TrialProcess) -> None:
    """More than that are busy, not queued without end; a cancelled wait leaves its place."""
    waiting = [asyncio.create_task(trial.compile(ENDLESS[0])) for _ in range(WAITING_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(FormatBusy):
        await trial.compile(schema_of(True))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await trial.compile(schema_of(True))


async def test_compiled_grammars_are_kept_and_bounded(
    compiler: LlguidanceCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format that came before needs no trial; the one that was not used longest goes first."""
    monkeypatch.setattr(llguidance_formats, "GRAMMARS_MAX", 2)
    forms = [Format(FormatKind.CHOICE, (text,)) for text in ("a", "b", "c")]
    for form in (forms[0], forms[1], forms[0], forms[2]):
        await compiler.constrain(form, ())
    assert list(compiler._grammars) == [forms[0], forms[2]]


async def test_emitted_tokens_that_do_not_fit_are_refused(compiler: LlguidanceCompiler) -> None:
    """A continuation of something else is an error of the request, told before it takes a slot."""
    with pytest.raises(ArgumentInvalid, match="satisfy"):
        await compiler.constrain(Format(FormatKind.CHOICE, ("a",)), (5, 6, 7))


async def test_a_revision_without_tokenizer_or_end_serves_no_formats(
    trial: TrialProcess, tmp_path: Path, directory: Path
) -> None:
    """Both are told; files that are damaged are the worker's trouble, and name no path."""
    endless = ModelFacts(VOCABULARY, 512, frozenset(), 4_096, 1)
    library = LlguidanceLibrary(trial)
    with pytest.raises(ArgumentInvalid, match="end token"):
        await library.open(directory, endless).constrain(schema_of(True), ())
    with pytest.raises(ArgumentInvalid, match=r"tokenizer\.json"):
        await library.open(tmp_path / "none", FACTS).constrain(schema_of(True), ())
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(InternalError) as caught:
        await library.open(directory, FACTS).constrain(schema_of(True), ())
    assert str(tmp_path) not in caught.value.message


async def test_a_tokenizer_may_have_more_ids_than_the_model(trial: TrialProcess, directory: Path) -> None:
    """Some have tokens for which the model has no row; it never says them."""
    narrow = replace(FACTS, vocabulary=END + 1)
    path = directory / "tokenizer.json"
    told = json.loads(path.read_text())
    told["added_tokens"].append({**told["added_tokens"][0], "id": narrow.vocabulary, "content": "<beyond>"})
    path.write_text(json.dumps(told))
    constraint = await LlguidanceLibrary(trial).open(directory, narrow).constrain(schema_of(True), ())
    assert constraint.allowed(())


async def test_a_trial_that_cannot_start_is_the_workers_trouble(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A missing program is no fault of the format."""
    monkeypatch.setattr(trial_process, "PROGRAM", tmp_path / "missing.py")
    with pytest.raises(InternalError):
        await TrialProcess().compile(schema_of(True))
