"""Identifiers of the data model, one distinct type each."""

from typing import NewType

WorkerId = NewType("WorkerId", int)
"""One process driving one device. Given by the controller in order of admission, never used again."""

NodeId = NewType("NodeId", str)
"""One machine, or one emulated machine: the failure domain of its workers."""

Epoch = NewType("Epoch", int)
"""Number of a plan; rises by one with every plan."""

Step = NewType("Step", int)
"""Training step, from 0. A worker is at step k when all steps before k are decided for it."""

Layer = NewType("Layer", int)
"""Index of a layer, 0 to L - 1: the smallest movable piece of the model."""

MicroBatch = NewType("MicroBatch", int)
"""Index of a micro-batch within the global batch, 0 to M - 1."""

BlockId = NewType("BlockId", int)
"""Index of a parameter block: the flat parameters of one layer, or of one tied parameter."""

ShardId = NewType("ShardId", int)
"""Index of a shard: a slice of one block, the unit of optimizer state."""

Coverage = NewType("Coverage", int)
"""Set of micro-batches as a bit mask: bit m stands for micro-batch m."""
