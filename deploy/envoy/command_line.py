"""The generator's command line. Owns: the flags, and the YAML file that may hold them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from deploy.envoy.parameters import (
    PORT_MAX,
    Certificate,
    Endpoint,
    ParameterInvalid,
    Parameters,
)

_DESCRIPTION = "Print the Envoy configuration of a mesh: one port before gateways and controllers."

# A page of settings; the bound keeps a wrong path from being read whole.
_FILE_BYTES_MAX = 65_536

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Arguments:
    """What one call of the generator asks for.

    Attributes:
        parameters: What the configuration is made of.
        out: Where to write it; None: standard output.
        shipped: Write what is committed instead.
        check: Compare instead of writing.
    """

    parameters: Parameters
    out: Path | None
    shipped: bool
    check: bool


def parse(argv: Sequence[str] | None, prog: str, fallback: Mapping[str, Any]) -> Arguments:
    """Reads the command line, and the file that it names; a flag wins over the file, both over `fallback`.

    Raises:
        ParameterInvalid: A value cannot be used.
    """
    flags = vars(_command(prog).parse_args(argv))
    out, shipped, check = flags.pop("out"), flags.pop("shipped"), flags.pop("check")
    config = flags.pop("config")
    of_file = {} if config is None else _flags_of(config)
    return Arguments(_parameters({**fallback, **of_file, **flags}), out, shipped, check)


def read_file(file: Path) -> Parameters:
    """The parameters that a YAML file names, the defaults for the others.

    Raises:
        ParameterInvalid: The file cannot be read, or names what does not exist.
    """
    return _parameters(_flags_of(file))


def _flags_of(file: Path) -> dict[str, Any]:
    parser = _FileParser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    _add_parameters(parser)
    try:
        return vars(parser.parse_args(_tokens(file)))
    except ParameterInvalid as error:
        raise ParameterInvalid(f"{file}: {error}") from None


def _tokens(file: Path) -> list[str]:
    """The file as a command line: each key is a flag, each item of a list repeats it."""
    try:
        if file.stat().st_size > _FILE_BYTES_MAX:
            raise ParameterInvalid(f"larger than {_FILE_BYTES_MAX} bytes; is it a file of parameters?")
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterInvalid(f"cannot be read ({error.__class__.__name__})") from None
    if not isinstance(content, dict):
        raise ParameterInvalid("expected `key: value` lines")
    tokens = []
    for key, value in content.items():
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, str | int) or isinstance(item, bool):
                raise ParameterInvalid(f"{key}: expected text, a number, or a list of them")
            tokens.append(f"--{key}={item}")
    return tokens


class _FileParser(argparse.ArgumentParser):
    """Raises what the command line's parser would end the process with."""

    def error(self, message: str) -> NoReturn:
        raise ParameterInvalid(message)


def _parameters(flags: dict[str, Any]) -> Parameters:
    """Flags that were not given keep their defaults."""
    defaults = Parameters()
    given: dict[str, Any] = {
        name: flags[name]
        for name in ("descriptors", "access_log", "instance", "connections_max", "heap_bytes_max")
        if name in flags
    }
    for name, flag in (("gateways", "gateway"), ("controllers", "controller")):
        if flag in flags:
            given[name] = tuple(Endpoint.parse(text) for text in flags[flag])
    if "cors_origin" in flags:
        given["cors_origins"] = tuple(flags["cors_origin"])
    host = flags.get("host", defaults.listen.host)
    given["listen"] = Endpoint(host, flags.get("port", defaults.listen.port))
    if "admin_port" in flags:
        given["admin"] = Endpoint(_LOOPBACK, flags["admin_port"])
    if "probe_port" in flags:
        given["probe"] = Endpoint(host, flags["probe_port"])
    if ("tls_secret" in flags) != ("tls_directory" in flags):
        raise ParameterInvalid("tls-secret and tls-directory go together.")
    if "tls_secret" in flags:
        given["certificate"] = Certificate(flags["tls_secret"], flags["tls_directory"])
    return Parameters(**given)


def _command(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=_DESCRIPTION, argument_default=argparse.SUPPRESS)
    _add_parameters(parser)
    parser.add_argument(
        "--config", type=Path, default=None, metavar="FILE", help="YAML with these flags as keys; flags win"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="write here (standard output); with TLS also certificate.yaml beside it",
    )
    parser.add_argument("--shipped", action="store_true", default=False, help="write every committed variant")
    parser.add_argument(
        "--check",
        action="store_true",
        default=False,
        help="fail when the file at --out differs; without --out, when a committed variant does",
    )
    return parser


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    of = Parameters()
    add = parser.add_argument
    add("--host", help=f"address for clients ({of.listen.host})")
    add("--port", type=_port, help=f"port for clients ({of.listen.port})")
    add("--admin-port", type=_port, help="on loopback (9901)")
    add("--probe-port", type=_port, help="GET /ready for an orchestrator (none)")
    add("--gateway", action="append", metavar="HOST:PORT", help=f"may be repeated ({of.gateways[0]})")
    add("--controller", action="append", metavar="HOST:PORT", help=f"may be repeated ({of.controllers[0]})")
    add("--descriptors", metavar="PATH", help="the API's descriptor set")
    add("--tls-secret", metavar="PATH", help="SDS file; makes the port speak TLS (none)")
    add("--tls-directory", metavar="PATH", help="where tls.crt and tls.key are, watched for renewed ones")
    add("--cors-origin", action="append", metavar="REGEX", help="may be repeated (localhost)")
    add("--access-log", metavar="PATH", help="a file (standard output)")
    add("--instance", metavar="NAME", help=f"in the access log ({of.instance})")
    add("--connections-max", type=_count, metavar="N", help=f"of clients ({of.connections_max})")
    add("--heap-bytes-max", type=_count, metavar="N", help=f"memory of Envoy ({of.heap_bytes_max})")


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > PORT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to {PORT_MAX}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)
