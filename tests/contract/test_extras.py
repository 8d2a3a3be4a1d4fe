"""Each service's extra installs what the service imports: its image has nothing else."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"services", "interlock"}
# What a distribution that is asked for by name brings along by its nature.
BROUGHT = {"markupsafe": "jinja2", "pydantic_core": "pydantic", "google": "protobuf"}


def installed_by(extra: str) -> set[str]:
    """The distributions that an extra names, with those of the extras that it names."""
    found: set[str] = set()
    for requirement in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"].get(extra, ())):
        matched = re.match(r"([A-Za-z0-9._-]+)(?:\[([^]]+)\])?", requirement)
        assert matched is not None
        name, extras = matched.groups()
        if name == "interlock":
            for one in extras.split(","):
                found |= installed_by(one.strip())
        else:
            found.add(name.lower().replace("_", "-"))
    return found


def module_file(module: str) -> Path | None:
    """The file of one of our own modules."""
    place = ROOT.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.exists():
            return file
    return None


def imports_of(file: Path) -> Iterator[str]:
    """The modules that a file imports whenever it runs; what is for type checkers alone is left out."""
    tree = ast.parse(file.read_text())
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reached_from(module: str) -> set[str]:
    """The packages of others that a module's whole tree of imports names."""
    foreign: set[str] = set()
    seen: set[Path] = set()
    waiting = [module]
    while waiting:
        file = module_file(waiting.pop())
        if file is None or file in seen:
            continue
        seen.add(file)
        for name in imports_of(file):
            top = name.partition(".")[0]
            if top == "services":
                waiting.append(name)
            elif top not in OURS and top not in sys.stdlib_module_names:
                foreign.add(top)
    return foreign


@pytest.mark.parametrize("service", ["gateway", "worker", "controller"])
def test_an_extra_installs_what_its_service_imports(service: str) -> None:
    """By name, and not because another package happens to bring it."""
    distributions, installed = packages_distributions(), installed_by(service)
    found = reached_from(f"services.{service}.__main__")
    assert {"grpc", "structlog"} <= found
    missing = []
    for package in found:
        names = {name.lower().replace("_", "-") for name in distributions.get(package, [package])}
        names.add(BROUGHT.get(package, package))
        if not names & installed:
            missing.append(package)
    assert sorted(missing) == []
