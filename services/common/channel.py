"""Client channels. Owns: the options of every connection that a mesh process opens."""

from __future__ import annotations

import grpc

# Chunks, steps and manifests stay far below; what exceeds it is a defect or an attack.
MESSAGE_BYTES_MAX = 4 * 1024 * 1024

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # A peer that vanished without a FIN is noticed. Whatever the time-out says, the library waits a minute
    # for the answer to a ping, unless it is told otherwise as below.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted peer is found again quickly; the library's default grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A mesh speaks to itself; a proxy from the environment would only be in the way.
    ("grpc.enable_http_proxy", 0),
    # Two channels to one address share no connection, so that one stalled stream stalls no other.
    ("grpc.use_local_subchannel_pool", 1),
)

# Where nothing large passes a peer is given up within a quarter of a minute. Behind a file on a slow line an
# answer takes longer than that, and a download would be cut each time.
LIGHT: tuple[tuple[str, int], ...] = (("grpc.http2.ping_timeout_ms", 5_000),)


def connect(
    address: str, tls: grpc.ChannelCredentials | None = None, *, light: bool = False
) -> grpc.aio.Channel:
    """Opens a channel to `host:port`. It connects lazily; close it when done.

    Args:
        address: Where to.
        tls: Whom to believe to be there; None: plain text, as inside the mesh.
        light: Whether nothing large passes here: a peer that does not answer is given up sooner.
    """
    options = [*OPTIONS, *(LIGHT if light else ())]
    if tls is not None:
        return grpc.aio.secure_channel(address, tls, options=options)
    return grpc.aio.insecure_channel(address, options=options)
