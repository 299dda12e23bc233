"""Entry of the user's script: trains as a worker of a launched job, or alone."""

import sys

from elaswave.core.events import StepResult
from elaswave.job import Job
from elaswave.runtime.memory import keep_freed_memory
from elaswave.runtime.reference import train_reference


def train(job: Job) -> None:
    """Train `job` to its end; returns when the job has finished.

    In a process started by elaswave-launch: as one of its workers. In any other: alone, with the same bits, printing
    one line per step. Raises ConfigError before the first step for what cannot be; JobError while training.
    """
    # Imported here: a script that runs alone needs no links and no agent.
    from elaswave.runtime.session import Session, worker_of_environment  # noqa: PLC0415

    keep_freed_memory()
    found = worker_of_environment()
    if found is not None:
        socket, worker = found
        Session(job, socket, worker).run()
        return

    def show(result: StepResult) -> None:
        sys.stdout.write(f"step {result.step + 1}/{job.steps}  loss {result.loss:.4f}  norm {result.grad_norm:.4f}\n")

    def show_line(text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()

    done = train_reference(job, on_step=show, on_line=show_line)
    sys.stdout.write(f"digest {done.digest}\n")
