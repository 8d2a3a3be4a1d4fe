"""The mesh of a home. Owns: how commands find it, and what they say where none can be found.

Imports nothing heavy: whoever only looks has not to wait for gRPC.
"""

from __future__ import annotations

from services.cli.failure import CommandFailed
from services.local import state
from services.local.home import Home
from services.local.state import MeshState, StateUnreadable


def mesh_in(home: Home, *, otherwise: str = "") -> MeshState:
    """What runs in the home.

    Args:
        home: The home.
        otherwise: What else can be done where nothing runs; goes on after `interlock up`.

    Raises:
        CommandFailed: Nothing does, or what does describes itself in a way that is not known here.
    """
    # Asked first: what a mesh that died has left may be cut, or of an earlier version.
    holder = home.holder()
    try:
        mesh = state.read(home.state_file) if holder is not None else None
    except StateUnreadable as error:
        raise CommandFailed(
            f"process {holder} runs a mesh in {home.path}, and {error}. It may be of another version: stop "
            "it with `interlock down`, and start it again."
        ) from None
    if mesh is None:
        starting = "" if holder is None else f" (process {holder} is starting or stopping one)"
        raise CommandFailed(
            f"no mesh runs in {home.path}{starting}. Start one with `interlock up`{otherwise}."
        )
    return mesh
