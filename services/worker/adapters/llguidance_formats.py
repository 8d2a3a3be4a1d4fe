"""Structured output with llguidance. Owns: a revision's vocabulary, its compiled grammars, and their masks.

Must not know: logits, schedulers or sessions. The tokenizer is read when the first format comes: a worker
that is never asked for one pays neither time nor memory.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from services.common.errors import ArgumentInvalid, InternalError
from services.worker.adapters.grammar_trial import LIMITS, flaw_in
from services.worker.adapters.trial_process import TrialProcess
from services.worker.core.format import ConstraintBroken, Format
from services.worker.core.revision import ModelFacts

# Compiled grammars of one revision; a service has a few, and each takes some 100 KB until it was much used.
GRAMMARS_MAX = 64


class LlguidanceLibrary:
    """Compilers for all revisions of a worker, with one trial process between them."""

    def __init__(self, trial: TrialProcess | None = None) -> None:
        self._trial = trial or TrialProcess()

    def open(self, directory: Path, facts: ModelFacts) -> LlguidanceCompiler:
        """See `FormatLibrary.open`."""
        return LlguidanceCompiler(directory / "tokenizer.json", facts, self._trial)

    async def close(self) -> None:
        """See `FormatLibrary.close`."""
        await self._trial.close()


class LlguidanceCompiler:
    """Compiles formats over the vocabulary of one revision.

    Args:
        path: Its `tokenizer.json`.
        facts: The size of its vocabulary and its end tokens.
        trial: Where each format is compiled first.
    """

    def __init__(self, path: Path, facts: ModelFacts, trial: TrialProcess) -> None:
        self._path = path
        self._facts = facts
        self._trial = trial
        self._tokenizer: LLTokenizer | None = None
        self._reading = asyncio.Lock()
        self._grammars: OrderedDict[Format, LLMatcher] = OrderedDict()

    async def constrain(self, form: Format, emitted_ids: Sequence[int]) -> LlguidanceConstraint:
        """See `FormatCompiler.constrain`."""
        matcher = self._grammars.get(form)
        if matcher is None:
            tokenizer = await self._read_tokenizer()
            grammar = await self._trial.compile(form)
            # The library lets go of the interpreter's lock while it compiles.
            matcher = await asyncio.to_thread(LLMatcher, tokenizer, grammar, log_level=0, limits=LIMITS)
            _check(matcher, form)
            self._grammars[form] = matcher
            if len(self._grammars) > GRAMMARS_MAX:
                self._grammars.popitem(last=False)
        else:
            self._grammars.move_to_end(form)
        constraint = LlguidanceConstraint(matcher.deep_copy(), f"format.{form.kind}")
        try:
            await asyncio.to_thread(constraint.allowed, tuple(emitted_ids))
        except ConstraintBroken as broken:
            raise ArgumentInvalid(str(broken)) from None
        return constraint

    async def _read_tokenizer(self) -> LLTokenizer:
        if not self._facts.end_ids:
            raise ArgumentInvalid("format: this model has no end token, so no output could be complete.")
        async with self._reading:
            if self._tokenizer is None:
                self._tokenizer = await asyncio.to_thread(self._open_tokenizer)
            return self._tokenizer

    def _open_tokenizer(self) -> LLTokenizer:
        if not self._path.exists():
            raise ArgumentInvalid("format: this revision has no tokenizer.json.")
        try:
            # The library takes no fewer ids than there are tokens, and some models have no row for the last.
            highest = max(Tokenizer.from_file(str(self._path)).get_vocab().values(), default=-1)
            return LLTokenizer(
                str(self._path),
                n_vocab=max(self._facts.vocabulary, highest + 1),
                eos_token=sorted(self._facts.end_ids),
            )
        except Exception as error:
            # The library's message may hold a path; the cause chain is for the log.
            raise InternalError("The tokenizer of this revision cannot be used for formats.") from error


class LlguidanceConstraint:
    """One sequence's way through a grammar. Two threads never use it at once.

    Args:
        matcher: The grammar; its own.
        name: The field of the request that asks for it.
    """

    def __init__(self, matcher: LLMatcher, name: str) -> None:
        self._matcher = matcher
        self._name = name
        self._passed = 0

    def allowed(self, emitted_ids: Sequence[int]) -> bytes:
        """See `Constraint.allowed`."""
        fresh = list(emitted_ids[self._passed :])
        self._passed = len(emitted_ids)
        if fresh and not self._matcher.consume_tokens(fresh):
            raise self._broken(flaw_in(self._matcher) or "the output does not fit it.")
        mask = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._broken(flaw_in(self._matcher))
        return mask

    def _broken(self, flaw: str) -> ConstraintBroken:
        return ConstraintBroken(f"{self._name}: {flaw}")


def _check(matcher: LLMatcher, form: Format) -> None:
    flaw = flaw_in(matcher)
    if flaw:
        raise ArgumentInvalid(f"format.{form.kind}: {flaw}")
