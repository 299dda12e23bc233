"""Addresses: what is read, what is refused and how, what listening does to socket files and ports."""

import socket
from pathlib import Path

import pytest

from elaswave.comm.addresses import LinkOptions, TcpAddress, UnixAddress, open_listener, parse_address
from elaswave.errors import ConfigError

OPTIONS = LinkOptions()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/a b:c.sock", UnixAddress(path="/run/a b:c.sock")),
        ("tcp:127.0.0.1:0", TcpAddress(host="127.0.0.1", port=0)),
        ("tcp:[::1]:65535", TcpAddress(host="::1", port=65535)),
    ],
)
def test_addresses_are_read(text: str, address: UnixAddress | TcpAddress) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "neither unix:PATH nor tcp:HOST:PORT"),
        ("unix:", "neither"),
        ("udp:127.0.0.1:1", "neither"),
        ("tcp:127.0.0.1", "port '127.0.0.1'"),
        ("tcp:127.0.0.1:", "port ''"),
        ("tcp:127.0.0.1:-1", "port '-1'"),
        ("tcp:127.0.0.1:65536", "port '65536'"),
        ("tcp:localhost:80", "host 'localhost'"),
        ("tcp::80", "host ''"),
        ("tcp:0.0.0.0:80", "names no interface"),
        ("tcp:[::]:80", "names no interface"),
        ("unix:/" + "x" * 107, "longer than 107 bytes"),
        ("unix:/" + "ü" * 54, "longer than 107 bytes"),
    ],
)
def test_what_is_no_address_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_address(text)


def test_a_port_is_picked_and_told() -> None:
    listener, given = open_listener(parse_address("tcp:127.0.0.1:0"), OPTIONS)
    with listener:
        picked = parse_address(given)
        assert isinstance(picked, TcpAddress)
        assert picked.port == listener.getsockname()[1] != 0
        with pytest.raises(ConfigError, match="already in use"):
            open_listener(picked, OPTIONS)


def test_a_socket_file_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/s")
    open_listener(address, OPTIONS)[0].close()  # the file stays, as after a kill
    assert (tmp_path / "s").exists()
    listener, given = open_listener(address, OPTIONS)
    with listener:
        assert given == f"unix:{tmp_path}/s"
        with socket.socket(socket.AF_UNIX) as dialler:
            dialler.connect(f"{tmp_path}/s")


def test_a_socket_file_in_use_is_left_alone(tmp_path: Path) -> None:
    address = parse_address(f"unix:{tmp_path}/s")
    listener, _ = open_listener(address, OPTIONS)
    with listener, socket.socket(socket.AF_UNIX) as dialler:
        with pytest.raises(ConfigError, match="somebody listens there already"):
            open_listener(address, OPTIONS)
        dialler.connect(f"{tmp_path}/s")


def test_another_file_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("keep")
    with pytest.raises(ConfigError):
        open_listener(parse_address(f"unix:{tmp_path}/notes"), OPTIONS)
    assert (tmp_path / "notes").read_text() == "keep"


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen at .*192\.0\.2\.1"):
        open_listener(parse_address("tcp:192.0.2.1:0"), OPTIONS)
