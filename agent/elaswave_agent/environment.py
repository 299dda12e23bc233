"""Environment of a worker: torchrun's variables and our own."""

from collections.abc import Mapping

from elaswave.core.events import StartWorker
from elaswave_agent.options import AgentOptions


def worker_environment(
    options: AgentOptions, order: StartWorker, inherited: Mapping[str, str]
) -> tuple[tuple[str, str], ...]:
    """All variables of the worker, sorted by name. What torchrun sets is set; OMP_NUM_THREADS only where it is not."""
    found = {
        # Threads decide the bits of a matrix product: one, unless the user says otherwise.
        "OMP_NUM_THREADS": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        **inherited,
        "RANK": str(order.rank),
        "LOCAL_RANK": str(order.local_index),
        "WORLD_SIZE": str(order.world_size),
        "LOCAL_WORLD_SIZE": str(options.workers),
        "GROUP_RANK": str(options.node_rank),
        "GROUP_WORLD_SIZE": str(options.nnodes),
        "ROLE_NAME": "default",
        "ROLE_RANK": str(order.rank),
        "ROLE_WORLD_SIZE": str(order.world_size),
        "MASTER_ADDR": options.master_addr,
        "MASTER_PORT": str(options.master_port),
        "TORCHELASTIC_RUN_ID": options.run_id,
        "TORCHELASTIC_RESTART_COUNT": str(order.restart_count),
        "TORCHELASTIC_MAX_RESTARTS": str(options.max_restarts),
        "ELASWAVE_WORKER": str(order.worker),
        "ELASWAVE_NODE": options.node,
        "ELASWAVE_AGENT_SOCK": options.socket_path,
        "ELASWAVE_RUN_DIR": str(options.run_dir),
    }
    return tuple(sorted(found.items()))
