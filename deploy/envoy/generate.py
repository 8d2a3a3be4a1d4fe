"""Generates Envoy's static configuration. Owns: the whole document, what is written where, the drift check.

`python -m deploy.envoy.generate` prints one. Its parameters are flags, or a YAML file of them (`--config`).
`--shipped` writes every variant that is committed, `--check` fails when one of them differs. Every choice has
its reason beside it, in the module that makes it: `listener`, `transport`, `routes`, `replies`, `clusters`,
`overload`, `probe`.

One Envoy serves one configuration for its life, without a control plane. What can change under it: the
certificate (see `transport`) and, where gateways have names, their addresses (see `clusters`). For everything
else another Envoy takes over, and the old one drains: `drain.sh` beside this file lets its streams end and
then ends it. Where two Envoys stand behind one address (a load balancer, a Kubernetes service) that is a
rolling update. On one machine Envoy's hot restart hands over the listening socket: start the new one with
`--restart-epoch` one higher and the same `--base-id`; the old one drains for `--drain-time-s` and ends after
`--parent-shutdown-time-s`, which must be above the longest deadline of a stream that shall survive it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deploy.envoy.address import address
from deploy.envoy.clusters import clusters
from deploy.envoy.command_line import Arguments, parse, read_file
from deploy.envoy.listener import listener
from deploy.envoy.overload import overload_manager, runtime
from deploy.envoy.parameters import Endpoint, ParameterInvalid, Parameters
from deploy.envoy.probe import probe_listener
from deploy.envoy.transport import secret

_HERE = Path(__file__).resolve().parent
DESCRIPTORS = _HERE / "interlock.binpb"
COMMITTED = _HERE / "envoy.yaml"
# Each folder has `parameters.yaml`, and beside it what is made of them.
VARIANTS = _HERE / "variants"
# Where the SDS file is written: beside the configuration, under the name that Envoy opens it by.
_SECRET_NAME = "certificate.yaml"  # noqa: S105 - a file's name

_HEADER = "# Made by `python -m deploy.envoy.generate`, where every choice has its reason. Do not edit.\n"


@dataclass(frozen=True, slots=True)
class Variant:
    """One committed configuration.

    Attributes:
        name: As people call it.
        parameters: What it is made of.
        file: Where it is.
    """

    name: str
    parameters: Parameters
    file: Path


def bootstrap(parameters: Parameters) -> dict[str, Any]:
    """The whole configuration as plain data."""
    listeners = [listener(parameters)]
    if parameters.probe is not None:
        listeners.append(probe_listener(parameters.probe))
    return {
        # It can stop Envoy and shows everything: loopback, and never counted against the clients' limit.
        "admin": {"address": _admin_address(parameters.admin), "ignore_global_conn_limit": True},
        # SDS wants a node, though a file asks nobody's name.
        "node": {"id": "interlock", "cluster": "interlock"},
        "static_resources": {"listeners": listeners, "clusters": clusters(parameters)},
        "overload_manager": overload_manager(parameters),
        "layered_runtime": runtime(),
    }


def _admin_address(admin: Endpoint | Path) -> dict[str, Any]:
    if isinstance(admin, Endpoint):
        return address(admin)
    # Any local user reaches a port; a socket in a private directory is its owner's alone.
    return {"pipe": {"path": str(admin), "mode": 0o600}}


def render(parameters: Parameters) -> str:
    """The configuration as YAML, the same bytes for the same parameters."""
    return _written(bootstrap(parameters))


def render_secret(parameters: Parameters) -> str | None:
    """The SDS file as YAML; None where no TLS is served."""
    return None if parameters.certificate is None else _written(secret(parameters.certificate))


def _written(document: dict[str, Any]) -> str:
    return _HEADER + yaml.dump(document, Dumper=_PlainDumper, sort_keys=False, width=110)


class _PlainDumper(yaml.SafeDumper):
    """Repeats equal parts instead of naming them: Envoy's reader and people's eyes know no anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - the base class names it
        return True


def shipped() -> tuple[Variant, ...]:
    """Every variant that is committed, the one of a local mesh first.

    Raises:
        ParameterInvalid: A file of parameters cannot be used.
    """
    files = sorted(VARIANTS.glob("*/parameters.yaml"))
    others = [Variant(file.parent.name, read_file(file), file.with_name("envoy.yaml")) for file in files]
    return (Variant("local", Parameters(), COMMITTED), *others)


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "python -m deploy.envoy.generate",
    descriptors: str | None = None,
) -> int:
    """Writes configurations, or compares them with the files. Returns the exit code.

    Args:
        argv: The command line; None: the process's own.
        prog: What it is called in messages.
        descriptors: The descriptor set where neither flag nor file names one; None: the checkout's.
    """
    try:
        arguments = parse(argv, prog, {} if descriptors is None else {"descriptors": descriptors})
        texts = _texts(arguments)
    except ParameterInvalid as error:
        print(f"generate: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        # Each is looked at, so that one run names all.
        remedy = "--shipped" if arguments.out is None else f"--out {arguments.out}"
        return max([_check(text, file, remedy) for file, text in texts.items()])
    if arguments.out is None and not arguments.shipped:
        sys.stdout.write(render(arguments.parameters))
        return 0
    return max(_write(text, file) for file, text in texts.items())


def _texts(arguments: Arguments) -> dict[Path, str]:
    """What belongs into which file."""
    if arguments.shipped or (arguments.check and arguments.out is None):
        pairs = [(variant.file, variant.parameters) for variant in shipped()]
    else:
        pairs = [(arguments.out or COMMITTED, arguments.parameters)]
    texts: dict[Path, str] = {}
    for file, parameters in pairs:
        texts[file] = render(parameters)
        text = render_secret(parameters)
        if text is not None:
            texts[file.with_name(_SECRET_NAME)] = text
    return texts


def _write(text: str, file: Path) -> int:
    try:
        file.write_text(text)
    except OSError as error:
        print(f"generate: {file} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _check(text: str, file: Path, remedy: str) -> int:
    if file.exists() and file.read_text() == text:
        return 0
    print(f"stale: {file} (run `python -m deploy.envoy.generate {remedy}`)", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
