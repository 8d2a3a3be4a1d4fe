"""`interlock bench`. Owns: which measurements there are, and the way to them.

They live in the checkout beside the services and are not installed with them.
"""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

from services.cli.failure import CommandFailed

# Said here once more, since importing the modules for their own words would load torch.
BENCHES = {
    "edge": "the way through Envoy and HTTP beside the worker's own: first token, tokens/s",
    "engine": "the engine by batch size, beside its peers on the same work",
    "lanes": "a step of the engine both ways, all threads together and in lanes, also beside another process",
    "load": "a mesh under load: goodput, latencies, refusals and shares, with and without the queue",
    "members": "a thousand workers at one controller: how fast they attach, and what a rollout costs",
    "mesh": "a running mesh's throughput by the number of requests at once",
    "overload": "a mesh under several times what it can do: refusals, what it still does, and afterwards",
    "prefill": "what prompts cost: a chat's second turn, streams beside a prefill, mixed lengths",
    "quality": "what quantization costs: perplexity, and whether answers repeat",
    "queue_latency": "the queue's scripts against a Redis",
    "relay": "what a gateway costs beside a bare relay",
    "rollouts": "a running mesh whose model is replaced under load: what clients notice",
    "startup": "a worker's cold start by phase, and the memory that workers share",
}


def run(arguments: argparse.Namespace) -> int:
    """Runs one measurement with its own arguments, or lists them all."""
    if not arguments.rest or arguments.rest[0] in {"-h", "--help"}:
        print(listing())
        return 0
    name, *rest = arguments.rest
    if name not in BENCHES:
        raise CommandFailed(f"no such measurement: {name}. There are {', '.join(BENCHES)}.")
    return int(_module(name).main(rest) or 0)


def listing() -> str:
    """Every measurement with what it measures."""
    width = max(map(len, BENCHES))
    lines = [f"  {name.ljust(width)}  {summary}" for name, summary in BENCHES.items()]
    return "\n".join(["usage: interlock bench NAME [ARGUMENTS...]", "", *lines])


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"bench.{name}")
    except ModuleNotFoundError as error:
        if error.name in {"bench", f"bench.{name}"}:
            raise CommandFailed(
                "measurements are not installed with the mesh. Run this in a checkout, after `make install`."
            ) from None
        raise CommandFailed(f"bench {name} needs {error.name}, which `make install` installs.") from None
