"""gRPC channels and ports of the control plane: in plain text on loopback, else TLS with certificates of both sides.

A client checks that the controller's certificate is for the host it dials; the controller, that a client's is signed by
the authority. Who may do what, the job token of each call decides.
"""

from collections.abc import Sequence

import grpc
from grpc import aio

from elaswave.certificates import TlsFiles, read_pem

ChannelOptions = Sequence[tuple[str, int]]

KEEPALIVE_S = 3.0
"""A connection is kept while nothing is heard of it for so long, and for longer where a node may be silent longer."""


def open_channel(address: str, tls: TlsFiles | None, options: ChannelOptions) -> aio.Channel:
    """A channel to HOST:PORT; connects when it is used. Raises ConfigError where a file of `tls` will not do."""
    if tls is None:
        return aio.insecure_channel(address, options=options)
    pem = read_pem(tls)
    credentials = grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)
    return aio.secure_channel(address, credentials, options=options)


def add_port(server: aio.Server, address: str, tls: TlsFiles | None) -> int:
    """Have a server listen at HOST:PORT; the port. Raises RuntimeError where it cannot, ConfigError as above."""
    if tls is None:
        return server.add_insecure_port(address)
    pem = read_pem(tls)
    pairs = [(pem.key, pem.certificate)]
    credentials = grpc.ssl_server_credentials(pairs, root_certificates=pem.authority, require_client_auth=True)
    return server.add_secure_port(address, credentials)
