"""What agent and zygote say to each other, as values and as bytes.

A message is a u32 length, a u8 kind and fixed fields; texts are u32 length and UTF-8. The agent sends StartRequest; the
zygote answers each with Started (the new process's pidfd travels beside it) or StartRefused, and tells WorkerEnded once
per started process. Unavailable means that this zygote starts nothing, now or later.
"""

import struct
from dataclasses import dataclass
from typing import Final

from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError

MAX_MESSAGE_BYTES: Final = 4 << 20
"""Arguments and environment of one process stay below this; Linux itself allows 2 MiB at an exec."""

_LENGTH = struct.Struct("<I")
_COUNT = struct.Struct("<I")
_NUMBER = struct.Struct("<i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A script (path) or module (dotted name, as after `-m`) and its arguments."""

    target: str
    arguments: tuple[str, ...] = ()
    is_module: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """Start `program` as a worker process. `environment` is complete: nothing is inherited from the starter.

    stdout, stderr: files to append to; their folder exists.
    """

    worker: WorkerId
    program: Program
    environment: tuple[tuple[str, str], ...]
    working_directory: str
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The process exists."""

    worker: WorkerId
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRefused:
    """No process was made."""

    worker: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnded:
    """The process has ended and is reaped: killed by `signal` where that is above 0, else with `exit_code`."""

    worker: WorkerId
    exit_code: int
    signal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """This zygote cannot start workers; use another way of starting."""

    reason: str


Message = StartRequest | Started | StartRefused | WorkerEnded | Unavailable

_KINDS: Final[dict[type[Message], int]] = {
    StartRequest: 1,
    Started: 2,
    StartRefused: 3,
    WorkerEnded: 4,
    Unavailable: 5,
}


def encode(message: Message) -> bytes:
    """The message with its length. Raises ProtocolError where it is longer than MAX_MESSAGE_BYTES."""
    match message:
        case StartRequest():
            body = _encode_request(message)
        case Started():
            body = _NUMBER.pack(message.worker) + _NUMBER.pack(message.pid)
        case StartRefused():
            body = _NUMBER.pack(message.worker) + _text(message.reason)
        case WorkerEnded():
            body = _NUMBER.pack(message.worker) + _NUMBER.pack(message.exit_code) + _NUMBER.pack(message.signal)
        case Unavailable():
            body = _text(message.reason)
    if len(body) + 1 > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"{type(message).__name__} of {len(body) + 1} bytes exceeds {MAX_MESSAGE_BYTES}: "
            "shorten the script's arguments or the environment"
        )
    return _LENGTH.pack(len(body) + 1) + bytes((_KINDS[type(message)],)) + body


class MessageDecoder:
    """Cuts a stream of bytes into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Messages completed by `data`, in order. Raises ProtocolError for what is none."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if not 1 <= length <= MAX_MESSAGE_BYTES:
                raise ProtocolError(f"message of {length} bytes: must be from 1 to {MAX_MESSAGE_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            messages.append(_decode(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return messages


def _encode_request(request: StartRequest) -> bytes:
    program = request.program
    parts = [_NUMBER.pack(request.worker), bytes((program.is_module,)), _text(program.target)]
    parts.append(_COUNT.pack(len(program.arguments)))
    parts += map(_text, program.arguments)
    parts.append(_COUNT.pack(len(request.environment)))
    for name, value in request.environment:
        parts += (_text(name), _text(value))
    parts += (_text(request.working_directory), _text(request.stdout), _text(request.stderr))
    return b"".join(parts)


def _text(value: str) -> bytes:
    # Arguments and paths may hold bytes that are no UTF-8; Python carries them as lone surrogates.
    raw = value.encode("utf-8", "surrogateescape")
    return _COUNT.pack(len(raw)) + raw


def _decode(data: bytes) -> Message:
    fields = _Fields(data)
    kind = fields.byte()
    message: Message
    match kind:
        case 1:
            message = _decode_request(fields)
        case 2:
            message = Started(worker=WorkerId(fields.number()), pid=fields.number())
        case 3:
            message = StartRefused(worker=WorkerId(fields.number()), reason=fields.text())
        case 4:
            message = WorkerEnded(worker=WorkerId(fields.number()), exit_code=fields.number(), signal=fields.number())
        case 5:
            message = Unavailable(reason=fields.text())
        case _:
            raise ProtocolError(f"message of unknown kind {kind}: known are 1 to {len(_KINDS)}")
    fields.expect_end()
    return message


def _decode_request(fields: "_Fields") -> StartRequest:
    worker = WorkerId(fields.number())
    is_module = bool(fields.byte())
    target = fields.text()
    arguments = tuple(fields.text() for _ in range(fields.count()))
    environment = tuple((fields.text(), fields.text()) for _ in range(fields.count()))
    return StartRequest(
        worker=worker,
        program=Program(target=target, arguments=arguments, is_module=is_module),
        environment=environment,
        working_directory=fields.text(),
        stdout=fields.text(),
        stderr=fields.text(),
    )


class _Fields:
    """Reads fields in order; every length is checked against what is there."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def byte(self) -> int:
        return self._take(1)[0]

    def number(self) -> int:
        value: int = _NUMBER.unpack(self._take(_NUMBER.size))[0]
        return value

    def count(self) -> int:
        value: int = _COUNT.unpack(self._take(_COUNT.size))[0]
        return value

    def text(self) -> str:
        return self._take(self.count()).decode("utf-8", "surrogateescape")

    def expect_end(self) -> None:
        if self._at != len(self._data):
            raise ProtocolError(f"message has {len(self._data) - self._at} bytes after its last field")

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise ProtocolError(f"message ends {size - len(self._data) + self._at} bytes too early")
        self._at += size
        return self._data[self._at - size : self._at]
