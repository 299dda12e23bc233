"""Why a case of torch's distributed suite does not apply: named rules over the suite's own words and over names."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Exemption:
    """A case does not apply: by which rule, and why."""

    rule: str
    reason: str


WORLD_SIZE_RULE: Final = "needs another world size"

# The suite says why it skips a case. A text that no rule knows exempts nothing: the case counts as failed, as it should
# where, for example, the suite finds its backend unavailable.
_SUITE_RULES: Final = (
    ("disabled by the suite", r"github\.com/pytorch/pytorch/(issues|pull)/|^Skipped due to flakiness$"),
    ("needs a GPU", r"^CUDA is not available|^Need at least \d+ CUDA device"),
    ("needs nccl", r"^Only N(CCL|ccl) |NCCL (Batch )?Send Recv Only|with NCCL only|one of \{'nccl'\}"),
    ("needs mpi", r"^Only MPI supports"),
    (WORLD_SIZE_RULE, r"world ?size"),
    ("needs torchvision", r"^no torchvision$"),
)

# What only gloo can pass, whatever another backend does.
_GLOO_RULES: Final = (
    (
        "test_monitored_barrier_*",
        "gloo by name",
        "dist.monitored_barrier refuses every other backend by its name; the texts of its errors are gloo's",
    ),
    (
        "test_sparse_all_reduce_sum",
        "sparse tensors",
        "Only Gloo backend supports sparse all reduce",  # the suite's words, which it skips all others with
    ),
)


def exemption_by_text(text: str) -> Exemption | None:
    """For what the suite says where it skips a case; None where no rule knows the text."""
    for rule, pattern in _SUITE_RULES:
        if re.search(pattern, text):
            return Exemption(rule=rule, reason=text)
    return None


def exemption_by_name(case: str, backend: str) -> Exemption | None:
    """For a case that the suite would run."""
    if backend != "gloo":
        for pattern, rule, reason in _GLOO_RULES:
            if fnmatchcase(case, pattern):
                return Exemption(rule=rule, reason=reason)
    return None
