"""Scenario texts of the controller: commands, then `----`, then the effects that they had, one a line.

`python tests/core/controller_scenarios.py` writes the effects of all texts anew; read the difference, then keep it.
A command is `name argument... key=value...`; blocks end with an empty line. `@ 1.5` sets the time. `adopt`, `step` and
the like stand for what a worker tells when it follows the plans that it was sent.
"""

import shlex
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from elaswave.core import events as ev
from elaswave.core.config import ControllerConfig
from elaswave.core.controller import Controller
from elaswave.core.ids import Epoch, Layer, MicroBatch, NodeId, ShardId, Step, WorkerId
from elaswave.core.plan import Group, Plan, RouteTable
from elaswave.core.shape import CHUNK_ELEMENTS

_CONFIG = ControllerConfig(dp=1, pp=1, shard_elements=CHUNK_ELEMENTS)
FOLDER = Path(__file__).parent / "scenarios"


@dataclass(slots=True)
class Crew:
    """What a worker knows, as far as its reports need it."""

    epoch: int = 0
    step: int = 0
    held: dict[int, int] = field(default_factory=dict)
    adoptions: list[tuple[Epoch, Step]] = field(default_factory=list)


class Scenario:
    """Runs the commands of one text."""

    def __init__(self) -> None:
        self.controller = Controller(_CONFIG)
        self.now = 0.0
        self.job = ev.JobDescription(layers=((), ()), steps=4, micro_batches=4, digest="job")
        self.crew: dict[int, Crew] = {}

    def run(self, line: str) -> list[str]:
        """Effects of one command."""
        name, *rest = shlex.split(line)
        words = [word for word in rest if "=" not in word]
        options = dict(word.split("=", 1) for word in rest if "=" in word)
        match name:
            case "@":
                self.now = float(words[0])
                return []
            case "config":
                self.controller = Controller(replace(_CONFIG, **{key: _number(x) for key, x in options.items()}))
                return []
            case "job":
                layers = tuple(
                    (ev.ParameterDescription(name="w", shape=(int(options.get("size", "1024")),)),)
                    for _ in range(int(options.get("layers", "2")))
                )
                self.job = ev.JobDescription(
                    layers=layers,
                    steps=int(options.get("steps", "4")),
                    micro_batches=int(options.get("micro_batches", "4")),
                    digest=options.get("digest", "job"),
                    resume_from=options.get("resume", ""),
                )
                return []
            case "status":
                return self._status()
            case "deadline":
                return [f"deadline {self.controller.next_deadline()}"]
        effects: list[str] = []
        for event in self._events(name, words, options):
            effects += [text(effect) for effect in self.controller.handle(event, self.now)]
        return effects

    def _events(self, name: str, words: list[str], options: dict[str, str]) -> list[ev.Event]:
        match name:
            case "attach":
                return [ev.AgentAttached(node=NodeId(words[0]), workers=int(words[1]))]
            case "lost":
                clean = "clean" in words
                return [ev.AgentLost(node=NodeId(words[0]), clean=clean, evidence="stream ended", noticed_at=self.now)]
            case "stop":
                return [ev.StopRequested(reason=words[0])]
            case "tick":
                return [ev.Tick()]
        return [event for worker in self._chosen(words[0]) for event in self._of_worker(name, worker, words, options)]

    def _chosen(self, word: str) -> list[int]:
        records = self.controller.workers
        if word == "all":
            return [worker for worker, record in records.items() if record.state.value not in ("gone", "fenced")]
        if word == "members":
            return sorted(self.controller.plan.ids) if self.controller.plan is not None else []
        return [int(part) for part in word.split(",")]

    def _of_worker(self, name: str, worker: int, words: list[str], options: dict[str, str]) -> list[ev.Event]:
        me = WorkerId(worker)
        match name:
            case "started":
                return [ev.WorkerStarted(worker=me, pid=1000 + worker)]
            case "ready":
                return [
                    ev.WorkerReady(
                        worker=me,
                        address=f"unix:/{worker}",
                        job=self.job,
                        fingerprint=options.get("fingerprint", "same"),
                    )
                ]
            case "exited":
                return [
                    ev.WorkerExited(
                        worker=me,
                        exit_code=int(options.get("code", "0")),
                        signal=int(options.get("signal", "0")),
                        noticed_at=self.now,
                        last_alive_at=self.now - 0.25,
                        progress=_progress(options),
                    )
                ]
            case "suspect":
                return [
                    ev.WorkerSuspected(
                        worker=me,
                        cause=options.get("cause", "stopped"),
                        evidence="state T",
                        noticed_at=self.now,
                        last_alive_at=self.now - 0.5,
                        progress=_progress(options),
                    )
                ]
            case "clear":
                return [ev.WorkerCleared(worker=me, evidence="runs again")]
            case "failed":
                return [ev.WorkerFailed(worker=me, kind=words[1], message=words[2], traceback="")]
            case "link":
                return [ev.LinkBroken(worker=me, peer=WorkerId(int(words[1])), reason="hung up")]
            case "line":
                return [ev.UserLine(worker=me, text=words[1])]
            case "digest":
                return [ev.FinalDigest(worker=me, parameters=words[1])]
            case "wrote":
                shards = tuple(ShardId(int(part)) for part in options["shards"].split(",") if part)
                return [
                    ev.CheckpointWritten(
                        worker=me,
                        step=Step(int(options["step"])),
                        shards=shards,
                        manifest=f"manifest {worker}",
                        with_user_state="state" in options,
                    )
                ]
            case "did":
                return [self._work_done(me, options)]
        return self._told(name, me, options)

    def _work_done(self, me: WorkerId, options: dict[str, str]) -> ev.WorkDone:
        hops = tuple(
            ev.RepairHop(micro_batch=MicroBatch(int(m)), first_layer=Layer(0), backward=backward)
            for m in options["hops"].split(",")
            for backward in (False, True)
        )
        return ev.WorkDone(
            worker=me,
            epoch=Epoch(int(options["epoch"])),
            step=Step(int(options["step"])),
            hops=hops,
            bytes=100,
            first_start=self.now - 0.1,
            last_end=self.now,
        )

    def _told(self, name: str, me: WorkerId, options: dict[str, str]) -> list[ev.Event]:
        """What a worker tells that follows its plans: it holds at once whatever it should, or what `held` says."""
        crew = self.crew.setdefault(me, Crew())
        plan = self.controller.plan
        if plan is None:
            raise ValueError(f"{name} {me}: there is no plan yet")
        found: list[ev.Event] = []
        if "step" in options:
            crew.step = int(options["step"])
            crew.held = dict.fromkeys(crew.held, crew.step)
        if name == "adopt":
            for epoch in range(crew.epoch + 1 if crew.epoch else plan.epoch, plan.epoch + 1):
                crew.adoptions.append((Epoch(epoch), Step(crew.step)))
            crew.epoch = plan.epoch
            mine = {s: crew.step for s, group in enumerate(plan.groups) if me in group.everyone}
            kept = {s for s, group in enumerate(plan.groups) if group.owner is None or me not in plan.ids}
            known = {s: v for s, v in crew.held.items() if s in mine or s in kept}
            crew.held = known if options.get("held") == "old" else mine | known
        elif name == "step":
            found.append(
                ev.StepReported(
                    worker=me,
                    result=ev.StepResult(
                        step=Step(crew.step - 1), loss=1.5, tokens=8, samples=4, grad_norm=0.5, skipped=False
                    ),
                    received_at=self.now,
                )
            )
        elif name != "report":
            raise ValueError(f"unknown command {name}")
        if name != "step" or "quiet" not in options:
            found.append(self._report(me, crew, ready=options.get("ready", "yes") == "yes"))
        return found

    def _report(self, me: WorkerId, crew: Crew, *, ready: bool) -> ev.WorkerReport:
        adoptions, crew.adoptions = tuple(crew.adoptions), []
        return ev.WorkerReport(
            worker=me,
            epoch=Epoch(crew.epoch),
            step=Step(crew.step),
            adoptions=adoptions,
            held=tuple(ev.HeldShard(shard=ShardId(s), version=v) for s, v in sorted(crew.held.items())),
            finished=crew.step == self.job.steps,
            hosted_ready=ready,
        )

    def _status(self) -> list[str]:
        status = self.controller.status()
        lines = [f"{status.state}, epoch {status.epoch}, step {status.step} of {status.steps}"]
        for worker in status.workers:
            layers = _spans(tuple(map(int, worker.layers)))
            lines.append(f"w{worker.worker} {worker.node}/{worker.local_index} {worker.state} hosts {layers}")
        return lines


def _number(value: str) -> float | int:
    return float(value) if "." in value else int(value)


def _progress(options: dict[str, str]) -> ev.Progress:
    if "step" not in options:
        return ev.Progress()
    return ev.Progress(
        step=Step(int(options["step"])),
        phase=options.get("phase", "forward"),
        forward_begun=int(options.get("forward", "0"), 2),
        backward_begun=int(options.get("backward", "0"), 2),
    )


# ---------------------------------------------------------------------- effects as text


def text(effect: ev.Effect) -> str:
    """One line that shows what matters of an effect."""
    match effect:
        case ev.StartWorker():
            again = f" start {effect.incarnation + 1}" if effect.incarnation else ""
            place = f"{effect.node}/{effect.local_index}{again}"
            return f"start w{effect.worker} on {place}, rank {effect.rank} of {effect.world_size}"
        case ev.PersistPlan():
            return f"persist {plan_text(effect.plan)}"
        case ev.SendPlans():
            return f"send w{effect.worker} plans from {effect.first_epoch}"
        case ev.FenceWorker():
            return f"fence w{effect.worker}: {effect.reason}"
        case ev.StepRecorded():
            return f"step {effect.result.step} loss {effect.result.loss} after {effect.seconds:g} s"
        case ev.IncidentClosed():
            return f"incident {incident_text(effect.incident)}"
        case ev.CommitCheckpoint():
            return f"commit checkpoint {effect.step}: {', '.join(effect.manifests)}"
        case ev.ShowLine():
            return f"show {effect.text}"
        case ev.RestartAll():
            return f"restart all: {effect.reason}"
        case ev.JobEnded():
            message = effect.message.replace("\n", " / ")
            return f"end {effect.exit_code} {message!r} digest {effect.digest!r}"


def plan_text(plan: Plan) -> str:
    """Members, hosting, routes, copies.

    `3e1>1e2`: a route over workers 3 and 1, assigned by plans 1 and 2. `0+1/2~3`: owner, replica, joining, catch-up.
    """
    members = ",".join(str(member.worker) for member in plan.members)
    hosting = " ".join(f"{w}:{_spans(tuple(map(int, layers)))}" for w, layers in sorted(plan.hosting.items()))
    tables = " ".join(f"@{table.first_step} {_routes(table)}" for table in plan.tables)
    groups = " ".join(_group(group) for group in plan.groups)
    more = "".join(
        [
            f"; owners asked {dict(plan.queries)}" if plan.queries else "",
            f"; gates {dict(plan.gates)}" if plan.gates else "",
            "; finished" if plan.finished else "",
        ]
    )
    return f"{plan.epoch}: members {members}; hosts {hosting}; routes {tables}; copies {groups}{more} ({plan.reason})"


def _routes(table: RouteTable) -> str:
    return " ".join(">".join(f"{hop.worker}e{hop.epoch}" for hop in route) for route in table.routes)


def _group(group: Group) -> str:
    owner = "none" if group.owner is None else str(group.owner)
    parts = (("+", group.replicas), ("/", group.joining), ("~", group.catch_up))
    return owner + "".join(f"{sign}{worker}" for sign, workers in parts for worker in workers)


def _spans(layers: tuple[int, ...]) -> str:
    spans = []
    for _, run in groupby(enumerate(layers), key=lambda item: item[1] - item[0]):
        found = [layer for _, layer in run]
        spans.append(f"{found[0]}-{found[-1]}" if len(found) > 1 else str(found[0]))
    return ",".join(spans) or "nothing"


def incident_text(incident: ev.Incident) -> str:
    """Cause, place, times in ms and counts."""
    phases = (incident.detect_s, incident.plan_s, incident.edit_s, incident.repair_s)
    times = (*phases, incident.resume_s, incident.delay_s)
    shown = " ".join(f"{seconds * 1000:.0f}" if seconds != -1 else "?" for seconds in times)
    workers = ",".join(map(str, incident.workers))
    hops = f"{incident.redone_hops} of {incident.dead_hops} dead of {incident.step_hops}"
    place = f"step {incident.step} {incident.phase or 'unknown phase'}"
    return f"{incident.epoch} {incident.cause} of {workers} in {place}: {shown} ms, hops redone {hops}"


# ---------------------------------------------------------------------- files


def play(source: str) -> str:
    """The text with the effects that its commands have now."""
    scenario = Scenario()
    blocks: list[str] = []
    for block in source.strip().split("\n\n"):
        commands = block.split("\n----")[0].splitlines()
        effects = [line for command in commands if not command.startswith("#") for line in scenario.run(command)]
        blocks.append("\n".join([*commands, "----", *effects]))
    return "\n\n".join(blocks) + "\n"


def main() -> None:
    """Write the effects of all texts anew."""
    for path in sorted(FOLDER.glob("*.txt")):
        path.write_text(play(path.read_text()))


if __name__ == "__main__":
    main()
