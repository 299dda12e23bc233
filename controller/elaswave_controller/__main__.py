"""`python -m elaswave_controller`: started by elaswave-launch, one per job."""

import asyncio
import sys

from elaswave.core.controller import Controller
from elaswave.errors import ElasWaveError
from elaswave.priority import be_urgent
from elaswave_controller.options import read_options
from elaswave_controller.process import run_controller
from elaswave_controller.shell import REFUSED


def main() -> int:
    """Run the controller; errors before the first step are one line on stderr."""
    try:
        options = read_options(sys.argv[1:])
        be_urgent()
        return asyncio.run(run_controller(options, Controller))
    except (ElasWaveError, OSError) as error:
        sys.stderr.write(f"elaswave controller: {error}\n")
        return REFUSED


if __name__ == "__main__":
    sys.exit(main())
