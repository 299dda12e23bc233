"""Core values to messages and back; what is refused, by field; and that nothing but ProtocolError comes of junk."""

import dataclasses
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from elaswave._pb import control_pb2
from elaswave.core import events
from elaswave.core.ids import Step
from elaswave.core.injection import Injection
from elaswave.core.settings import WorkerSettings
from elaswave.core.status import JobStatus, WorkerStatus
from elaswave.errors import ProtocolError
from elaswave.wire import (
    Command,
    Order,
    SupervisionEvent,
    WatchItem,
    WorkerEvent,
    apply_plan_delta,
    decode_command,
    decode_injection,
    decode_order,
    decode_progress,
    decode_status,
    decode_supervision,
    decode_watch,
    decode_worker_event,
    encode_command,
    encode_injection,
    encode_order,
    encode_progress,
    encode_status,
    encode_supervision,
    encode_watch,
    encode_worker_event,
    parse,
)
from wire_strategies import (
    NODE,
    RECEIVED_AT,
    WORKER,
    commands,
    injections,
    orders,
    progress_pages,
    statuses,
    supervision_events,
    watch_items,
    worker_events,
)


def sent(message: Message) -> Message:
    return parse(type(message), message.SerializeToString())


@given(worker_events)
def test_worker_events_come_back(event: WorkerEvent) -> None:
    assert decode_worker_event(WORKER, sent(encode_worker_event(event)), RECEIVED_AT) == event


@given(supervision_events)
def test_observations_come_back(event: SupervisionEvent) -> None:
    assert decode_supervision(sent(encode_supervision(event))) == event


@given(orders)
def test_orders_come_back(order: Order) -> None:
    assert decode_order(NODE, sent(encode_order(order))) == order


@given(commands)
def test_commands_come_back(command: Command) -> None:
    assert decode_command(sent(encode_command(command))) == command


@given(watch_items)
def test_watched_items_come_back(item: WatchItem) -> None:
    assert decode_watch(sent(encode_watch(item))) == item


def test_loss_keeps_every_bit() -> None:
    for loss in (math.nan, math.inf, 0.1 + 0.2, -0.0):
        result = events.StepResult(step=Step(1), loss=loss, tokens=1, samples=1, grad_norm=1.0, skipped=False)
        back = decode_watch(sent(encode_watch(result)))
        assert isinstance(back, events.StepResult)
        assert repr(back.loss) == repr(loss)


def test_texts_of_users_can_always_be_sent() -> None:
    failed = events.WorkerFailed(
        worker=WORKER, kind="user", message="bad \udc80" + "x" * 10**5, traceback="first" + "y" * 10**6 + "last"
    )
    back = decode_worker_event(WORKER, sent(encode_worker_event(failed)), RECEIVED_AT)
    assert isinstance(back, events.WorkerFailed)
    assert back.message.startswith("bad ?x")
    assert back.traceback.endswith("last")


def test_token_is_not_in_any_text() -> None:
    settings = WorkerSettings(worker=WORKER, node=NODE, token="secret", run_dir="/run")
    assert "secret" not in repr(settings)


def failed_of(kind: str) -> Message:
    return control_pb2.WorkerMessage(failed=control_pb2.WorkerFailed(kind=kind))


def ready_of(**fields: object) -> Message:
    job = {"steps": 5, "micro_batches": 1, **fields}
    return control_pb2.WorkerMessage(ready=control_pb2.WorkerReady(address="unix:/a", job=job))


def layer_of(**fields: object) -> Message:
    return ready_of(layers=[control_pb2.LayerDescription(parameters=[control_pb2.Parameter(**fields)])])


from_worker = partial(decode_worker_event, WORKER, received_at=RECEIVED_AT)


@pytest.mark.parametrize(
    ("field", "decode", "message"),
    [
        (r"WorkerMessage\.body", from_worker, control_pb2.WorkerMessage()),
        (r"WorkerFailed\.kind is 'weird'", from_worker, failed_of("weird")),
        (r"JobDescription\.micro_batches is 0", from_worker, ready_of(micro_batches=0)),
        (r"JobDescription\.micro_batches is 65537", from_worker, ready_of(micro_batches=65537)),
        (r"JobDescription\.start_step is 6", from_worker, ready_of(start_step=6)),
        (r"JobDescription\.steps", from_worker, ready_of(steps=2**63)),
        (r"number of JobDescription\.layers", from_worker, ready_of(layers=[control_pb2.LayerDescription()] * 65537)),
        (r"Parameter\.name", from_worker, layer_of(name="")),
        (r"number of Parameter\.shape", from_worker, layer_of(name="w", shape=[1] * 17)),
        (r"Parameter\.shape is", from_worker, layer_of(name="w", shape=[2**64 - 1])),
        (
            r"WorkerReady\.address",
            from_worker,
            control_pb2.WorkerMessage(ready=control_pb2.WorkerReady(address="/tmp/x")),
        ),
        (
            r"WorkerReport\.held",
            from_worker,
            control_pb2.WorkerMessage(
                report=control_pb2.WorkerReport(held=[control_pb2.HeldShard(shard=1), control_pb2.HeldShard(shard=1)])
            ),
        ),
        (
            r"WorkDone\.first_start",
            from_worker,
            control_pb2.WorkerMessage(work_done=control_pb2.WorkDone(first_start=math.nan)),
        ),
        (
            r"RepairHop\.micro_batch",
            from_worker,
            control_pb2.WorkerMessage(work_done={"hops": [control_pb2.RepairHop(micro_batch=65536)]}),
        ),
        (r"AttachRequest\.body is 'beat'", decode_supervision, control_pb2.AttachRequest(beat={})),
        (
            r"WorkerSuspected\.cause",
            decode_supervision,
            control_pb2.AttachRequest(suspected=control_pb2.WorkerSuspected(cause="mood")),
        ),
        (
            r"WorkerExited\.noticed_at",
            decode_supervision,
            control_pb2.AttachRequest(exited=control_pb2.WorkerExited(noticed_at=math.inf)),
        ),
        (
            r"WorkerExited\.signal is 65",
            decode_supervision,
            control_pb2.AttachRequest(exited=control_pb2.WorkerExited(signal=65)),
        ),
        (r"Progress\.forward_done", decode_progress, control_pb2.Progress(forward_done=b"\0" * 8193)),
        (r"AttachResponse\.body", partial(decode_order, NODE), control_pb2.AttachResponse()),
        (r"AgentMessage\.body", decode_command, control_pb2.AgentMessage()),
        (
            r"Settings\.link_transport is 'rdma'",
            decode_command,
            control_pb2.AgentMessage(settings=control_pb2.Settings(node="n", link_transport="rdma")),
        ),
        (r"Settings\.node", decode_command, control_pb2.AgentMessage(settings=control_pb2.Settings())),
        (r"Injection\.action is 'melt'", decode_injection, control_pb2.Injection(action="melt", phase="any")),
        (r"Injection\.phase is 'idle'", decode_injection, control_pb2.Injection(action="kill", phase="idle")),
        (r"Injection\.factor", decode_injection, control_pb2.Injection(action="slow", phase="any", factor=math.inf)),
        (r"Injection\.step", decode_injection, control_pb2.Injection(action="kill", phase="any", step=2**63)),
        (r"WatchResponse\.body", decode_watch, control_pb2.WatchResponse()),
        (r"Finished\.exit_code", decode_watch, control_pb2.WatchResponse(finished={"exit_code": 256})),
        (r"Incident\.plan_s", decode_watch, control_pb2.WatchResponse(incident={"plan_s": math.nan})),
    ],
)
def test_bad_messages_are_refused_by_field(field: str, decode: Callable[[Message], object], message: Message) -> None:
    with pytest.raises(ProtocolError, match=field):
        decode(sent(message))


DECODERS: dict[type[Message], Callable[[Message], object]] = {
    control_pb2.WorkerMessage: from_worker,
    control_pb2.AttachRequest: decode_supervision,
    control_pb2.AttachResponse: partial(decode_order, NODE),
    control_pb2.AgentMessage: decode_command,
    control_pb2.WatchResponse: decode_watch,
    control_pb2.StatusResponse: decode_status,
    control_pb2.Progress: decode_progress,
    control_pb2.Injection: decode_injection,
    control_pb2.PlanDelta: partial(apply_plan_delta, None),
}


@pytest.mark.parametrize("kind", DECODERS)
@given(data=st.data())
def test_random_bytes_raise_nothing_else(kind: type[Message], data: st.DataObject) -> None:
    # A field number and wire type of the message first, so that the bytes get past the parser more often.
    tag = data.draw(st.sampled_from([field.number << 3 | wire for field in kind.DESCRIPTOR.fields for wire in (0, 2)]))
    body = data.draw(st.binary(max_size=30))
    with suppress(ProtocolError):
        DECODERS[kind](parse(kind, bytes([tag % 128, len(body)]) + body))


@given(data=st.data(), flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4))
def test_damaged_messages_raise_nothing_else(data: st.DataObject, flips: list[tuple[int, int]]) -> None:
    encoded = data.draw(
        st.one_of(
            worker_events.map(encode_worker_event),
            supervision_events.map(encode_supervision),
            commands.map(encode_command),
            statuses.map(encode_status),
            progress_pages.map(encode_progress),
            injections.map(encode_injection),
        )
    )
    body = bytearray(encoded.SerializeToString())
    for place, value in flips:
        if body:
            body[place % len(body)] = value
    with suppress(ProtocolError):
        DECODERS[type(encoded)](parse(type(encoded), bytes(body)))


def test_every_core_field_travels() -> None:
    """A field added to a value but not to its conversion would come back as its default."""
    for kind, message in (
        (WorkerSettings, control_pb2.Settings),
        (Injection, control_pb2.Injection),
        (events.Incident, control_pb2.Incident),
        (events.StepResult, control_pb2.StepResult),
        (events.Progress, control_pb2.Progress),
        (WorkerStatus, control_pb2.WorkerStatus),
        (JobStatus, control_pb2.StatusResponse),
    ):
        fields = {field.name for field in dataclasses.fields(kind)}
        assert fields == {field.name for field in message.DESCRIPTOR.fields}, kind.__name__
