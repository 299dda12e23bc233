"""Keys of random generators: a hash of what is run, never of who runs it or when.

Keys are 64-bit. A CPU generator (Mersenne twister) uses only the low 32 bits of its seed, so among about 77,000 keys
two are expected to start the same stream there; CUDA's generator uses all 64 bits. Streams that start alike are
harmless for dropout and the like, and they are alike in every layout.
"""

import hashlib
import struct
from typing import Final

from elaswave.core.ids import Layer, MicroBatch, Step

_PACKERS: Final = tuple(struct.Struct(f"<{parts}q").pack for parts in range(6))


def layer_key(seed: int, step: Step, layer: Layer, micro_batch: MicroBatch, *, tp_rank: int = 0) -> int:
    """Key for the forward pass of one layer on one micro-batch, and for its recomputation."""
    return _key(b"forward", seed, step, layer, micro_batch, tp_rank)


def backward_key(seed: int, step: Step, layer: Layer, micro_batch: MicroBatch, *, tp_rank: int = 0) -> int:
    """Key for the backward pass of one layer on one micro-batch; only own autograd functions draw numbers there."""
    return _key(b"backward", seed, step, layer, micro_batch, tp_rank)


def sample_key(seed: int, sample: int) -> int:
    """Key for loading one sample: the same in every pass over the data."""
    return _key(b"sample", seed, sample)


def init_key(seed: int, layer: Layer) -> int:
    """Key for building one layer."""
    return _key(b"init", seed, layer)


def order_key(seed: int, pass_number: int) -> int:
    """Key of the order of samples in one pass over the data."""
    return _key(b"order", seed, pass_number)


def evaluation_key(seed: int, step: Step) -> int:
    """Key for the evaluation after one step."""
    return _key(b"evaluation", seed, step)


def _key(label: bytes, *parts: int) -> int:
    packed = _PACKERS[len(parts)](*parts)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=label).digest(), "little")
