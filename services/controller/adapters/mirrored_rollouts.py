"""Rollouts in a directory, and once more at the artifacts' URL. Owns: which of two records is the newer one.

    MODEL/rollouts/ID.NUMBER.json        NUMBER: the fencing number of the controller that wrote it

The directory is what a controller goes by: it is written first, at every step, also while the URL is away.
The copies are for one that has another directory: it takes what it does not know, and what has gone further
there than here. A leader writes under its own number alone, so nothing that a predecessor still sends
replaces what a successor wrote; older copies go when there is a newer one.

Must not know: what a rollout does.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from services.common import logs
from services.common.errors import StoreUnavailable
from services.controller.adapters.artifact_home import ArtifactHome
from services.controller.adapters.artifact_store import CALLS_AT_ONCE_MAX, StoredObject
from services.controller.adapters.file_rollouts import (
    RECORD_BYTES_MAX,
    FileRolloutRecords,
    decode,
    encode,
    in_order,
)
from services.controller.core.ports import FenceStale
from services.controller.core.records import Claimed
from services.controller.core.rollout_history import needed, worth_keeping
from services.controller.core.rollout_record import Rollout

# Whoever takes over must lead within seconds, and a mesh is led while the URL is away.
LOOK_PATIENCE_S = 10.0
# How long a step waits for its copy; a rollout that nobody else knows dies with this machine.
COPY_PATIENCE_S = 2.0
# While the URL is away; each try takes several seconds by itself.
RETRY_S = 5.0
# Each claim leaves at most `HISTORY_MAX` and what is needed; more were not made by us.
COPIES_MAX = 2_000

_NAME = re.compile(r"(?P<id>.+)\.(?P<number>[0-9]{1,19})\.json")


@dataclass(frozen=True, slots=True)
class _Copy:
    """The newest object of a rollout, and the older ones."""

    id: str
    name: str
    number: int
    size_bytes: int
    older: tuple[str, ...]


class MirroredRolloutRecords:
    """`RolloutRecords` of one model, of which another machine knows.

    Args:
        local: The records of this machine.
        home: Where the copies go.
        confirm: Asks whether we lead; raises FenceStale where we do not, StoreUnavailable where nobody says.
    """

    def __init__(
        self, local: FileRolloutRecords, home: ArtifactHome, confirm: Callable[[], Awaitable[None]]
    ) -> None:
        self._local = local
        self._home = home
        self._confirm = confirm
        self._number = 0
        # By rollout: the objects that there are. At most `COPIES_MAX`, and one more for each rollout of ours.
        self._objects: dict[str, set[str]] = {}
        # What is to be brought there; None: nothing is kept of it.
        self._due: dict[str, Rollout | None] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_away = False

    async def claim(self, model: str, fence: int) -> Claimed:
        """See `RolloutRecords.claim`. Where the URL does not answer in time it is what this machine knows."""
        newest = await self._local.newest(model)
        try:
            async with asyncio.timeout(LOOK_PATIENCE_S):
                copies = _newest(await self._home.rollouts())
        except (StoreUnavailable, TimeoutError) as error:
            return self._partial(await self._claim(model, fence), error)
        highest = max((copy.number for copy in copies.values()), default=0)
        claimed = await self._claim(model, max(fence, highest + 1))
        everything = {one.id: one for one in claimed.rollouts}
        # What has ended here has ended; the rest may have gone on elsewhere.
        open_here = {one.id for one in claimed.rollouts if not one.ended}
        asked = [copy for name, copy in copies.items() if name not in everything or name in open_here]
        try:
            async with asyncio.timeout(LOOK_PATIENCE_S):
                others = await self._read_all(asked)
        except (StoreUnavailable, TimeoutError) as error:
            return self._partial(claimed, error)
        taken = [
            one for one in others if _is_newer(one, copies[one.id].number, everything.get(one.id), newest)
        ]
        everything |= {one.id: one for one in taken}
        kept = worth_keeping(in_order(everything.values()))
        rollouts = in_order(one for one in everything.values() if one.id in kept)
        for one in taken:
            if one.id in kept:
                await self._local.save(one)
        self._order(copies, rollouts, dropped=everything.keys() - kept)
        return Claimed(claimed.fence, tuple(rollouts))

    async def save(self, rollout: Rollout) -> None:
        """See `RolloutRecords.save`. A copy that is late comes later."""
        # Nobody else writes into our directory, which would tell us that another controller leads.
        await self._confirm()
        await self._local.save(rollout)
        self._due[rollout.id] = rollout
        task = self._begin()
        if not self._is_away:
            await asyncio.wait({task}, timeout=COPY_PATIENCE_S)

    def close(self) -> None:
        """See `RolloutRecords.close`."""
        if self._task is not None:
            self._task.cancel()

    async def _claim(self, model: str, fence: int) -> Claimed:
        claimed = await self._local.claim(model, fence)
        self._number = claimed.fence
        return claimed

    def _partial(self, claimed: Claimed, error: Exception) -> Claimed:
        """What is known here alone."""
        known = len(claimed.rollouts)
        logs.get_logger().error("rollouts.unread", model=self._home.model, reason=str(error), known=known)
        return replace(claimed, is_partial=True)

    def _order(
        self, copies: Mapping[str, _Copy], rollouts: Sequence[Rollout], dropped: Collection[str]
    ) -> None:
        """Has the copies be brought in line: what is needed bears our number, and what is `dropped` goes.

        What could not be read stays, for a later version may read it.
        """
        self._objects = {name: {copy.name, *copy.older} for name, copy in copies.items()}
        # Of the latest one the last step may not have been copied by whoever led on this machine.
        urgent = needed(rollouts) | {one.id for one in rollouts[-1:]}
        self._due = {one.id: one for one in rollouts if one.id in urgent or one.id not in copies}
        self._due |= dict.fromkeys(name for name in copies if name in dropped)
        if self._due:
            self._begin()

    async def _read_all(self, copies: Iterable[_Copy]) -> list[Rollout]:
        """Those that can be read."""
        wanted = [one for one in copies if one.size_bytes <= RECORD_BYTES_MAX]
        found: list[Rollout] = []
        for at in range(0, len(wanted), CALLS_AT_ONCE_MAX):
            some = wanted[at : at + CALLS_AT_ONCE_MAX]
            texts = await asyncio.gather(*(self._home.read_rollout(one.name, one.size_bytes) for one in some))
            for one, text in zip(some, texts, strict=True):
                record = None if text is None else decode(text, one.name)
                # Its id becomes the name of a file.
                if record is not None and (record.id, record.spec.model) == (one.id, self._home.model):
                    found.append(record)
        return found

    def _begin(self) -> asyncio.Task[None]:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._bring_all(), name="rollouts.copies")
        return self._task

    async def _bring_all(self) -> None:
        """Brings what is due, until nothing is, or another controller leads."""
        while self._due:
            rollout_id, rollout = next(iter(self._due.items()))
            try:
                await self._confirm()
                await self._bring(rollout_id, rollout)
            except FenceStale:
                self._due.clear()
                return
            except StoreUnavailable as error:
                if not self._is_away:
                    logs.get_logger().warning("rollouts.uncopied", reason=error.message, due=len(self._due))
                self._is_away = True
                await asyncio.sleep(RETRY_S)
                continue
            self._is_away = False
            if self._due.get(rollout_id) is rollout:
                del self._due[rollout_id]

    async def _bring(self, rollout_id: str, rollout: Rollout | None) -> None:
        objects = self._objects.setdefault(rollout_id, set())
        ours = "" if rollout is None else f"{rollout_id}.{self._number}.json"
        if rollout is not None:
            await self._home.put_rollout(ours, encode(rollout))
        for name in objects - {ours}:
            await self._home.drop_rollout(name)
        self._objects[rollout_id] = {ours} - {""}


def _is_newer(copy: Rollout, number: int, here: Rollout | None, newest: int) -> bool:
    """Whether a copy that was written under `number` counts more than the record of this machine, if any.

    A rollout only goes forward. Of two in one state that of a leader counts who came after the last one here.
    """
    if here is None:
        return True
    return (len(copy.history), number > newest) > (len(here.history), False)


def _newest(objects: Mapping[str, StoredObject]) -> dict[str, _Copy]:
    """The newest object of each rollout, by its id; what has another name is nothing of ours."""
    found: dict[str, list[tuple[int, str, int]]] = {}
    for name, facts in objects.items():
        if (match := _NAME.fullmatch(name)) is not None:
            found.setdefault(match["id"], []).append((int(match["number"]), name, facts.size_bytes))
    newest = {}
    for rollout_id, several in found.items():
        *older, (number, name, size_bytes) = sorted(several)
        newest[rollout_id] = _Copy(rollout_id, name, number, size_bytes, tuple(one for _, one, _ in older))
    latest = sorted(newest, key=lambda rollout_id: newest[rollout_id].number)[-COPIES_MAX:]
    return {rollout_id: newest[rollout_id] for rollout_id in latest}
