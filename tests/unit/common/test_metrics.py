"""Metrics: a process shows its numbers where it was told, and every RPC leaves one behind."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from services.common import metrics


def _read(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as reply:
        return str(reply.read(), "utf-8")


def test_the_numbers_are_shown_at_the_address_that_was_found() -> None:
    """Port 0 takes a free one, which is told; after the end nobody answers there."""
    exposition = metrics.expose("127.0.0.1:0")
    try:
        assert "interlock_rpc_finished_total" in _read(exposition.address)
        assert not exposition.address.endswith(":0")
    finally:
        exposition.close()
    with pytest.raises(OSError, match="refused"):
        _read(exposition.address)


def test_an_empty_address_turns_them_off() -> None:
    """Nothing listens, and there is nothing to close."""
    exposition = metrics.expose("")
    assert exposition.address == ""
    exposition.close()


def test_a_taken_port_is_named() -> None:
    """The message says which, and what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(metrics.MetricsPortTaken, match=f"Port {port} on 127.0.0.1 is taken"):
            metrics.expose(f"127.0.0.1:{port}")
