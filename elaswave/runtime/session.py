"""One worker of a launched job, from connecting to its agent to leaving by plan."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from elaswave.certificates import files_from_environment
from elaswave.comm.addresses import LinkOptions
from elaswave.comm.inbox import Inbox, Received
from elaswave.comm.links import Links
from elaswave.core.events import UserLine, WorkerReady
from elaswave.core.ids import WorkerId
from elaswave.core.parameters import block_layout
from elaswave.core.plan import FIRST_EPOCH, Plan
from elaswave.core.settings import WorkerSettings
from elaswave.errors import DeadlineExceeded
from elaswave.job import Job
from elaswave.priority import be_ordinary
from elaswave.runtime.agent_link import AgentLink, Delivery
from elaswave.runtime.description import describe_job
from elaswave.runtime.device import Device, configure_numerics, device_of
from elaswave.runtime.faults import FaultInjector
from elaswave.runtime.fingerprint import fingerprint
from elaswave.runtime.loop import WAIT_S, Connections, Item, TrainingLoop
from elaswave.runtime.start import find_start

SETTINGS_LIMIT_S = 60.0
PAYLOAD_LIMIT_BYTES = 8 << 30
CLOSE_LIMIT_S = 1.0  # by then all that others need has been confirmed by plan


class Session:
    """Owns the connections of one worker and ends them, whatever happens in between."""

    def __init__(self, job: Job, agent_socket: str, worker: WorkerId) -> None:
        self._job = job
        self._me = worker
        self._inbox: Inbox[Item] = Inbox()
        self._agent = AgentLink(agent_socket, worker, self._deliver)
        self._device: Device = device_of(job.device, int(os.environ.get("LOCAL_RANK", "0")))
        self._early: list[Received] = []

    def _deliver(self, item: Delivery) -> None:
        self._inbox.put(item)

    def run(self) -> None:
        """Train until the plan says that the job has finished. Raises ConfigError, JobError, InvariantError."""
        configure_numerics()
        self._agent.open()
        try:
            settings = self._await_settings()
            links = Links(
                self._me,
                settings.token.encode(),
                self._inbox,
                payload_limit_bytes=PAYLOAD_LIMIT_BYTES,
                options=LinkOptions(
                    shared_memory=settings.link_transport == "shared", tls=files_from_environment(os.environ)
                ),
            )
            address = links.listen(self._address(settings))
            links.start()
            try:
                self._train(settings, links, address)
            finally:
                links.close(CLOSE_LIMIT_S)
        finally:
            self._agent.close()

    def _address(self, settings: WorkerSettings) -> str:
        if settings.link_transport == "tcp":
            return f"tcp:{settings.link_host}:0"
        return f"unix:{Path(settings.run_dir) / f'w{self._me}.sock'}"

    def _train(self, settings: WorkerSettings, links: Links, address: str) -> None:
        description = describe_job(self._job)
        layout = block_layout(description.layers)
        start = find_start(self._job, description, layout, settings)
        mark = fingerprint(self._job, layout, self._device)
        self._agent.send(WorkerReady(worker=self._me, address=address, job=start.description, fingerprint=mark))
        faults = FaultInjector(self._agent.progress.alive)
        connections = Connections(agent=self._agent, links=links, inbox=self._inbox, faults=faults, settings=settings)
        if start.other_settings and self._me == 0:
            text = f"{settings.resume_from} was written with other settings: the bits will be those of neither job"
            self._agent.send(UserLine(worker=self._me, text=text))
        plan = self._await_admission(connections)
        be_ordinary()
        loop = TrainingLoop(self._job, start, plan, connections, self._device)
        loop.begin(start, self._early, fresh=plan.epoch == FIRST_EPOCH)
        loop.run()

    def _await_settings(self) -> WorkerSettings:
        deadline = time.monotonic() + SETTINGS_LIMIT_S
        others: list[Item] = []
        while self._inbox.wait(deadline):
            items = self._inbox.take_all()
            found = [item for item in items if isinstance(item, WorkerSettings)]
            others += [item for item in items if not isinstance(item, WorkerSettings)]
            if found:
                self._inbox.put_back(others)
                return found[0]
        raise DeadlineExceeded(f"the agent sent no settings within {SETTINGS_LIMIT_S:g} s")

    def _await_admission(self, connections: Connections) -> Plan:
        """The first plan that counts on this worker. Spares wait here."""
        while True:
            self._agent.progress.alive()
            self._inbox.wait(time.monotonic() + WAIT_S)
            items = self._inbox.take_all()
            for index, item in enumerate(items):
                if isinstance(item, Plan) and self._me in item.ids:
                    self._inbox.put_back(items[index + 1 :])
                    return item
                if isinstance(item, Received):
                    self._early.append(item)
                else:
                    connections.handle(item)


def worker_of_environment(environment: Mapping[str, str] = os.environ) -> tuple[str, WorkerId] | None:
    """Agent socket and worker id that the agent has set; None outside a launched job."""
    socket, worker = environment.get("ELASWAVE_AGENT_SOCK"), environment.get("ELASWAVE_WORKER")
    if socket is None or worker is None:
        return None
    return socket, WorkerId(int(worker))
