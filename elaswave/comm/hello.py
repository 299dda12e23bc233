"""Hello: how both ends of a new connection prove that they hold the job's token. No I/O here.

    listener -> dialler   challenge  magic, version, 0, nonce of the listener                              40 bytes
    dialler -> listener   hello      magic, version, 0, sender, receiver, nonce of the dialler, proof      88 bytes
    listener -> dialler   welcome    magic, version, verdict, proof (zeros unless the verdict is 0)        40 bytes

A proof is HMAC-SHA256 keyed by the token over a label (its direction), both nonces, sender and receiver, so neither
can be replayed or reflected. Nothing after the hello is encrypted or signed here: that is what TLS below is for.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

from elaswave.core.ids import WorkerId
from elaswave.errors import ProtocolError

MAGIC = b"EWLK"
VERSION = 1
TLS_HANDSHAKE = b"\x16\x03"
NONCE_BYTES = 32
WORKER_LIMIT = 1 << 64
_PROOF_BYTES = hashlib.sha256().digest_size
_CHALLENGE = struct.Struct(f"<4sHH{NONCE_BYTES}s")
_HELLO = struct.Struct(f"<4sHHQQ{NONCE_BYTES}s{_PROOF_BYTES}s")
_WELCOME = struct.Struct(f"<4sHH{_PROOF_BYTES}s")
_ENDS = struct.Struct("<QQ")

CHALLENGE_BYTES = _CHALLENGE.size
HELLO_BYTES = _HELLO.size
WELCOME_BYTES = _WELCOME.size

_WELCOMED = 0
_WRONG_TOKEN = 1
_WRONG_RECEIVER = 2
_VERDICTS = {_WRONG_TOKEN: "our job token is not its token", _WRONG_RECEIVER: "it is another worker"}


class HelloRefused(ProtocolError):
    """A hello that will not do; `answer` is what the listener sends before it closes."""

    def __init__(self, message: str, answer: bytes = b"") -> None:
        super().__init__(message)
        self.answer = answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """The two ends of a connection and what proves them; `sender` dials."""

    token: bytes
    sender: WorkerId
    receiver: WorkerId
    listener_nonce: bytes
    dialler_nonce: bytes

    def _proof(self, label: bytes) -> bytes:
        ends = _ENDS.pack(self.sender, self.receiver)
        return hmac.digest(self.token, label + self.listener_nonce + self.dialler_nonce + ends, "sha256")

    def sender_proof(self) -> bytes:
        """What only a dialler with the token can know."""
        return self._proof(b"elaswave link hello 1")

    def receiver_proof(self) -> bytes:
        """What only a listener with the token can know."""
        return self._proof(b"elaswave link welcome 1")


def _check_head(what: str, magic: bytes, version: int) -> None:
    if magic[:2] == TLS_HANDSHAKE:
        raise HelloRefused(f"{what} is a TLS handshake: set LinkOptions.tls on all workers, or on none")
    if magic != MAGIC:
        raise HelloRefused(f"{what} starts with {magic!r}, not with {MAGIC!r}: not a link of ElasWave")
    if version != VERSION:
        raise HelloRefused(f"{what} has version {version}; this side speaks {VERSION}: use one release everywhere")


def encode_challenge(nonce: bytes) -> bytes:
    """First message, from the listener."""
    return _CHALLENGE.pack(MAGIC, VERSION, 0, nonce)


def read_challenge(data: bytes) -> bytes:
    """The listener's nonce; raises HelloRefused."""
    magic, version, _, nonce = _CHALLENGE.unpack(data)
    _check_head("challenge", magic, version)
    return bytes(nonce)


def encode_hello(ends: Ends) -> bytes:
    """Second message, from the dialler."""
    return _HELLO.pack(MAGIC, VERSION, 0, ends.sender, ends.receiver, ends.dialler_nonce, ends.sender_proof())


def read_hello(data: bytes, *, token: bytes, me: WorkerId, listener_nonce: bytes) -> Ends:
    """The ends of the connection, with the dialler proven; raises HelloRefused."""
    magic, version, _, sender, receiver, nonce, proof = _HELLO.unpack(data)
    _check_head("hello", magic, version)
    ends = Ends(
        token=token,
        sender=WorkerId(sender),
        receiver=WorkerId(receiver),
        listener_nonce=listener_nonce,
        dialler_nonce=nonce,
    )
    if not hmac.compare_digest(proof, ends.sender_proof()):
        raise HelloRefused(
            f"hello of worker {sender} is not signed with this job's token: another job, or an intruder",
            _refusal(_WRONG_TOKEN),
        )
    if receiver != me:
        raise HelloRefused(
            f"worker {sender} dialled worker {receiver} at the address of worker {me}: its addresses are out of date",
            _refusal(_WRONG_RECEIVER),
        )
    return ends


def _refusal(verdict: int) -> bytes:
    return _WELCOME.pack(MAGIC, VERSION, verdict, bytes(_PROOF_BYTES))


def encode_welcome(ends: Ends) -> bytes:
    """Third message, from the listener; frames follow from the dialler."""
    return _WELCOME.pack(MAGIC, VERSION, _WELCOMED, ends.receiver_proof())


def check_welcome(data: bytes, ends: Ends) -> None:
    """Raise HelloRefused unless the listener has welcomed us and has proven itself."""
    magic, version, verdict, proof = _WELCOME.unpack(data)
    _check_head("welcome", magic, version)
    if verdict != _WELCOMED:
        reason = _VERDICTS.get(verdict, f"verdict {verdict}")
        raise HelloRefused(f"worker {ends.receiver} refused our hello: {reason}")
    if not hmac.compare_digest(proof, ends.receiver_proof()):
        raise HelloRefused(f"who listens at the address of worker {ends.receiver} does not hold this job's token")
