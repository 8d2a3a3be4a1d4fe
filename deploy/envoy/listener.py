"""Envoy's listener. Owns: the one port, its HTTP filters, its limits and the access log."""

from __future__ import annotations

from typing import Any

from deploy.envoy.address import address
from deploy.envoy.parameters import Parameters
from deploy.envoy.path_fields import path_fields
from deploy.envoy.replies import BAD_MESSAGE, HEADERS_MESSAGE, mappers
from deploy.envoy.routes import BODY_BYTES_MAX, route_configuration
from deploy.envoy.transport import transport

# The one port's name.
LISTENER = "interlock"

_TYPE = "type.googleapis.com/envoy.extensions"

# Of a client. Vendors' clients send about 25; in bytes it is twice the longest token that the gateway reads.
HEADERS_MAX = 64
HEADERS_BYTES_MAX = 16_384
# What HTTP/1.1 has in its first line, and what is said of every client: who, how, and the request's id.
_HEADERS_ADDED = 8

# For a request to be all there: the largest body at 140 kbit/s. Of a stream of requests the answer has to
# begin by then: reflection answers each, and an upload's answer begins when its manifest has come.
REQUEST_TIMEOUT_S = 60

_PATH_FIELDS = "\n".join(
    f'  ["{prefix}"] = {{{", ".join(f"{name} = true" for name in names)}}},'
    for prefix, names in path_fields().items()
)

# The gateway names a reply's status in a header, because a transcoded reply is always 200. Header
# mutation may not touch `:status`; Lua may.
#
# A request by HTTP becomes a gRPC call, whose metadata knows fewer characters than HTTP: a header with others
# would end the whole call with INTERNAL. Such headers are left out, and so are `-bin` ones, which would have
# to be base64, and gRPC's own: a `grpc-timeout` that is none ends the call too. gRPC is left as it is.
#
# A client's `x-envoy-original-path` would stand in the access log, where no transcoder sets its own.
#
# Before that, headers are counted here and not by the codec, which refuses before it has read the path: then
# nobody could tell whose API was asked, and the error would have no shape and no request id.
#
# A query that names a field of its path is refused: see `path_fields`. Its names may be escaped; the path has
# one spelling by then.
_LUA = f"""\
local path_fields = {{
{_PATH_FIELDS}
}}

local function plain(text)
  return (text:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
end

local function names_path_field(target)
  local path, query = target:match("^([^?]*)%?(.*)$")
  if not query then return false end
  for prefix, fields in pairs(path_fields) do
    if path:sub(1, #prefix) == prefix then
      for parameter in query:gmatch("[^&]+") do
        if fields[plain(parameter:match("^[^=]*"))] then return true end
      end
    end
  end
  return false
end

function envoy_on_request(handle)
  local headers = handle:headers()
  headers:remove("x-envoy-original-path")
  local count, size = 0, 0
  for name, value in pairs(headers) do
    count, size = count + 1, size + #name + #value
  end
  if count > {HEADERS_MAX + _HEADERS_ADDED} or size > {HEADERS_BYTES_MAX} then
    handle:respond({{[":status"] = "431"}}, "{HEADERS_MESSAGE}")
    return
  end
  if names_path_field(headers:get(":path") or "") then
    handle:respond({{[":status"] = "400"}}, "{BAD_MESSAGE}")
    return
  end
  local kind = headers:get("content-type") or ""
  if kind:sub(1, 16) == "application/grpc" then return end
  local strange = {{}}
  for name, value in pairs(headers) do
    if name:sub(1, 1) ~= ":" and (name:find("[^a-z0-9_.-]") or name:sub(-4) == "-bin"
        or name:sub(1, 5) == "grpc-" or value:find("[^\\32-\\126]")) then
      strange[#strange + 1] = name
    end
  end
  for _, name in ipairs(strange) do headers:remove(name) end
end

function envoy_on_response(handle)
  local status = handle:headers():get("x-interlock-status")
  if status then
    handle:headers():remove("x-interlock-status")
    handle:headers():replace(":status", status)
  end
end
"""


def listener(parameters: Parameters) -> dict[str, Any]:
    """HTTP/1.1, HTTP/2 with prior knowledge, gRPC and gRPC-Web on one port."""
    manager = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": _connection_manager(parameters),
    }
    return {
        "name": LISTENER,
        "address": address(parameters.listen),
        # With SO_REUSEPORT a second Envoy would bind the same port silently and take half of the calls.
        "enable_reuse_port": False,
        # A client that does not read makes its stream pause here instead of filling memory.
        "per_connection_buffer_limit_bytes": 65_536,
        "filter_chains": [{"filters": [manager], **transport(parameters.certificate)}],
    }


def _connection_manager(parameters: Parameters) -> dict[str, Any]:
    return {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "interlock",
        # The first bytes decide between HTTP/1.1 and HTTP/2.
        "codec_type": "AUTO",
        **_trust(),
        **_limits(),
        "access_log": [_access_log(parameters)],
        "local_reply_config": {"mappers": mappers()},
        "route_config": route_configuration(parameters),
        "http_filters": _http_filters(parameters),
    }


def _trust() -> dict[str, Any]:
    """What of a request is believed."""
    return {
        "use_remote_address": True,
        # Nobody is internal, loopback neither: `x-envoy-*` headers of clients could cut or repeat requests.
        # An empty list would mean Envoy's default; from the broadcast address nobody can call.
        "internal_address_config": {"cidr_ranges": [{"address_prefix": "255.255.255.255", "prefix_len": 32}]},
        # A caller's request id is the contract's key for its logs; Envoy would overwrite it.
        "preserve_external_request_id": True,
        # One spelling of each path, so that what is denied below cannot be reached by another one.
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "REJECT_REQUEST",
        # Who runs what is nobody's business.
        "server_header_transformation": "PASS_THROUGH",
    }


def _limits() -> dict[str, Any]:
    return {
        "common_http_protocol_options": {
            # Some servers read `x_y` as `x-y`: a way around the stripped headers. They are dropped, not
            # refused: a refusal here could not name its cause.
            "headers_with_underscores_action": "DROP_HEADER",
            # What the filter below may have to count. Beyond it the codec refuses, in nobody's shape.
            "max_headers_count": 4 * HEADERS_MAX,
            # Idle keep-alive connections go after a quarter of an hour.
            "idle_timeout": "900s",
        },
        "http2_protocol_options": {
            # 100 streams a connection starve 400 clients that share one channel.
            "max_concurrent_streams": 1_024,
            # A stream may be 64 KiB ahead of its reader, a connection 1 MiB.
            "initial_stream_window_size": 65_536,
            "initial_connection_window_size": 1_048_576,
        },
        "max_request_headers_kb": 4 * HEADERS_BYTES_MAX // 1_024,
        # Slow headers hold a connection for nothing.
        "request_headers_timeout": "5s",
        # A slow body as well; a route's own idle timeout is as long as an answer may be silent.
        "request_timeout": f"{REQUEST_TIMEOUT_S}s",
        # For streams that found no route; routes have their own.
        "stream_idle_timeout": "300s",
        # Running streams get this long to end when a listener drains.
        "drain_timeout": "5s",
    }


def _http_filters(parameters: Parameters) -> list[dict[str, Any]]:
    """The filters in the order of a request; a reply passes them backwards, so Lua sees it last."""
    return [
        _filter("lua", "lua.v3.Lua", default_source_code={"inline_string": _LUA}),
        # Before everything that answers, so that a page may read an error as well.
        _filter("cors", "cors.v3.Cors"),
        _filter("grpc_web", "grpc_web.v3.GrpcWeb"),
        _filter(
            "grpc_json_transcoder", "grpc_json_transcoder.v3.GrpcJsonTranscoder", **_transcoding(parameters)
        ),
        # Off but for the routes that turn it on (see `routes`), whose bound holds: this one has to be there.
        _filter("buffer", "buffer.v3.Buffer", max_request_bytes=BODY_BYTES_MAX) | {"disabled": True},
        # `x-envoy-*` headers would tell clients how long which part took.
        _filter("router", "router.v3.Router", suppress_envoy_headers=True),
    ]


def _filter(name: str, kind: str, **config: Any) -> dict[str, Any]:
    typed = {"@type": f"{_TYPE}.filters.http.{kind}", **config}
    return {"name": f"envoy.filters.http.{name}", "typed_config": typed}


def _transcoding(parameters: Parameters) -> dict[str, Any]:
    return {
        "proto_descriptor": parameters.descriptors,
        "services": ["interlock.http.v1.GatewayHttpService", "interlock.http.v1.AdminHttpService"],
        # A status that does not come from the gateway's handlers (it died, say) still is JSON.
        "convert_grpc_status": True,
        "print_options": {"preserve_proto_field_names": True, "always_print_primitive_fields": True},
        # Otherwise an unknown path would go on as it is.
        "request_validation_options": {
            "reject_unknown_method": True,
            "reject_binding_body_field_collisions": True,
        },
        # Vendors' clients send parameters of their own (`?beta=true`), and a refusal could not name one.
        "ignore_unknown_query_parameters": True,
        # Holds for HttpBody alone, which is one reason for HttpBody: one byte more is a 413.
        "max_request_body_size": BODY_BYTES_MAX,
        "max_response_body_size": BODY_BYTES_MAX,
    }


def _access_log(parameters: Parameters) -> dict[str, Any]:
    """One JSON line a request, with the names that the services' logs use. No query, no secret."""
    line = {
        "timestamp": "%START_TIME(%Y-%m-%dT%H:%M:%S.%6fZ)%",
        "level": "info",
        "service": "envoy",
        "instance": parameters.instance,
        "event": "http.finished",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ:ORIG_OR_PATH)%",
        "protocol": "%PROTOCOL%",
        "status": "%RESPONSE_CODE%",
        "grpc_status": "%GRPC_STATUS%",
        "flags": "%RESPONSE_FLAGS%",
        "duration_ms": "%DURATION%",
        "first_byte_ms": "%RESPONSE_DURATION%",
        "request_bytes": "%BYTES_RECEIVED%",
        "response_bytes": "%BYTES_SENT%",
        "upstream": "%UPSTREAM_HOST%",
    }
    log_format = {"json_format": line, "omit_empty_values": True}
    if parameters.access_log is None:
        typed = {"@type": f"{_TYPE}.access_loggers.stream.v3.StdoutAccessLog", "log_format": log_format}
        return {"name": "envoy.access_loggers.stdout", "typed_config": typed}
    typed = {
        "@type": f"{_TYPE}.access_loggers.file.v3.FileAccessLog",
        "path": parameters.access_log,
        "log_format": log_format,
    }
    return {"name": "envoy.access_loggers.file", "typed_config": typed}
