"""Envoy's overload manager. Owns: what Envoy gives up, and in which order, before it runs out."""

from __future__ import annotations

from typing import Any

_TYPE = "type.googleapis.com/envoy.extensions.resource_monitors"
_HEAP = "envoy.resource_monitors.fixed_heap"

# A machine allows 1,024 descriptors a process by default; upstream, logs and admin need some.
_CONNECTIONS_MAX = 900
# Envoy rests at 40 MiB; 900 connections with full windows stay below this.
_HEAP_BYTES_MAX = 1_073_741_824


def overload_manager() -> dict[str, Any]:
    """A bound on connections and memory: first give memory back, then refuse politely."""
    return {
        # Often enough to act within one burst.
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": f"{_TYPE}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": _CONNECTIONS_MAX,
                },
            },
            {
                "name": _HEAP,
                "typed_config": {
                    "@type": f"{_TYPE}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": _HEAP_BYTES_MAX,
                },
            },
        ],
        "actions": [
            _action("shrink_heap", 0.90),
            _action("disable_http_keepalive", 0.95),
            _action("stop_accepting_requests", 0.98),
        ],
    }


def _action(name: str, threshold: float) -> dict[str, Any]:
    return {
        "name": f"envoy.overload_actions.{name}",
        "triggers": [{"name": _HEAP, "threshold": {"value": threshold}}],
    }
