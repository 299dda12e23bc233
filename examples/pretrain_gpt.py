"""Pre-train a small decoder-only transformer on bytes of real text.

    elaswave-launch --standalone --nproc-per-node 8 --dp 4 --pp 2 examples/pretrain_gpt.py --steps 100
    python examples/pretrain_gpt.py --steps 20            # the same training in one process: same losses, same digest

Text: --data FILE or FOLDER; without it the sources of the Python standard library, up to 4 MB of them.

Shapes in comments: B samples, T positions, C channels (--hidden), V = 256 byte values.
"""

import argparse
import math
import sysconfig
from bisect import bisect_right
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import elaswave as ew

VOCABULARY = 256
DEFAULT_TEXT_BYTES = 4_000_000


# ------------------------------------------------------------------ the model, as a list of layers


class Embedding(nn.Module):
    """Bytes (B, T) to channels (B, T, C)."""

    def __init__(self, hidden: int, length: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, hidden)
        self.position = nn.Embedding(length, hidden)
        self.dropout = nn.Dropout(dropout)
        for part in (self.token, self.position):
            nn.init.normal_(part.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T), int64 -> (B, T, C)."""
        stream: Tensor = self.dropout(self.token(tokens) + self.position.weight[: tokens.shape[1]])
        return stream


class Block(nn.Module):
    """Causal self-attention and a feed-forward part, each behind a norm and beside a residual."""

    def __init__(self, hidden: int, heads: int, dropout: float, depth: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attention_out = nn.Linear(hidden, hidden)
        self.feed_forward_norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        for part in (self.query_key_value, self.attention_out, self.up, self.down):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
        # The residual stream is a sum over 2 * depth branches: keep its variance independent of the depth.
        for part in (self.attention_out, self.down):
            nn.init.normal_(part.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, stream: Tensor) -> Tensor:
        """stream (B, T, C) -> (B, T, C)."""
        batch, length, hidden = stream.shape
        packed = self.query_key_value(self.attention_norm(stream))
        query, key, value = packed.view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, length, hidden)
        stream = stream + self.dropout(self.attention_out(attended))
        stream = stream + self.dropout(self.down(functional.gelu(self.up(self.feed_forward_norm(stream)))))
        return stream


class Head(nn.Module):
    """Channels (B, T, C) to scores of the next byte (B, T, V)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.projection = nn.Linear(hidden, VOCABULARY, bias=False)
        nn.init.normal_(self.projection.weight, std=0.02)

    def forward(self, stream: Tensor) -> Tensor:
        """stream (B, T, C) -> (B, T, V)."""
        scores: Tensor = self.projection(self.norm(stream))
        return scores


def next_byte_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte. scores (B, T, V), target (B, T)."""
    return functional.cross_entropy(scores.float().flatten(0, 1), target.flatten())


# ------------------------------------------------------------------ the text


class Text:
    """Bytes of files, one after the other; read where they are asked for."""

    def __init__(self, files: list[Path], limit: int | None = None) -> None:
        """Looks at sizes only. `limit`: bytes to use at most."""
        sizes = [file.stat().st_size for file in files]
        self._files = [file for file, size in zip(files, sizes, strict=True) if size]
        self._starts = [0, *accumulate(size for size in sizes if size)]
        self._opened: dict[int, NDArray[np.uint8]] = {}
        self.size = self._starts[-1] if limit is None else min(limit, self._starts[-1])

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Bytes `start` to `stop` (exclusive)."""
        first, last = bisect_right(self._starts, start) - 1, bisect_right(self._starts, stop - 1) - 1
        parts = [
            self._open(index)[max(0, start - self._starts[index]) : stop - self._starts[index]]
            for index in range(first, last + 1)
        ]
        return np.concatenate(parts).astype(np.int64)

    def _open(self, index: int) -> NDArray[np.uint8]:
        found = self._opened.get(index)
        if found is None:
            found = self._opened[index] = np.memmap(self._files[index], dtype=np.uint8, mode="r")
        return found


class Windows:
    """Map-style data set: windows of `length` bytes, and the same shifted by one as target."""

    def __init__(self, text: Text, length: int) -> None:
        self._text = text
        self._length = length

    def __len__(self) -> int:
        return max(0, (self._text.size - 1) // self._length)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self._length
        window = torch.from_numpy(self._text.read(start, start + self._length + 1))
        return window[:-1], window[1:]


def open_text(data: str | None) -> Text:
    """The text at this path, or the default one. Raises ew.ConfigError, naming the path, where there is none."""
    if data is None:
        return Text(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), DEFAULT_TEXT_BYTES)
    path = Path(data)
    try:
        files = sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]
        text = Text(files)
        if text.size:
            text.read(0, 1)
    except OSError as error:
        raise ew.ConfigError(f"--data {data}: {error.strerror}; give a readable file or folder of text") from error
    if text.size == 0:
        raise ew.ConfigError(f"--data {data}: there is no text in it; give a file or folder that is not empty")
    return text


# ------------------------------------------------------------------ the job


class Parser(argparse.ArgumentParser):
    """Reports mistakes as ConfigError, so that a launched job shows one line instead of one usage text per worker."""

    def error(self, message: str) -> NoReturn:
        raise ew.ConfigError(f"{self.prog}: {message}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises ew.ConfigError."""
    parser = Parser(prog="pretrain_gpt.py", description="Pre-train a small GPT on bytes of text.")
    parser.add_argument("--data", metavar="PATH", help="file or folder of text (default: Python's standard library)")
    parser.add_argument("--layers", type=int, default=4, help="transformer blocks (default: 4)")
    parser.add_argument("--hidden", type=int, default=128, help="channels (default: 128)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default: 4)")
    parser.add_argument("--seq", type=int, default=128, help="bytes per sample (default: 128)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument("--global-batch", type=int, default=32, help="samples per step (default: 32)")
    parser.add_argument("--micro-batch", type=int, default=2, help="samples per micro-batch (default: 2)")
    parser.add_argument("--dropout", type=float, default=0.1, help="dropout probability (default: 0.1)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, help="decides everything random (default: 0)")
    parser.add_argument("--tie-embeddings", action="store_true", help="share the weights of embedding and head")
    parser.add_argument("--recompute", action="store_true", help="keep only the inputs of layers for backward")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of parameters")
    parser.add_argument("--accumulation", choices=("exact64", "float32"), default="exact64", help="gradient sums")
    parser.add_argument("--clip-norm", type=float, default=1.0, help="limit of the gradient norm, 0: none (default: 1)")
    options = parser.parse_args(arguments)
    for name in ("layers", "hidden", "heads", "seq", "steps"):
        if getattr(options, name) < 1:
            raise ew.ConfigError(f"--{name} {getattr(options, name)}: must be at least 1")
    if options.hidden % options.heads:
        raise ew.ConfigError(f"--hidden {options.hidden} is not divisible by --heads {options.heads}")
    if not 0 <= options.dropout < 1:
        raise ew.ConfigError(f"--dropout {options.dropout}: must be from 0 to below 1")
    return options


def make_job(options: argparse.Namespace) -> ew.Job:
    """What is to be trained. Raises ew.ConfigError."""
    text = open_text(options.data)
    data = Windows(text, options.seq)
    if len(data) < options.global_batch:
        raise ew.ConfigError(
            f"--data {options.data or 'standard library'}: {text.size} bytes make {len(data)} samples of --seq "
            f"{options.seq}, fewer than --global-batch {options.global_batch}"
        )
    block = partial(Block, options.hidden, options.heads, options.dropout, options.layers)
    head = options.layers + 1
    return ew.Job(
        layers=[
            partial(Embedding, options.hidden, options.seq, options.dropout),
            *[block] * options.layers,
            partial(Head, options.hidden),
        ],
        loss=next_byte_loss,
        data=data,
        optimizer=ew.AdamW(lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=ew.WarmupCosine(total_steps=options.steps, warmup_steps=min(20, options.steps // 5)),
        global_batch=options.global_batch,
        micro_batch=options.micro_batch,
        steps=options.steps,
        seed=options.seed,
        clip_norm=options.clip_norm or None,
        tied=[[(0, "token.weight"), (head, "projection.weight")]] if options.tie_embeddings else (),
        recompute=options.recompute,
        parameter_dtype=options.dtype,
        accumulation=options.accumulation,
    )


if __name__ == "__main__":
    ew.train(make_job(parse()))
