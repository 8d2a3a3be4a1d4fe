"""Envoy's routes. Owns: which path goes where, which headers pass, and who may call from a web page."""

from __future__ import annotations

from typing import Any

from deploy.envoy.parameters import Parameters

# The only clusters: what a route can name.
GATEWAYS = "gateways"
CONTROLLER = "controller"

# Ours to set, not a client's: the status that the Lua filter believes, and proofs of membership.
# `x-interlock-deadline` is the client's own, so the names are listed rather than matched by prefix.
INTERNAL_HEADERS = ("x-interlock-status", "x-interlock-mesh-token", "x-interlock-gateway-id")

# A process says by it that it did nothing for a call.
UNSTARTED_HEADER = "x-interlock-unstarted"

# Only where the request surely reached nobody, or reached one who says that it did nothing for it, as a
# gateway that drains: a generation must not run twice.
_UNBEGUN = "connect-failure,refused-stream,retriable-headers"

# Members of the mesh attach and download past Envoy; from outside these do not exist.
_HIDDEN = (
    "/interlock.v1.ControllerService/Attach",
    "/interlock.v1.ControllerService/DownloadRevision",
)

# Routing happens on the path after transcoding: `GET /v1/admin/workers` arrives here as
# `/interlock.http.v1.AdminHttpService/ListWorkers`.
_TO_GATEWAYS = ("/interlock.v1.GatewayService/", "/interlock.http.v1.GatewayHttpService/")
_TO_CONTROLLER = ("/interlock.v1.ControllerService/", "/interlock.http.v1.AdminHttpService/")

# What anybody may hold open without a token. They have a bound of their own, far below that of requests (see
# `clusters`), so that however many there are no request is kept out by them.
_OPEN_TO_ALL = (
    "/grpc.health.v1.Health/",
    # Tools of both generations ask: grpcurl before 1.9 knows v1alpha alone.
    "/grpc.reflection.v1alpha.ServerReflection/",
    "/grpc.reflection.v1.ServerReflection/",
    # Larger than what Envoy takes of a reply while its client reads nothing.
    "/interlock.http.v1.GatewayHttpService/OpenApi",
)
# A watch of health is silent until something changes. Who is cut off here asks again, as gRPC's own watchers
# do at once; who has gone without a word, or has forgotten the call, leaves the place to others.
_OPEN_TO_ALL_IDLE = "300s"

# What only reads, and may run twice: the caller of a controller that stops answering in the middle is served
# by the one that took over, where one did.
_READS = tuple(
    f"/{service}/{verb}"
    for service in ("interlock.v1.ControllerService", "interlock.http.v1.AdminHttpService")
    for verb in ("Get", "List")
)

# Where REST requests come in. They find a route here only for its CORS policy, which needs one that
# forwards; the transcoder answers 404 itself or changes the path, and with it the route.
_REST = (
    {"prefix": "/v1/"},
    *({"path": path} for path in ("/", "/generate", "/healthz", "/openapi.json", "/readyz")),
)

# The largest body, and with the content type and the framing that the transcoder puts around it. It fits
# the gateway's 4 MiB message limit; the prompt of a small model's longest context is a tenth of it.
BODY_BYTES_MAX = 1_048_576
ENVELOPED_BODY_BYTES_MAX = BODY_BYTES_MAX + 65_536

# The gateway's bound of a message, with gRPC's frame: what Envoy waits for before it asks a gateway.
MESSAGE_BYTES_MAX = 4_194_304
_FRAME_BYTES = 5

_BUFFER = "envoy.filters.http.buffer"

# What a page may send: the bearer token in either form, gRPC-Web's own, the contract's headers, and what the
# vendors' libraries say of themselves. Each has to be named: `*` would leave out `authorization`.
_CORS_REQUEST_HEADERS = (
    "anthropic-beta",
    "anthropic-dangerous-direct-browser-access",
    "anthropic-user-profile-id",
    "anthropic-version",
    "anthropic-workspace-id",
    "authorization",
    "content-type",
    "grpc-timeout",
    "idempotency-key",
    "last-event-id",
    "openai-beta",
    "openai-organization",
    "openai-project",
    "user-agent",
    "x-api-key",
    "x-grpc-web",
    "x-interlock-deadline",
    "x-request-id",
    "x-stainless-arch",
    "x-stainless-helper",
    "x-stainless-helper-method",
    "x-stainless-lang",
    "x-stainless-os",
    "x-stainless-package-version",
    "x-stainless-retry-count",
    "x-stainless-runtime",
    "x-stainless-runtime-version",
    "x-stainless-timeout",
    "x-user-agent",
)
# What a page may read: a status and its reason, delays, whether to try again, what is left to it, who
# answered, and the request's id by the name that each vendor's library knows.
_CORS_RESPONSE_HEADERS = (
    "grpc-message",
    "grpc-status",
    "grpc-status-details-bin",
    "interlock-reason",
    "request-id",
    "retry-after",
    "retry-after-ms",
    "x-interlock-revision",
    "x-interlock-worker",
    "x-ratelimit-limit-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "x-request-id",
    "x-should-retry",
)


def route_configuration(parameters: Parameters) -> dict[str, Any]:
    """The one virtual host, for every name that clients may know the mesh by."""
    routes = [_absent({"path": path}) for path in _HIDDEN]
    routes += [_forwarded({"prefix": prefix}, CONTROLLER, retried=f"{_UNBEGUN},reset") for prefix in _READS]
    routes += [_forwarded({"prefix": prefix}, CONTROLLER) for prefix in _TO_CONTROLLER]
    routes += [_set_apart(_forwarded({"prefix": prefix}, GATEWAYS)) for prefix in _OPEN_TO_ALL]
    routes += [_whole(_forwarded({"prefix": prefix}, GATEWAYS)) for prefix in _TO_GATEWAYS]
    routes += [_whole(_forwarded(match, GATEWAYS)) for match in _REST]
    routes.append(_absent({"prefix": "/"}))
    host = {
        "name": "interlock",
        "domains": ["*"],
        "request_headers_to_remove": list(INTERNAL_HEADERS),
        # Where nobody else was there, its meaning ends here.
        "response_headers_to_remove": [UNSTARTED_HEADER],
        "typed_per_filter_config": {"envoy.filters.http.cors": _cors(parameters)},
        "routes": routes,
    }
    return {"name": "interlock", "virtual_hosts": [host]}


def _absent(match: dict[str, str]) -> dict[str, Any]:
    return {"match": match, "direct_response": {"status": 404}}


def _forwarded(match: dict[str, str], cluster: str, retried: str = _UNBEGUN) -> dict[str, Any]:
    route: dict[str, Any] = {
        "cluster": cluster,
        # A stream lasts as long as its request; the deadline is the gateway's to keep.
        "timeout": "0s",
        # The longest deadline that a client may ask for is 3,600 s, and a queued request may be silent.
        "idle_timeout": "3660s",
        # No timer of Envoy's own for `grpc-timeout` either, which naming a maximum for it would start, even
        # one of 0: it runs out before the client's, and what has begun is then reset with INTERNAL.
        "max_stream_duration": {"max_stream_duration": "0s"},
        "retry_policy": {
            "retry_on": retried,
            "retriable_headers": [{"name": UNSTARTED_HEADER, "present_match": True}],
            # One for a restarting gateway, one for its neighbour; more would only delay the error.
            "num_retries": 2,
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": {
                        "@type": "type.googleapis.com/"
                        "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    },
                }
            ],
            # A gateway that refuses has the fewest requests and is chosen again and again: of two, three
            # times in four. So many looks find the other one, all but surely.
            "host_selection_retry_max_attempts": 32,
        },
    }
    # Room for the largest body in its envelope, so that the body's own limit decides and not this one.
    return {"match": match, "route": route, "request_body_buffer_limit": ENVELOPED_BODY_BYTES_MAX}


def _whole(forwarded: dict[str, Any]) -> dict[str, Any]:
    """The route for requests of one message, which is there before a gateway is asked.

    A gateway looks at a token when the message has come. Until then whoever sends headers alone would hold
    one of the requests that Envoy may have at the gateways, for nothing.
    """
    buffer = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.buffer.v3.BufferPerRoute",
        "buffer": {"max_request_bytes": MESSAGE_BYTES_MAX + _FRAME_BYTES},
    }
    return {**forwarded, "typed_per_filter_config": {_BUFFER: buffer}}


def _set_apart(forwarded: dict[str, Any]) -> dict[str, Any]:
    """The route under the smaller of its cluster's two bounds."""
    # To Envoy a priority is another set of thresholds and connections; nothing overtakes anything.
    apart = {"priority": "HIGH", "idle_timeout": _OPEN_TO_ALL_IDLE}
    return {**forwarded, "route": forwarded["route"] | apart}


def _cors(parameters: Parameters) -> dict[str, Any]:
    return {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": [
            {"safe_regex": {"regex": origin}} for origin in parameters.cors_origins
        ],
        "allow_methods": "GET, POST, DELETE, OPTIONS",
        "allow_headers": ", ".join(_CORS_REQUEST_HEADERS),
        "expose_headers": ", ".join(_CORS_RESPONSE_HEADERS),
        # Browsers keep the answer for at most two hours; ten minutes let a changed policy arrive.
        "max_age": "600",
    }
