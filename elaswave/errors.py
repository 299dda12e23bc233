"""All errors of ElasWave, by whose fault they are.

ElasWaveError
├── ConfigError          the user asked for something that cannot be; refused before step 1 (exit code 93)
├── JobError             the user's program failed while running (exit code 1)
│   ├── UserCodeError        a script, layer, data set or callback raised
│   └── NonFiniteError       loss or gradient is not finite and the policy is "raise"
├── PeerError            another process broke the protocol, or went away
│   ├── ProtocolError        a message that the sender should not have sent
│   ├── LinkClosed           the peer of a link is gone
│   └── DeadlineExceeded     a wait with a limit ran out
├── FaultError           hardware or a process failed and the job cannot go on by itself
│   └── StateLost            owner and all replicas of a shard are gone, and no durable checkpoint exists
└── InvariantError       a bug of ours: crash loudly
"""


class ElasWaveError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(ElasWaveError):
    """The request cannot be satisfied; the message names the value, the limit and what would be right."""


class JobError(ElasWaveError):
    """The user's program failed while the job was running."""


class UserCodeError(JobError):
    """Code supplied by the user raised; the message holds its traceback and rank."""


class NonFiniteError(JobError):
    """A loss or gradient is infinite or not a number; the message names step, micro-batch and layer."""


class PeerError(ElasWaveError):
    """Another process broke the protocol or is gone."""


class ProtocolError(PeerError):
    """A message that its sender should not have sent; the link it came by is closed."""


class LinkClosed(PeerError):
    """The peer of a link closed it or died."""


class DeadlineExceeded(PeerError):
    """A wait ran into its limit; the message names what was awaited and the limit in seconds."""


class EpochChanged(PeerError, RuntimeError):
    """A member of a communicator was lost or added: this operation and later ones failed on all ranks alike.

    After `reconfigure` the communicator works on with its new members; what was under way is to be repeated.
    """


class FaultError(ElasWaveError):
    """Hardware or a process failed in a way that the job cannot absorb."""


class StateLost(FaultError):
    """Every copy of some optimizer state is gone and there is nothing to fall back to."""


class InvariantError(ElasWaveError):
    """A condition that the code guarantees does not hold: a bug in ElasWave."""
