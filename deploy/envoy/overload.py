"""Envoy's overload manager. Owns: what Envoy gives up before it runs out, and which clients it throws out."""

from __future__ import annotations

from typing import Any

from deploy.envoy.parameters import Parameters

_TYPE = "type.googleapis.com/envoy.extensions.resource_monitors"
_HEAP = "envoy.resource_monitors.fixed_heap"


def overload_manager(parameters: Parameters) -> dict[str, Any]:
    """A bound on connections and memory: first give memory back, then refuse politely."""
    return {
        # Often enough to act within one burst.
        "refresh_interval": "0.25s",
        "resource_monitors": [
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": f"{_TYPE}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": parameters.connections_max,
                },
            },
            {
                "name": _HEAP,
                "typed_config": {
                    "@type": f"{_TYPE}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": parameters.heap_bytes_max,
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


def runtime() -> dict[str, Any]:
    """Switches of Envoy that are no fields of its configuration; written down, so that they stay."""
    return {
        "layers": [
            {
                "name": "limits",
                "static_layer": {
                    # A connection whose streams are mostly reset within a second, once it has had 500, is
                    # an attack (rapid reset): it is closed. Clients that change their minds stay below it.
                    "overload.premature_reset_total_stream_count": 500,
                    "overload.premature_reset_min_stream_lifetime_seconds": 1,
                    # So many new requests of one connection are begun before the others get their turn.
                    "http.max_requests_per_io_cycle": 32,
                },
            }
        ]
    }
