"""One run of the controller process, from its options to its exit code."""

import asyncio
import signal
from functools import partial

from elaswave.core.events import StopRequested
from elaswave_controller.core import CoreFactory
from elaswave_controller.files import write_atomically
from elaswave_controller.options import ControllerOptions
from elaswave_controller.server import start_server
from elaswave_controller.shell import Shell
from elaswave_controller.store.memory import open_memory_store

_TELL_LIMIT_S = 2.0  # how long the launcher may take to fetch the end of its watch stream


async def run_controller(options: ControllerOptions, make_core: CoreFactory) -> int:
    """Run one job and return its exit code: 0 done, 1 failed, 93 refused before the first step.

    SIGTERM and SIGINT end the job as an operator's stop does. Raises ConfigError where the port or the store's log
    cannot be had, OSError where the port cannot be written.
    """
    store = open_memory_store(options.store_log)
    try:
        shell = Shell(options, make_core, store)
        server = await start_server(options, shell)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            stop = StopRequested(reason=f"the job was ended where its controller runs ({number.name})")
            loop.add_signal_handler(number, partial(shell.submit, stop))
        if options.port_file is not None:
            write_atomically(options.port_file, f"{server.port}\n")
        ended = await shell.run()
        shell.agents.shutdown(ended.message.partition("\n")[0] or "the job is done")
        await asyncio.gather(shell.agents.wait_empty(options.shutdown_limit_s), shell.watchers.wait_told(_TELL_LIMIT_S))
        await server.stop(grace_s=0.2)
    finally:
        await store.close()
    return ended.exit_code
