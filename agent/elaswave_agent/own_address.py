"""The numeric address of this machine at which workers of other machines reach those of this node."""

import socket

from elaswave.errors import ConfigError


def own_address(given: str, controller: str) -> str:
    """What `given` (a name, or an address) stands for; empty: the address from which the controller is reached.

    controller: HOST:PORT. Sends nothing. Raises ConfigError where a name cannot be resolved or no way leads there.
    """
    if given:
        return str(_resolve(given, 0)[1][0])
    host, _, port = controller.rpartition(":")
    family, target = _resolve(host.removeprefix("[").removesuffix("]"), int(port))
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(target)  # of a datagram socket: only chooses the way
        except OSError as error:
            raise ConfigError(f"no way to the controller at {controller}: {error.strerror}") from error
        return str(probe.getsockname()[0])


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise ConfigError(f"cannot resolve {host!r} ({error.strerror}): give a numeric address") from error
    family, _, _, _, target = found[0]
    return family, (str(target[0]), port)
