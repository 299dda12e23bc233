"""What can be set about an endpoint."""

from dataclasses import dataclass

from elaswave.comm.addresses import LinkOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """What can be set."""

    payload_limit_bytes: int = 1 << 32
    agree_s: float = 30.0
    links: LinkOptions | None = None
