"""The rollouts of one model. Owns: which one is under way, and that a record is kept before it is followed.

Events go in one at a time: a rollout is stepped, its record saved, and only then does anybody act on it. So a
controller that dies between any two lines leaves a record that its successor can go on with.

Must not know: members' streams, the route's store, wires.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from services.common import logs
from services.common.clock import Clock
from services.common.errors import (
    ArgumentInvalid,
    RevisionInUse,
    RolloutConflict,
    RolloutRefused,
    RolloutUnknown,
    StoreUnavailable,
)
from services.common.threads import to_its_end
from services.controller.core import rollout as table
from services.controller.core.catalog import Catalog, Manifest
from services.controller.core.judgement import Finding, Verdict
from services.controller.core.ports import RolloutRecords
from services.controller.core.records import Route
from services.controller.core.rollout_events import (
    Begun,
    Event,
    FellShort,
    Fleet,
    Observed,
    RouteWritten,
    Weights,
)
from services.controller.core.rollout_history import worth_keeping
from services.controller.core.rollout_record import Rollout, Spec, State, Strategy, create, forsaken
from services.controller.core.routing import Plan

_WAITS = (
    "This controller does not lead until the store at the artifacts' URL answers; to have it lead sooner,"
    " share data_dir with the controller before, or bring its data_dir/{} along."
)


class Conductor:
    """Leads the rollouts of one model.

    Args:
        model: The model.
        catalog: The registered revisions.
        records: Where rollouts are kept.
        clock: The time.
    """

    def __init__(self, model: str, catalog: Catalog, records: RolloutRecords, clock: Clock) -> None:
        self._model = model
        self._catalog = catalog
        self._records = records
        self._clock = clock
        self._rollouts: dict[str, Rollout] = {}
        self._lock = asyncio.Lock()
        self._loaded = False
        self._is_partial = False
        self._changed = asyncio.Event()
        # What a rollout names whose record is on its way.
        self._making: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """The revisions of the rollout that is under way, or about to be."""
        current = self.current
        return self._making if current is None else (current.previous, current.spec.revision)

    @property
    def current(self) -> Rollout | None:
        """The rollout that is under way."""
        return next((one for one in self._rollouts.values() if not one.ended), None)

    @property
    def swapping(self) -> tuple[str, ...]:
        """The workers that the rollout under way has taken out of line, in their order."""
        return () if (current := self.current) is None else current.swapping

    @property
    def newest(self) -> Rollout | None:
        """The rollout that is under way, or the last one that was; not one that never began."""
        begun = (one for one in reversed(self._rollouts.values()) if one.strategy is not Strategy.AUTO)
        return next(begun, None)

    @property
    def all(self) -> tuple[Rollout, ...]:
        """Every rollout that is kept, newest first."""
        return tuple(reversed(self._rollouts.values()))

    @property
    def loaded(self) -> bool:
        """Whether the records were read."""
        return self._loaded

    def find(self, rollout_id: str) -> Rollout:
        """One rollout.

        Raises:
            RolloutUnknown: No rollout has this id.
        """
        found = self._rollouts.get(rollout_id)
        if found is None:
            raise RolloutUnknown(
                f"There is no rollout {rollout_id[:64]!a}; `interlock rollouts list` shows all."
            )
        return found

    async def load(self, fence: int) -> int:
        """Takes the records over, once; a rollout that was under way goes on.

        Returns:
            The fencing number of the claim: `fence`, or one above every number before.

        Raises:
            FenceStale: Another controller took them over meanwhile.
            StoreUnavailable: They cannot be read now.
        """
        async with self._lock:
            if self._loaded:
                return fence
            claimed = await self._records.claim(self._model, fence)
            self._rollouts = {one.id: one for one in claimed.rollouts}
            self._is_partial = claimed.is_partial
            for one in claimed.rollouts:
                if not one.ended and (cause := self._obstacle(one, claimed.rollouts[-1])):
                    await to_its_end(self._keep(forsaken(one, cause, self._now_ms())))
            self._loaded = True
            return claimed.fence

    def serving(self, asked: str, stored: Route | None) -> str:
        """The revision that shall serve when the mesh was started with `asked`.

        What a rollout put in its place stays, over restarts, until the mesh is started with another one.

        Args:
            asked: The revision that the mesh was started with.
            stored: The route that the controller before has left.

        Raises:
            StoreUnavailable: What requests go to, or a rollout is about, cannot be looked up now.
        """
        if self._is_partial and stored is not None:
            named = {name for one in self.all for name in (one.previous, one.spec.revision)}
            if unknown := sorted(stored.weights.keys() - named - {asked}):
                why = f"Requests go to the revision {unknown[0]}, and no record here says why."
                raise StoreUnavailable(f"{why} {_WAITS.format('rollouts')}")
        # One whose revision is nowhere is not under way, unless nobody could look when its record was read.
        used = {*self.named, *(stored.weights if stored is not None and self._catalog.is_partial else ())}
        if missing := sorted(name for name in used if not self._has(name)):
            why = f"The revision {missing[0]} serves, or is in a rollout, and is not cached here."
            raise StoreUnavailable(f"{why} {_WAITS.format('revisions')}")
        completed = (
            one
            for one in self.all
            if one.state is State.COMPLETED and one.origin == asked and self._has(one.spec.revision)
        )
        newest = next(completed, None)
        return asked if newest is None else newest.spec.revision

    async def create(self, rollout_id: str, spec: Spec, plan: Callable[[], Plan]) -> Rollout:
        """Puts a rollout on record; it begins with the next look at the fleet.

        Args:
            rollout_id: Its id.
            spec: What was asked for.
            plan: Tells what the route shall be; asked once no rollout can end any more meanwhile.

        Raises:
            ArgumentInvalid: The revision has another tokenizer than the one that serves, or less context.
            ModelUnknown: No such model is registered.
            RevisionInUse: The revision serves already.
            RevisionUnknown: The model has no such revision.
            RolloutConflict: Another rollout of the model is under way, or its start revision is being loaded.
        """
        async with self._lock:
            planned, revision = plan(), self._catalog.revision(spec.model, spec.revision)
            if (current := self.current) is not None:
                raise RolloutConflict(
                    f"The rollout {current.id} of {spec.model} is {current.state}; "
                    "watch it to its end, or cancel it."
                )
            serving = planned.wanted
            if planned.weights and not planned.switched:
                raise RolloutConflict(
                    f"The start revision {serving} of {spec.model} is still loading, and requests go to "
                    f"{', '.join(sorted(planned.weights))} until a worker has it. Ask again then; where it "
                    "cannot be loaded, start the mesh with another one."
                )
            if spec.revision == serving:
                raise RevisionInUse(f"The revision {spec.revision} serves already.")
            before = self._catalog.revision(spec.model, serving).manifest
            _check_takes_over(before, revision.manifest, has_served=self._has_served(spec.revision))
            # Records are read in the order of this time; no clock that went back may change it.
            latest_ms = max((one.history[0].time_ms for one in self._rollouts.values()), default=0)
            made_ms = max(self._now_ms(), latest_ms + 1)
            made = create(rollout_id, spec, serving, made_ms, self._catalog.wanted(spec.model))
            self._making = (serving, spec.revision)
            try:
                await to_its_end(self._keep(made))
            finally:
                self._making = ()
            return made

    async def tell(self, rollout_id: str, event: Event, fleet: Fleet | None) -> Rollout:
        """Takes in what an operator wants.

        Args:
            rollout_id: Which rollout.
            event: What is wanted.
            fleet: Who is attached now; None: that is not known yet. Then the event is put on record, and what
                follows from the fleet waits for the next look at it.

        Raises:
            RolloutRefused: It cannot be done where the rollout is.
            RolloutUnknown: No rollout has this id.
        """
        async with self._lock:
            before = self.find(rollout_id)
            try:
                after = table.step(before, event, fleet, self._now_ms()).rollout
            except table.RolloutEventIllegal as error:
                raise RolloutRefused(str(error)) from None
            if after != before:
                await to_its_end(self._keep(after))
            return after

    async def observe(self, fleet: Fleet, written: Weights | None, verdict: Verdict | None = None) -> bool:
        """Lets the rollout that is under way see the fleet and the route; returns whether it moved.

        Args:
            fleet: Who is attached now.
            written: The weights that the store is known to hold; None: not known.
            verdict: What is to be said of the new revision; None: it is not judged now.
        """
        findings = "" if verdict is None else verdict.reason
        async with self._lock:
            before = self.current
            if before is None:
                return False
            after = before
            for event in _events(before, written, verdict):
                after = table.step(after, event, fleet, self._now_ms(), findings).rollout
            if after == before:
                return False
            await to_its_end(self._keep(after))
            return True

    async def changed(self) -> None:
        """Returns after the next change of any rollout."""
        await self._changed.wait()

    def _obstacle(self, rollout: Rollout, latest: Rollout) -> str:
        """Why one that was under way cannot go on; empty: it can."""
        names = (rollout.spec.revision, rollout.previous)
        if not self._catalog.is_partial and (missing := [name for name in names if not self._has(name)]):
            return f"The revision {missing[0]} is not registered any more."
        return "" if rollout is latest else "A controller that did not know of it began another one."

    def _has(self, revision: str) -> bool:
        return self._catalog.knows(self._model, revision)

    async def _keep(self, rollout: Rollout) -> None:
        """Saves a record, then lets everybody see it. To be awaited to its end, so that both are the same."""
        await self._records.save(rollout)
        before = self._rollouts.get(rollout.id)
        self._rollouts[rollout.id] = rollout
        if before is None:
            # What the next controller would leave behind; its file goes with that one's claim.
            kept = worth_keeping(tuple(self._rollouts.values()))
            self._rollouts = {name: one for name, one in self._rollouts.items() if name in kept}
        known = 0 if before is None else len(before.history)
        for entered in rollout.history[known:]:
            logs.get_logger().info(
                "rollout.entered",
                model=self._model,
                rollout_id=rollout.id,
                revision=rollout.spec.revision,
                state=entered.state.value,
                cause=entered.cause,
            )
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _has_served(self, revision: str) -> bool:
        return any(one.state is State.COMPLETED and one.previous == revision for one in self.all)

    def _now_ms(self) -> int:
        return int(self._clock.now() * 1000)


def _check_takes_over(before: Manifest, after: Manifest, *, has_served: bool) -> None:
    """Raises ArgumentInvalid where requests that `before` was good for could not be answered by `after`.

    The way back to what has served is open: few requests need what it lacks, and there are reasons to go.
    """
    if before.tokenizer_sha256 != after.tokenizer_sha256:
        raise ArgumentInvalid(
            "revision: it has another tokenizer or chat template than the one that serves, and "
            "running requests could not go on with it. Register it as a model of its own."
        )
    if after.context_tokens < before.context_tokens and not has_served:
        raise ArgumentInvalid(
            f"revision: its context holds {after.context_tokens} tokens, that of the one that serves "
            f"{before.context_tokens}, and requests that were accepted could be too long for it. Push it "
            "with as much, or as a model of its own."
        )


def _events(rollout: Rollout, written: Weights | None, verdict: Verdict | None) -> Sequence[Event]:
    if rollout.state is State.PENDING:
        return (Begun(),)
    if verdict is not None and verdict.finding is Finding.BAD and rollout.state is State.BAKING:
        return (FellShort(verdict.reason),)
    if written is not None and written == rollout.route and rollout.written != rollout.route:
        return (RouteWritten(written),)
    return (Observed(),)


def as_weights(route: Mapping[str, int]) -> Weights:
    """The weights of a route in the order that records have."""
    return tuple(sorted((name, weight) for name, weight in route.items() if weight))
