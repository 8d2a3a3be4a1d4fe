"""Generates Envoy's static configuration. Owns: the whole document, the command line and the drift check.

`python -m deploy.envoy.generate --out deploy/envoy/envoy.yaml` writes the committed file, `--check` fails
when it differs. Every choice has its reason beside it, in the module that makes it: `listener`, `routes`,
`clusters`, `overload`.

One Envoy serves one configuration for its life: no control plane, no hot restart. To change it, start
another Envoy and let the old one drain (`POST /drain_listeners?graceful` on the admin interface).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from deploy.envoy.clusters import clusters
from deploy.envoy.listener import address, listener
from deploy.envoy.overload import overload_manager
from deploy.envoy.parameters import (
    ADMIN_PORT,
    LOCAL_ORIGINS,
    PORT_MAX,
    Endpoint,
    ParameterInvalid,
    Parameters,
)

COMMITTED = Path(__file__).resolve().with_name("envoy.yaml")
DESCRIPTORS = Path(__file__).resolve().with_name("interlock.binpb")

_DESCRIPTION = "Print the Envoy configuration of a mesh: one port before gateways and controller."

_HEADER = "# Made by `python -m deploy.envoy.generate`, where every choice has its reason. Do not edit.\n"


def bootstrap(parameters: Parameters) -> dict[str, Any]:
    """The whole configuration as plain data."""
    return {
        # It can stop Envoy and shows everything: loopback, and never counted against the clients' limit.
        "admin": {"address": _admin_address(parameters.admin), "ignore_global_conn_limit": True},
        "static_resources": {"listeners": [listener(parameters)], "clusters": clusters(parameters)},
        "overload_manager": overload_manager(),
    }


def _admin_address(admin: Endpoint | Path) -> dict[str, Any]:
    if isinstance(admin, Endpoint):
        return address(admin)
    # Any local user reaches a port; a socket in a private directory is its owner's alone.
    return {"pipe": {"path": str(admin), "mode": 0o600}}


def render(parameters: Parameters) -> str:
    """The configuration as YAML, the same bytes for the same parameters."""
    body = yaml.dump(bootstrap(parameters), Dumper=_PlainDumper, sort_keys=False, width=110)
    return _HEADER + body


class _PlainDumper(yaml.SafeDumper):
    """Repeats equal parts instead of naming them: Envoy's reader and people's eyes know no anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class names it
        return True


def main(argv: Sequence[str] | None = None, *, prog: str = "python -m deploy.envoy.generate") -> int:
    """Writes the configuration, or compares it with the file at `--out`. Returns the exit code."""
    arguments = _parser(prog).parse_args(argv)
    try:
        text = render(_parameters(arguments))
    except ParameterInvalid as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    out: Path | None = arguments.out
    if arguments.check:
        return _check(text, out or COMMITTED)
    if out is None:
        sys.stdout.write(text)
        return 0
    try:
        out.write_text(text)
    except OSError as error:
        print(f"generate: {out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _check(text: str, committed: Path) -> int:
    if committed.exists() and committed.read_text() == text:
        return 0
    print(f"stale: {committed} (run `python -m deploy.envoy.generate --out {committed}`)", file=sys.stderr)
    return 1


def _parameters(arguments: argparse.Namespace) -> Parameters:
    defaults = Parameters()
    gateways = tuple(Endpoint.parse(text) for text in arguments.gateway or ())
    return Parameters(
        listen=Endpoint(arguments.host, arguments.port),
        admin=Endpoint("127.0.0.1", arguments.admin_port),
        gateways=gateways or defaults.gateways,
        controller=Endpoint.parse(arguments.controller),
        descriptors=arguments.descriptors,
        cors_origins=tuple(arguments.cors_origin or LOCAL_ORIGINS),
        access_log=arguments.access_log,
    )


def _parser(prog: str) -> argparse.ArgumentParser:
    defaults = Parameters()
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION)
    parser.add_argument("--host", default=defaults.listen.host, help="address for clients (%(default)s)")
    parser.add_argument(
        "--port", type=_port, default=defaults.listen.port, help="port for clients (%(default)s)"
    )
    parser.add_argument("--admin-port", type=_port, default=ADMIN_PORT, help="on loopback (%(default)s)")
    parser.add_argument(
        "--gateway", action="append", metavar="HOST:PORT", help=f"may be repeated ({defaults.gateways[0]})"
    )
    parser.add_argument(
        "--controller", default=str(defaults.controller), metavar="HOST:PORT", help="(%(default)s)"
    )
    parser.add_argument(
        "--descriptors", default=defaults.descriptors, metavar="PATH", help="the API's descriptor set"
    )
    parser.add_argument("--cors-origin", action="append", metavar="REGEX", help="may be repeated (localhost)")
    parser.add_argument("--access-log", metavar="PATH", help="a file (standard output)")
    parser.add_argument("--out", type=Path, help="write here (standard output)")
    parser.add_argument("--check", action="store_true", help="fail when the file at --out differs")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > PORT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to {PORT_MAX}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
