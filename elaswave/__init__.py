"""ElasWave: elastic training in which a step survives the loss of a worker, bit for bit."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elaswave.core.events import StepResult
    from elaswave.errors import ConfigError, ElasWaveError, JobError, NonFiniteError, UserCodeError
    from elaswave.job import SGD, AdamW, Constant, Dataset, Job, UserState, WarmupCosine, WarmupLinear
    from elaswave.runtime.evaluation import Evaluation
    from elaswave.runtime.train import train

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdamW",
    "ConfigError",
    "Constant",
    "Dataset",
    "ElasWaveError",
    "Evaluation",
    "Job",
    "JobError",
    "NonFiniteError",
    "StepResult",
    "UserCodeError",
    "UserState",
    "WarmupCosine",
    "WarmupLinear",
    "train",
]

# Loaded when first used: agent and controller import this package too, and must not import torch.
_MODULES = ("elaswave.errors", "elaswave.job", "elaswave.core.events")
_TORCH_MODULES = {"Evaluation": "elaswave.runtime.evaluation", "train": "elaswave.runtime.train"}


def __getattr__(name: str) -> object:
    if name in __all__:
        for path in (_TORCH_MODULES[name],) if name in _TORCH_MODULES else _MODULES:
            module = importlib.import_module(path)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module 'elaswave' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
