"""The digest that two runs are compared by."""

import hashlib
from collections.abc import Callable

from torch import Tensor

from elaswave.core.ids import BlockId
from elaswave.core.parameters import BlockLayout
from elaswave.runtime.description import bytes_of
from elaswave.runtime.model import view_of


def parameters_digest(layout: BlockLayout, block: Callable[[BlockId], Tensor]) -> str:
    """sha256 (hex) over all trained parameters in canonical order.

    For each layer, ascending, and each of its parameters, in the order of named_parameters: the text "LAYER NAME\\n" in
    UTF-8, then the values' little-endian bytes in parameter dtype, row-major, without padding. A tied parameter counts
    at each of its layers. `block` gives a block's flat parameters.
    """
    digest = hashlib.sha256()
    for (layer, name), place in layout.placements.items():
        digest.update(f"{layer} {name}\n".encode())
        digest.update(bytes_of(view_of(block(place.block), place)))
    return digest.hexdigest()
