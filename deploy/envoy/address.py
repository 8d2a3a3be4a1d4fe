"""Addresses as Envoy writes them."""

from __future__ import annotations

from typing import Any

from deploy.envoy.parameters import Endpoint


def address(endpoint: Endpoint) -> dict[str, Any]:
    """One socket's address."""
    return {"socket_address": {"address": endpoint.host, "port_value": endpoint.port}}
