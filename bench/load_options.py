"""The options that measurements under load have in common. Owns: their names, and what they mean."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager
from typing import Any

from bench.load_plan import Load, Tenant, tenant
from bench.load_world import started
from bench.race.machine_facts import processor_line


def add_requests(parser: argparse.ArgumentParser, load: Load) -> None:
    """Adds what is asked, and by whom, with the defaults of `load`."""
    asked = parser.add_argument_group("requests")
    asked.add_argument("--transport", choices=("grpc", "http"), default="grpc", help="(%(default)s)")
    asked.add_argument(
        "--tenant",
        type=tenant,
        action="append",
        metavar="NAME[:WEIGHT[:PRIORITY[:CLIENTS]]]",
        help="who asks; CLIENTS is its share of the clients. May be given several times (load:1)",
    )
    for name, number, text in (
        ("--prompt-tokens", load.prompt_tokens, "(%(default)s)"),
        ("--answer-tokens", load.answer_tokens, "at most (%(default)s)"),
    ):
        asked.add_argument(name, type=int, default=number, metavar="N", help=text)
    asked.add_argument("--mixed", action="store_true", help="answers of half to three halves of that")
    shown = "the mesh's default" if load.deadline_s is None else f"{load.deadline_s:g}"
    asked.add_argument(
        "--deadline", type=float, default=load.deadline_s, metavar="S", help=f"of each request ({shown})"
    )


def add_times(parser: argparse._ArgumentGroup, load: Load) -> None:
    """Adds how long a step takes, with the defaults of `load`."""
    for name, seconds, text in (
        ("--duration", load.duration_s, "of a step (%(default)g)"),
        ("--warmup", load.warmup_s, "before each (%(default)g)"),
    ):
        parser.add_argument(name, type=float, default=seconds, metavar="S", help=text)


def add_mesh(parser: argparse.ArgumentParser, gateways: int = 1) -> None:
    """Adds which mesh is loaded."""
    mesh = parser.add_argument_group("mesh")
    mesh.add_argument("--up", action="store_true", help="start one in this home, and stop it afterwards")
    mesh.add_argument("--workers", type=int, default=1, metavar="N", help="with --up (%(default)s)")
    mesh.add_argument("--gateways", type=int, default=gateways, metavar="N", help="with --up (%(default)s)")


def load_of(arguments: argparse.Namespace) -> Load:
    """The load that was asked for."""
    return Load(
        tenants=tuple(arguments.tenant or [Tenant("load")]),
        prompt_tokens=arguments.prompt_tokens,
        answer_tokens=arguments.answer_tokens,
        mixed=arguments.mixed,
        deadline_s=arguments.deadline,
        duration_s=arguments.duration,
        warmup_s=arguments.warmup,
    )


def mesh_of(arguments: argparse.Namespace) -> AbstractContextManager[None]:
    """The mesh that is loaded runs inside: one of its own with `--up`. See `started`."""
    options = ("--workers", str(arguments.workers), "--gateways", str(arguments.gateways))
    return started(options, up=arguments.up)


def circumstances(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a report says of where and how it was measured."""
    return {"machine": processor_line(), "transport": arguments.transport}
