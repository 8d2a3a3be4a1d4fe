"""Proofs. Owns: that a revision which serves answers its golden prompts again when it is asked to.

Its prompts run as any job does, one after the other beside those of gateways. Where the worker is full or the
revision leaves, nothing is said.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from services.common import logs
from services.common.errors import ArtifactInvalid
from services.worker.core.admission import JobStart
from services.worker.core.golden import check_answer, start_of
from services.worker.core.ports import ChatTokenizer
from services.worker.core.revision import BecameProven, GoldenPrompt, RevisionSpec
from services.worker.core.sequence import Finish, SequenceStart
from services.worker.engine.engine import Engine
from services.worker.engine.session import EngineSession


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is asked of a revision, and the tokenizer that its answers are read with."""

    spec: RevisionSpec
    tokenizer: ChatTokenizer


class _Unsaid(Exception):
    """There is no answer, by nobody's fault."""


class Proofs:
    """Asks revisions their golden prompts while they serve.

    Args:
        engine: Runs them.
        epoch: Tells the epoch that a job of now has.
        report: Hears what came of it.
    """

    def __init__(
        self, engine: Engine, epoch: Callable[[], int], report: Callable[[BecameProven], None]
    ) -> None:
        self._engine = engine
        self._epoch = epoch
        self._report = report
        self._kept: dict[str, _Kept] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def keep(self, spec: RevisionSpec, tokenizer: ChatTokenizer) -> None:
        """The revision can be asked from now on."""
        self._kept[spec.revision] = _Kept(spec, tokenizer)

    def ask(self, revision: str) -> None:
        """Asks a revision; one that has no prompts, or is being asked, says nothing more."""
        kept = self._kept.get(revision)
        if kept is not None and revision not in self._tasks:
            self._tasks[revision] = task = asyncio.create_task(self._ask(kept), name=f"proof-{revision}")
            task.add_done_callback(lambda done: self._forget(revision, done))

    def drop(self, revision: str) -> None:
        """The revision leaves."""
        self._kept.pop(revision, None)
        if (task := self._tasks.get(revision)) is not None:
            task.cancel()

    async def stop(self) -> None:
        """Ends what is under way."""
        tasks = tuple(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, kept: _Kept) -> None:
        revision, prompts = kept.spec.revision, kept.spec.golden_prompts
        session = self._engine.open_session()
        reason = ""
        try:
            for number, prompt in enumerate(prompts, start=1):
                answer = await self._answer(session, kept, prompt, number)
                check_answer(answer, prompt, number, len(prompts))
        except _Unsaid:
            return
        except ArtifactInvalid as error:
            reason = error.message
        finally:
            session.close()
        logs.get_logger().info("revision.proven", revision=revision, reason=reason)
        self._report(BecameProven(revision, reason))

    async def _answer(self, session: EngineSession, kept: _Kept, prompt: GoldenPrompt, number: int) -> str:
        start = await asyncio.to_thread(start_of, session.number, kept.tokenizer, prompt, number)
        session.start(self._job(kept.spec, start))
        token_ids: list[int] = []
        while (letter := await session.receive()) is not None and not letter.refusals:
            for output in letter.outputs:
                token_ids.extend(output.token_ids)
                if output.finish is Finish.ERROR:
                    raise ArtifactInvalid(f"Golden prompt {number}: the revision fails to answer it.")
                if output.finish is Finish.CANCELLED:
                    raise _Unsaid
                if output.finish is not None:
                    return await asyncio.to_thread(kept.tokenizer.decode, token_ids)
        raise _Unsaid

    def _job(self, spec: RevisionSpec, start: SequenceStart) -> JobStart:
        return JobStart(spec.model, spec.revision, self._epoch(), (start,), start.key.job)

    def _forget(self, revision: str, task: asyncio.Task[None]) -> None:
        del self._tasks[revision]
        if not task.cancelled() and (error := task.exception()) is not None:
            logs.get_logger().error("proof.crashed", revision=revision, exc_info=error)
