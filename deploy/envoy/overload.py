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
        # What a stream holds is counted from 1 MiB on, a quarter of the longest message.
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 20},
        "actions": [
            # Whoever keeps most of a message back, so that Envoy has to keep the rest, is the first to go.
            _action("reset_high_memory_stream", _between(0.80, 0.95)),
            _action("shrink_heap", _from(0.90)),
            _action("disable_http_keepalive", _from(0.95)),
            _action("stop_accepting_requests", _from(0.98)),
        ],
    }


def _action(name: str, trigger: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"envoy.overload_actions.{name}", "triggers": [{"name": _HEAP, **trigger}]}


def _from(share: float) -> dict[str, Any]:
    """All of it, once so much of the memory is taken."""
    return {"threshold": {"value": share}}


def _between(first: float, last: float) -> dict[str, Any]:
    """The more of it, the more of the memory is taken."""
    return {"scaled": {"scaling_threshold": first, "saturation_threshold": last}}


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
