"""torch's reduce operators on the dtypes that they are, and are not, defined for."""

import pytest
import torch
import torch.distributed as dist

from elaswave.comm.operators import average_over, combine_of
from elaswave.errors import ConfigError


def test_a_mean_of_complex_numbers() -> None:
    total = torch.tensor([4 + 8j, 2j])
    finish = average_over(dist.ReduceOp.AVG, total, 4)
    assert finish is not None
    finish()
    assert total.tolist() == [1 + 2j, 0.5j]


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [(dist.ReduceOp.BAND, torch.float32), (dist.ReduceOp.SUM, torch.float8_e4m3fn)],
)
def test_what_is_not_defined_is_refused_before_anything_is_sent(operator: object, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=f"is not defined for {dtype}"):
        combine_of(operator, dtype)
