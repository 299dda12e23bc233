"""`python -m elaswave_agent`: one node's agent. Exit codes: 0 clean end, 1 failed, 93 cannot start as asked."""

import asyncio
import sys
from collections.abc import Sequence

from elaswave.errors import ConfigError, ElasWaveError, InvariantError
from elaswave.lifeline import end_with_parent
from elaswave.priority import be_urgent
from elaswave_agent.daemon import Agent
from elaswave_agent.options import AgentOptions, parse_options
from elaswave_agent.own_address import own_address

EXIT_REFUSED = 93


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until told to stop; returns the exit code."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        if options.parent_pid is not None:
            end_with_parent(options.parent_pid)
        be_urgent()
        token = _read_token(options)
        _make_log_folder(options)
        asyncio.run(_run(options, token, own_address(options.link_host, options.controller)))
    except InvariantError:
        raise
    except ElasWaveError as error:
        sys.stderr.write(f"elaswave agent: {error}\n")
        return EXIT_REFUSED if isinstance(error, ConfigError) else 1
    return 0


async def _run(options: AgentOptions, token: str, link_host: str) -> None:
    await Agent(options, token, link_host).run()


def _read_token(options: AgentOptions) -> str:
    if options.token_file is None:
        return ""
    try:
        return options.token_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token-file {options.token_file}: {error}; must be a readable text file") from error


def _make_log_folder(options: AgentOptions) -> None:
    try:
        options.node_log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--log-dir {options.log_dir}: {error}; must be a folder that can be written") from error


if __name__ == "__main__":
    sys.exit(main())
