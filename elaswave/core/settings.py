"""What a worker is told by its agent before anything else."""

from dataclasses import dataclass, field

from elaswave.core.ids import NodeId, WorkerId
from elaswave.core.shape import SHARD_ELEMENTS

LINK_TRANSPORTS = ("shared", "unix", "tcp")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The launcher's flags as far as workers need them, and who the worker is."""

    worker: WorkerId
    node: NodeId

    token: str = field(repr=False)
    """Shared secret of the job; links refuse peers that do not know it. Never logged."""

    run_dir: str
    """Folder for sockets and logs of this run; exists."""

    save_dir: str = ""
    """Folder for durable checkpoints; empty: none are written."""

    save_every: int = 0
    """Steps between durable checkpoints; 0: none."""

    unbuffered: bool = False
    """Links hold a message until its receiver asks for it: the behaviour of transports without buffers."""

    log_cap_bytes: int = 0
    """Limit of the boundary log in bytes; 0: no limit. What does not fit is made again when it is needed."""

    shard_elements: int = SHARD_ELEMENTS
    """Least length of a shard, as the controller divides by it."""

    resume_from: str = ""
    """Folder of the durable checkpoint to start from; empty: a fresh start."""

    want_digest: bool = False
    """Report the digest over all parameters after the last step; costs a pass over them."""

    link_transport: str = "shared"
    """"shared" or "unix" within one machine (large payloads in shared memory, or all in sockets), else "tcp"."""

    link_host: str = "127.0.0.1"
    """Address that TCP links listen at."""
