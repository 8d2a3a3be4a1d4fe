"""A gateway in a process of its own, which a test may stop: `python -m tests.fakes.gateway_process URL NAME`.

It prints its address, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from services.common.redis_client import connect
from tests.fixtures.resumption_world import ResumptionWorld

# So little that a worker soon waits for the clients of one that is stopped.
CREDIT_TOKENS = 16


async def main(url: str, name: str) -> None:
    """Serves until nobody holds the other end of its input."""
    store = connect(url)
    async with AsyncExitStack() as exits:
        world = ResumptionWorld(url, store, exits)
        peer = await world.add_gateway(name, credit_tokens=CREDIT_TOKENS)
        print(peer.address, flush=True)  # noqa: T201 - the test reads it
        await asyncio.to_thread(sys.stdin.read)
        await world.close()
    await store.close()


@asynccontextmanager
async def gateway_process(url: str, name: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Another gateway of the world in Redis at `url`, and its address; it is killed afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.gateway_process", url, name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            address = (await process.stdout.readline()).decode().strip()
        yield process, address
    finally:
        process.stdin.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
