"""Works: what torch.distributed gets for an operation that it has started."""

import time
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from elaswave.comm.endpoint import Endpoint
from elaswave.comm.group import Group, flat_of
from elaswave.comm.operation import Operation
from elaswave.errors import ElasWaveError

Values = list[Tensor]


class DoneWork(dist.Work):
    """Of what is done when it is started."""

    def __init__(self, tensors: Values) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        del timeout
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def result(self) -> Values:
        return self._tensors

    def get_future(self) -> Future[Values]:
        future: Future[Values] = Future()
        future.set_result(self._tensors)
        return future


class OperationWork(dist.Work):
    """Of one or several collectives."""

    def __init__(self, endpoint: Endpoint, operations: list[Operation], tensors: Values) -> None:
        super().__init__()
        self._endpoint = endpoint
        self._operations = operations
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until all have ended; raises what the first failed one has failed with."""
        for operation in self._operations:
            if timeout is not None and timeout.total_seconds() > 0:
                self._endpoint.limit(operation, time.monotonic() + timeout.total_seconds())
            self._endpoint.wait(operation)
        return True

    def is_completed(self) -> bool:
        if not all(operation.finished for operation in self._operations):
            self._endpoint.poll()
        return all(operation.finished for operation in self._operations)

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> ElasWaveError | None:
        return next((found.error for found in self._operations if found.error is not None), None)

    def result(self) -> Values:
        return self._tensors

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> Future[Values]:
        """Driven by the endpoint's thread. A failure is raised where the value is asked for, by C++ code too."""
        ended: Future[None] = Future()
        numbers = count(1)

        def note(_: Operation) -> None:
            # Called by whoever drives and, for what has ended already, by this thread: `next` is atomic.
            if next(numbers) == len(self._operations):
                ended.set_result(None)

        future = ended.then(self._value)
        for operation in self._operations:
            self._endpoint.when_ended(operation, note)
        if not self._operations:
            ended.set_result(None)
        self._endpoint.attend()
        return future

    def _value(self, _: Future[None]) -> Values:
        error = self.exception()
        if error is not None:
            raise error
        return self._tensors


class ReceiveWork(dist.Work):
    """Of one message that is awaited."""

    def __init__(self, group: Group, source: int | None, tag: int, tensor: Tensor) -> None:
        super().__init__()
        self._group = group
        self._awaited = group.endpoint.expect(group.communicator, source, tag)
        self._deadline = time.monotonic() + group.timeout_s
        self._tensor = tensor
        self._source: int | None = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Until it is here and in the tensor."""
        if self._source is None:
            deadline = self._deadline
            if timeout is not None and timeout.total_seconds() > 0:
                deadline = time.monotonic() + timeout.total_seconds()
            flat = flat_of(self._tensor)
            self._source = self._group.endpoint.receive(self._group.communicator, self._awaited, flat, deadline)
            if flat.data_ptr() != self._tensor.data_ptr():
                self._tensor.detach().copy_(flat.view(self._tensor.shape))
        return True

    def is_completed(self) -> bool:
        endpoint = self._group.endpoint
        if self._source is None and not endpoint.is_here(self._group.communicator, self._awaited):
            endpoint.poll()
        if self._source is None and endpoint.is_here(self._group.communicator, self._awaited):
            self.wait()
        return self._source is not None

    def is_success(self) -> bool:
        return self._source is not None

    def source_rank(self) -> int:
        return -1 if self._source is None else self._source

    _source_rank = source_rank

    def result(self) -> Values:
        return [self._tensor]

    def synchronize(self) -> None:
        self.wait()

    def get_future(self) -> Future[Values]:
        self.wait()
        future: Future[Values] = Future()
        future.set_result([self._tensor])
        return future
