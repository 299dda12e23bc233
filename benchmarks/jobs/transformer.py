"""A decoder-only transformer in plain torch as a list of equal layers, and its data: what all compared systems train.

Shapes in comments: B samples of a micro-batch, T positions, C channels, V = 256 tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from elaswave.core.ids import MicroBatch, Step
from elaswave.core.samples import SampleOrder

TOKENS = 256
LENGTH = 64
HEADS = 4
BLOCKS = 8
MICRO_BATCH = 2
MICRO_BATCHES = 16
SAMPLES = 100_000
LEARNING_RATE = 1e-4
SEED = 1


@dataclass(frozen=True, slots=True)
class Size:
    """A model size: channels, and warm-up and measured steps of one run."""

    channels: int
    warm_up: int
    steps: int


SIZES = {
    "tiny": Size(16, 2, 6),
    "small": Size(72, 5, 40),
    "medium": Size(288, 6, 8),
}
"""small: 0.5 million parameters. medium: 8.1 million. tiny: for a look whether everything runs."""


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, (B, T, C) -> (B, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.attention_out = nn.Linear(channels, channels)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 4 * channels)
        self.down = nn.Linear(4 * channels, channels)

    def forward(self, stream: Tensor) -> Tensor:
        batch, length, channels = stream.shape
        packed = self.query_key_value(self.attention_norm(stream))
        query, key, value = packed.view(batch, length, 3, HEADS, channels // HEADS).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.attention_out(attended.transpose(1, 2).reshape(batch, length, channels))
        stream = stream + self.down(functional.gelu(self.up(self.feed_forward_norm(stream))))
        return stream


class First(nn.Module):
    """Embedding and a block, tokens (B, T) -> (B, T, C): so that all layers cost about the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.token = nn.Embedding(TOKENS, channels)
        self.position = nn.Embedding(LENGTH, channels)
        self.block = Block(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        stream: Tensor = self.block(self.token(tokens) + self.position.weight)
        return stream


class Last(nn.Module):
    """A block and the scores of the next token, (B, T, C) -> (B, T, V)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = Block(channels)
        self.norm = nn.LayerNorm(channels)
        self.scores = nn.Linear(channels, TOKENS, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        scores: Tensor = self.scores(self.norm(self.block(stream)))
        return scores


def layer_factories(channels: int) -> list[Callable[[], nn.Module]]:
    """One factory per layer; layers of one size cost the same, so every division into stages is even."""
    return [lambda: First(channels), *[lambda: Block(channels)] * (BLOCKS - 2), lambda: Last(channels)]


def next_token_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy; scores (B, T, V), target (B, T)."""
    return functional.cross_entropy(scores.flatten(0, 1), target.flatten())


class RandomTokens:
    """Map-style data set of tokens made from the index, (T,) and (T,); costs microseconds an item."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * 2_654_435_761 % TOKENS
        tokens = (torch.arange(LENGTH + 1) * (index % 13 + 1) + start) % TOKENS
        return tokens[:-1], tokens[1:]


def micro_batches_of(step: int, micro_batches: range) -> Iterator[tuple[Tensor, Tensor]]:
    """(input, target) of these micro-batches, (B, T) each: the same samples that ElasWave draws for the step."""
    data = RandomTokens()
    order = SampleOrder(seed=SEED, samples=SAMPLES, global_batch=MICRO_BATCHES * MICRO_BATCH, micro_batch=MICRO_BATCH)
    for micro_batch in micro_batches:
        samples = [data[int(index)] for index in order.sample_ids(Step(step), MicroBatch(micro_batch))]
        yield torch.stack([sample[0] for sample in samples]), torch.stack([sample[1] for sample in samples])
