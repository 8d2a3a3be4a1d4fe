"""Envoy's second listener. Owns: what an orchestrator hears about this Envoy, and nothing else."""

from __future__ import annotations

from typing import Any

from deploy.envoy.address import address
from deploy.envoy.parameters import Endpoint

_TYPE = "type.googleapis.com/envoy.extensions"


def probe_listener(endpoint: Endpoint) -> dict[str, Any]:
    """`GET /ready`: 200 while calls are welcome, 503 from the moment in which Envoy drains.

    The admin interface says the same and much more, and can stop Envoy; so it stays on loopback, where a
    kubelet cannot ask. Whether a gateway is healthy does not matter here: an Envoy that nobody may call
    could not tell clients, in the API's shape, that the mesh cannot answer.
    """
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "probe",
        "http_protocol_options": {},
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "probe",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 404}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.health_check",
                "typed_config": {
                    "@type": f"{_TYPE}.filters.http.health_check.v3.HealthCheck",
                    "pass_through_mode": False,
                    "headers": [{"name": ":path", "string_match": {"exact": "/ready"}}],
                },
            },
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"},
            },
        ],
    }
    return {
        "name": "probe",
        "address": address(endpoint),
        "enable_reuse_port": False,
        # A probe must be heard when clients have taken all connections, or the overload would grow.
        "ignore_global_conn_limit": True,
        # It says that Envoy drains; it must not be drained with the rest.
        "drain_type": "MODIFY_ONLY",
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
