"""The recipes of docs/operations.md, as they are pasted: who is told of whom, and whose secrets are."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from tests.fixtures.manifests import CONFIGS, GIVEN, ROOT, settings

GUIDE = (ROOT / "docs" / "operations.md").read_text()
STARTED = re.compile(r"^((?:INTERLOCK_\S+ )+)python -m services\.(\w+)$", re.MULTILINE)

# Stands in for what a recipe calls: writes down its arguments, and prints what `openssl rand -hex` may.
PROGRAM = """#!/bin/sh
printf '%s\\n' "$@" >> "$OUT/${0##*/}.told"
[ "${0##*/}" != openssl ] || echo 0123456789abcdef0123456789abcdef
"""


def _paste(heading: str, place: Path) -> None:
    """Runs the first block below a heading in `place`, by a shell that knows none of its variables."""
    below = GUIDE.partition(f"\n### {heading}\n")[2]
    recipe = below.split("\n```\n")[1]
    programs = place / "programs"
    programs.mkdir()
    for name in ("docker", "kubectl", "openssl"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    subprocess.run(
        ["bash", "-euc", recipe],
        check=True,
        timeout=20,
        cwd=place,
        umask=0o022,
        env={"PATH": f"{programs}:/usr/bin:/bin", "OUT": str(place)},
    )


def test_members_find_their_controller_where_it_listens() -> None:
    """The services read their lines, and members are told the addresses that controllers bind."""
    read = []
    for told, service in STARTED.findall(GUIDE):
        environ = dict(word.split("=", 1) for word in shlex.split(told))
        read.append((service, settings(service, environ | {"INTERLOCK_MESH_TOKEN": GIVEN["mesh-token"]})))
    assert {service for service, _ in read} == set(CONFIGS)
    bound = {found.bind for service, found in read if service == "controller"}
    members = [found for service, found in read if service != "controller"]
    assert bound == {
        address
        for member in members
        for address in (*member.controllers, *getattr(member, "fallback_controllers", ()))
    }


def test_the_secrets_of_the_compose_file_are_their_owners(tmp_path: Path) -> None:
    """Whatever else the shell's files are, nobody but their owner reads these."""
    (tmp_path / "deploy" / "docker").mkdir(parents=True)
    _paste("In containers", tmp_path)
    file = tmp_path / "deploy" / "docker" / ".env"
    assert file.stat().st_mode & 0o777 == 0o600
    told = dict(line.split("=", 1) for line in file.read_text().splitlines())
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "deploy" / "docker" / "compose.yaml").read_text()))
    assert set(told) == asked
    assert all(told.values())
    assert (tmp_path / "docker.told").read_text().splitlines()[:2] == ["compose", "up"]


def test_redis_in_the_cluster_has_a_password(tmp_path: Path) -> None:
    """Made by the recipe itself, the same for the store and for those who ask it."""
    _paste("In Kubernetes", tmp_path)
    words = (tmp_path / "kubectl.told").read_text().splitlines()
    told = dict(re.findall(r"^--from-literal=([a-z-]+)=(.*)$", "\n".join(words), re.MULTILINE))
    assert re.fullmatch(r"[0-9a-f]{32,}", told["redis-password"])
    assert told["redis-url"] == GIVEN["redis-url"].replace("password", told["redis-password"])
