"""Calls to the controller's OperatorService. The only module here that knows generated code and grpc."""

from collections.abc import AsyncIterator

import grpc
from grpc import aio

from elaswave._pb import control_pb2
from elaswave._pb.control_pb2_grpc import OperatorServiceStub
from elaswave.certificates import TlsFiles
from elaswave.control_channel import open_channel
from elaswave.core.injection import Injection
from elaswave.core.status import Finished, JobStatus
from elaswave.errors import DeadlineExceeded, PeerError
from elaswave.wire import WatchItem, decode_status, decode_watch, encode_injection

_TOKEN_KEY = "elaswave-token"
_CALL_LIMIT_S = 10.0
_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
)


class Operator:
    """A connection to the controller of one job at HOST:PORT; `close` it. Calls raise PeerError.

    tls: None for plain text; ConfigError where its files will not do.
    """

    def __init__(self, address: str, token: str, tls: TlsFiles | None = None) -> None:
        self._address = address
        self._metadata = ((_TOKEN_KEY, token),)
        self._channel = open_channel(address, tls, _OPTIONS)
        self._stub = OperatorServiceStub(self._channel)

    async def close(self) -> None:
        """End the connection."""
        await self._channel.close()

    async def status(self) -> JobStatus:
        """The job as its controller sees it now."""
        try:
            answer = await self._stub.Status(
                control_pb2.StatusRequest(), metadata=self._metadata, timeout=_CALL_LIMIT_S
            )
        except aio.AioRpcError as error:
            raise self._explain(error) from error
        return decode_status(answer)

    async def inject(self, injection: Injection) -> None:
        """Cause a fault."""
        request = control_pb2.InjectRequest(injection=encode_injection(injection))
        try:
            await self._stub.Inject(request, metadata=self._metadata, timeout=_CALL_LIMIT_S)
        except aio.AioRpcError as error:
            raise self._explain(error) from error

    async def stop(self, reason: str) -> None:
        """Ask the job to end now."""
        request = control_pb2.StopRequest(reason=reason)
        try:
            await self._stub.Stop(request, metadata=self._metadata, timeout=_CALL_LIMIT_S)
        except aio.AioRpcError as error:
            raise self._explain(error) from error

    async def watch(self) -> AsyncIterator[WatchItem]:
        """Everything from now on, first the status; ends after Finished. Waits for a controller that starts."""
        call = self._stub.Watch(control_pb2.WatchRequest(), metadata=self._metadata, wait_for_ready=True)
        try:
            async for message in call:
                item = decode_watch(message)
                yield item
                if isinstance(item, Finished):
                    return
        except aio.AioRpcError as error:
            raise self._explain(error) from error
        finally:
            call.cancel()

    def _explain(self, error: aio.AioRpcError) -> PeerError:
        text = f"controller at {self._address}: {error.details() or error.code().name}"
        return DeadlineExceeded(text) if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else PeerError(text)
