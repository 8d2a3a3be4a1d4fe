"""Envoy's TLS. Owns: what a client must speak, and where the certificate comes from and is renewed."""

from __future__ import annotations

from typing import Any

from deploy.envoy.parameters import Certificate

_TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3"
_SECRET = "interlock"  # noqa: S105 - the name of the secret, not a secret

# Of TLS 1.2 only what has forward secrecy and authenticated encryption; TLS 1.3 has nothing else.
_CIPHERS = (
    "[ECDHE-ECDSA-AES128-GCM-SHA256|ECDHE-ECDSA-CHACHA20-POLY1305]",
    "[ECDHE-RSA-AES128-GCM-SHA256|ECDHE-RSA-CHACHA20-POLY1305]",
    "ECDHE-ECDSA-AES256-GCM-SHA384",
    "ECDHE-RSA-AES256-GCM-SHA384",
)


def transport(certificate: Certificate | None) -> dict[str, Any]:
    """What a filter chain adds for TLS; nothing for plain text."""
    if certificate is None:
        return {}
    context = {
        "@type": f"{_TLS}.DownstreamTlsContext",
        "common_tls_context": {
            "tls_params": {
                # What is older has known breaks, and every client of the last ten years has 1.2.
                "tls_minimum_protocol_version": "TLSv1_2",
                "tls_maximum_protocol_version": "TLSv1_3",
                "cipher_suites": list(_CIPHERS),
            },
            # gRPC needs HTTP/2, and clients learn by ALPN that it is there.
            "alpn_protocols": ["h2", "http/1.1"],
            # By SDS, not inline: a renewed certificate is read without a restart, and streams go on.
            "tls_certificate_sds_secret_configs": [
                {
                    "name": _SECRET,
                    "sds_config": {
                        "path_config_source": {"path": certificate.secret},
                        "resource_api_version": "V3",
                        # Without this, a missing file would let Envoy start and reset every connection.
                        "initial_fetch_timeout": "5s",
                    },
                }
            ],
        },
    }
    return {
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        # A handshake that does not come holds a connection for nothing.
        "transport_socket_connect_timeout": "5s",
    }


def secret(certificate: Certificate) -> dict[str, Any]:
    """The SDS file as plain data: where certificate and key are.

    Envoy reads both again whenever something is moved into the directory, as `mv` and the kubelet do. While
    the two do not fit each other, between two moves, it keeps the pair that it has.
    """
    return {
        "resources": [
            {
                "@type": f"{_TLS}.Secret",
                "name": _SECRET,
                "tls_certificate": {
                    "certificate_chain": {"filename": f"{certificate.directory}/tls.crt"},
                    "private_key": {"filename": f"{certificate.directory}/tls.key"},
                    "watched_directory": {"path": certificate.directory},
                },
            }
        ]
    }
