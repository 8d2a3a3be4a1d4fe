"""Configuration. Owns: how a service's frozen dataclass is filled, and how its mistakes are told.

Sources, later ones win: the dataclass's defaults, a YAML file (`--config`), the environment:
`INTERLOCK_<FIELD>` for `SHARED_FIELDS`, then `INTERLOCK_<SERVICE>_<FIELD>`. An unknown key, a wrong type
or a value out of range stops the start and names the key. Units are in the names (`_s`, `_tokens`, `_bytes`).

A field is `name: Annotated[type, Field(ge=..., description="...")] = default`; secrets are `SecretStr`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

C = TypeVar("C")

# One setting for the whole mesh: `INTERLOCK_JWT_SECRET` reaches every service that has the field.
SHARED_FIELDS = (
    "jwt_algorithm",
    "jwt_audience",
    "jwt_issuer",
    "jwt_jwks",
    "jwt_jwks_http",
    "jwt_secret",
    "log_level",
    "mesh_token",
    "redis_url",
)

# A configuration is a page, not a data set; this bound keeps a wrong path from being read whole.
CONFIG_FILE_BYTES_MAX = 1 << 20


class ConfigInvalid(Exception):
    """The configuration cannot be used; the message names every key that is wrong."""


def load(kind: type[C], service: str, *, file: Path | None, environ: Mapping[str, str]) -> C:
    """Returns the configuration of `service`, read into the dataclass `kind`.

    Raises:
        ConfigInvalid: A key is unknown, a value has the wrong type or is out of range, or the file
            cannot be read.
    """
    prefix = f"INTERLOCK_{service.upper()}_"
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, value in _read_file(file).items():
        values[name], origins[name] = value, f"{name} in {file}"
    for name in SHARED_FIELDS:
        variable = f"INTERLOCK_{name.upper()}"
        if name in names and variable in environ:
            values[name], origins[name] = environ[variable], variable
    for variable, text in environ.items():
        if not variable.startswith(prefix):
            continue
        name = variable.removeprefix(prefix).lower()
        values[name], origins[name] = _parse_text(text), variable
    problems = [
        f"{origins[name]}: unknown; known keys are {', '.join(sorted(names))}"
        for name in values
        if name not in names
    ]
    if problems:
        raise ConfigInvalid("\n".join(problems))
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        # The input is left out: it may be a secret.
        found = error.errors(include_url=False, include_input=False)
        raise ConfigInvalid("\n".join(_told(item, origins) for item in found)) from None


def printed(config: Any) -> str:
    """The configuration as YAML, with secrets masked: what `--print-config` shows."""
    plain = json.loads(TypeAdapter(type(config)).dump_json(config))
    return yaml.safe_dump(plain, sort_keys=False)


def from_command_line(kind: type[C], service: str, argv: Sequence[str] | None = None) -> C:
    """Returns the configuration of a server process, or ends it: 0 after printing, 2 on a mistake."""
    parser = argparse.ArgumentParser(
        prog=f"python -m services.{service}",
        description=f"The {service} of an Interlock mesh. Settings come from INTERLOCK_{service.upper()}_* "
        "variables or a YAML file; --print-config shows them all.",
        epilog=f"settings:\n{_described(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings without secrets and exit"
    )
    arguments = parser.parse_args(argv)
    try:
        config = load(kind, service, file=arguments.config, environ=os.environ)
    except ConfigInvalid as error:
        print(f"{service}: the configuration is not usable:\n{error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    if arguments.print_config:
        print(printed(config), end="")  # noqa: T201
        sys.exit(0)
    return config


def _described(kind: type[Any]) -> str:
    """What each setting says of itself, for the help."""
    hints = get_type_hints(kind, include_extras=True)
    lines = []
    for field in dataclasses.fields(kind):
        notes = getattr(hints[field.name], "__metadata__", ())
        told = next(
            (note.description for note in notes if isinstance(note, FieldInfo) and note.description), ""
        )
        indent = " " * 6
        text = textwrap.fill(told, 100, initial_indent=indent, subsequent_indent=indent) if told else ""
        lines.append(f"  {field.name}\n{text}".rstrip())
    return "\n".join(lines)


def _told(problem: ErrorDetails, origins: Mapping[str, str]) -> str:
    """One line for one mistake: where the value came from, and what is wrong with it."""
    name = str(problem["loc"][0]) if problem["loc"] else "settings"
    return f"{origins.get(name, name)}: {problem['msg']}"


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        if file.stat().st_size > CONFIG_FILE_BYTES_MAX:
            raise ConfigInvalid(f"{file}: larger than {CONFIG_FILE_BYTES_MAX} bytes; is it a configuration?")
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{file}: cannot be read ({error.__class__.__name__})") from None
    except yaml.YAMLError as error:
        raise ConfigInvalid(f"{file}: not plain YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigInvalid(f"{file}: expected `key: value` lines, found {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


def _parse_text(text: str) -> Any:
    """Lists and mappings are written as JSON; everything else stays text, which pydantic converts."""
    if text[:1] in {"[", "{"}:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text
