"""Tensors as bytes of host memory: every type, the memory shared."""

import pytest
import torch

from elaswave.runtime.codec import bytes_of_tensor

TYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex128,
)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (3, 5), (0, 2)], ids=str)
def test_bytes_are_those_of_the_elements_in_row_major_order(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    expected = b"".join(bytes(element.reshape(1).view(torch.uint8).tolist()) for element in tensor.flatten())

    assert bytes(bytes_of_tensor(tensor)) == expected


def test_memory_is_shared_and_may_need_a_gradient() -> None:
    tensor = torch.zeros(4, requires_grad=True)
    view = bytes_of_tensor(tensor)

    with torch.no_grad():
        tensor.fill_(1.0)

    assert torch.frombuffer(bytearray(view), dtype=torch.float32).tolist() == [1.0] * 4
