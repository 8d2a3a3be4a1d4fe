"""Envoy's clusters. Owns: how gateways and controller are reached, checked and chosen."""

from __future__ import annotations

from typing import Any

from deploy.envoy.address import address
from deploy.envoy.parameters import Endpoint, Parameters
from deploy.envoy.routes import CONTROLLER, GATEWAYS

# What a gateway's HTTP/2 server admits on one connection. The gateway's queue is the bound that clients
# shall meet, with its reason and delay, so Envoy's own stands above it.
_STREAMS_PER_ENDPOINT = 4_096

# Of a name every address is an endpoint, and how many it has is known to nobody here: the bound is that of so
# many gateways. Where there are fewer, theirs is met first all the same, and Envoy's memory has its own.
_ENDPOINTS_OF_A_NAME = 8

# Health and reflection, whom no token keeps within limits: some tools, and a watch for each client's channel
# that wants to know. Each costs its gateway a task; what else there is asks the probe port.
WATCHES_MAX = 256

# Who vanished without a FIN, or stands still, is noticed, and its callers are told to come again: health
# checks keep new calls from it, and end none. A gateway that stood still for less than the lease of its
# requests (5 s) goes on with them.
_KEEPALIVE = {
    GATEWAYS: {"interval": "10s", "timeout": "6s"},
    CONTROLLER: {"interval": "5s", "timeout": "3s"},
}

# What is set apart from requests (see `routes`).
_APART: dict[str, list[dict[str, Any]]] = {
    GATEWAYS: [
        {
            "priority": "HIGH",
            "max_requests": WATCHES_MAX,
            "max_pending_requests": WATCHES_MAX,
            "max_retries": 16,
            "track_remaining": True,
        }
    ],
    CONTROLLER: [],
}


def clusters(parameters: Parameters) -> list[dict[str, Any]]:
    """The gateways and the controllers."""
    return [_cluster(GATEWAYS, parameters.gateways), _cluster(CONTROLLER, parameters.controllers)]


def _cluster(name: str, endpoints: tuple[Endpoint, ...]) -> dict[str, Any]:
    return {
        "name": name,
        **_discovery(endpoints),
        # Everything is on one machine or in one rack.
        "connect_timeout": "1s",
        # Streams differ in length by orders of magnitude; turns would pile them up on one gateway.
        "lb_policy": "LEAST_REQUEST",
        # Only when nobody is healthy do calls go to everybody: a gateway that cannot serve says why, in the
        # API's shape, and better than Envoy could. A draining one among healthy ones gets nothing.
        "common_lb_config": {
            "healthy_panic_threshold": {"value": 1.0},
            # Envoy would keep back a second change of health for up to a second: one gateway leaves while
            # another comes, and calls still go to the first. A mesh has few members; each change counts.
            "update_merge_window": "0s",
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _http2(_KEEPALIVE[name])
        },
        "health_checks": [_health_check()],
        "outlier_detection": _outlier_detection(),
        "circuit_breakers": {"thresholds": [_requests_threshold(endpoints), *_APART[name]]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": address(endpoint)}} for endpoint in endpoints]}
            ],
        },
    }


def _discovery(endpoints: tuple[Endpoint, ...]) -> dict[str, Any]:
    """Addresses are what they are; of a name every address is an endpoint of its own."""
    if not any(endpoint.is_name for endpoint in endpoints):
        return {"type": "STATIC"}
    return {
        "cluster_type": {
            "name": "envoy.clusters.dns",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster",
                # A new pod gets calls within this; one that went is found out by health checks before.
                "dns_refresh_rate": "5s",
                # While the name server is away the known addresses stay; ask it again soon, then less often.
                "dns_failure_refresh_rate": {"base_interval": "1s", "max_interval": "10s"},
                # Envoy's default would ask for IPv6 first and never look at IPv4 where both exist.
                "dns_lookup_family": "ALL",
            },
        }
    }


def _http2(keepalive: dict[str, str]) -> dict[str, Any]:
    return {
        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        "explicit_http_config": {
            "http2_protocol_options": {
                "connection_keepalive": keepalive,
                # The same room a stream as downstream; a connection carries hundreds of them.
                "initial_stream_window_size": 65_536,
                "initial_connection_window_size": 8_388_608,
            }
        },
    }


def _health_check() -> dict[str, Any]:
    return {
        # A draining gateway gets no new call within a second.
        "interval": "1s",
        "timeout": "1s",
        # Envoy's own default asks an idle cluster once a minute.
        "no_traffic_interval": "1s",
        "unhealthy_interval": "1s",
        # One lost answer is a hiccup of a busy machine; NOT_SERVING counts at once.
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "grpc_health_check": {},
    }


def _outlier_detection() -> dict[str, Any]:
    """Failed connections count, statuses do not: UNAVAILABLE for want of a worker is no gateway's fault."""
    return {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 5,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_consecutive_5xx": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "base_ejection_time": "5s",
        # Half of the gateways stay, whatever happens.
        "max_ejection_percent": 50,
    }


def _requests_threshold(endpoints: tuple[Endpoint, ...]) -> dict[str, Any]:
    count = sum(_ENDPOINTS_OF_A_NAME if endpoint.is_name else 1 for endpoint in endpoints)
    return {
        "max_requests": _STREAMS_PER_ENDPOINT * count,
        # Calls that wait for a connection while a gateway restarts.
        "max_pending_requests": 256,
        # The calls of the second in which a busy gateway dies or leaves. What is sent again was never begun,
        # and each call twice at most, so that a storm of retries cannot build up.
        "max_retries": 256,
        "track_remaining": True,
    }
