"""Updates of shards: elementwise, every multiplication and addition rounded by itself.

A fused multiply-add rounds once, and which of torch's add with alpha, addcmul, addcdiv or lerp use it differs between
code paths and devices. So none of them is used: owner, replica, any slicing, CPU and GPU give the same bits.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elaswave.core.exact import Exact, exact_to_float
from elaswave.core.facts import Decision
from elaswave.core.ids import Step
from elaswave.errors import NonFiniteError
from elaswave.job import SGD, AdamW, Job, Optimizer
from elaswave.runtime.kernels import KERNELS, Kernels, addresses
from elaswave.runtime.shards import ShardState, check_gradient

PIECE_ELEMENTS: Final = 32768
"""Elements per pass: 768 KiB of state, gradient and scratch. 8192 took 1.3 to 2.2 times as long, for its calls."""

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What is the same for all shards of a step. `skip`: parameters and moments stay as they are."""

    step: Step
    learning_rate: float
    gradient_scale: float
    skip: bool = False


def update_of(job: Job, decision: Decision) -> Update:
    """How the decided step changes the parameters: a function of job and decision only.

    Raises NonFiniteError, naming step, micro-batch and layer, where the loss or a gradient is not finite and the job's
    policy is "raise".
    """
    found = decision.loss.non_finite
    skip = found is not None or not decision.finite
    if skip and job.non_finite == "raise":
        place = (
            "a gradient" if found is None else f"the output of layer {found.layer} for micro-batch {found.micro_batch}"
        )
        raise NonFiniteError(
            f"step {decision.step}: {place} is infinite or not a number; "
            f'lower the learning rate, set clip_norm, or choose non_finite="skip-step"'
        )
    return Update(
        step=decision.step,
        learning_rate=job.learning_rate(decision.step),
        gradient_scale=clip_scale(decision.norm_squared, job.clip_norm),
        skip=skip,
    )


def gradient_norm(norm_squared: Exact) -> float:
    """2-norm from the exact sum of squares: two correctly rounded operations."""
    return math.sqrt(exact_to_float(norm_squared))


def clip_scale(norm_squared: Exact, clip_norm: float | None) -> float:
    """What gradients are multiplied by, so that their 2-norm is at most `clip_norm`."""
    if clip_norm is None:
        return 1.0
    norm = gradient_norm(norm_squared)
    return clip_norm / norm if norm > clip_norm else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Equal slices of a shard's vectors, and scratch of the same length. `gradient` may lie in `first`."""

    master: Vector
    moments: list[Vector]
    gradient: Vector
    first: Vector
    second: Vector


class Updater:
    """Applies updates of one optimizer; owns the scratch memory for it, so for one thread.

    AdamW is compiled where kernels are, one pass. Else numpy, not torch: the same IEEE operations, and its calls cost a
    fifth, which matters for pieces that stay in cache.
    """

    def __init__(self, optimizer: Optimizer, *, kernels: Kernels | None = KERNELS) -> None:
        self._optimizer = optimizer
        self._kernels = kernels
        self._scratch = np.empty((2, PIECE_ELEMENTS), dtype=np.float32)

    def apply(self, state: ShardState, gradient: Tensor, update: Update) -> None:
        """Update master values and moments in place. `gradient`: float32 mean gradient of the shard, not changed.

        Raises InvariantError where the gradient does not fit the state.
        """
        check_gradient(state, gradient)
        if update.skip:
            return
        if self._kernels is not None and isinstance(self._optimizer, AdamW):
            vectors = addresses([state.master, *state.moments, gradient], torch.float32, state.elements)
            constants = np.array(_adamw_constants(self._optimizer, update), dtype=np.float32).tobytes()
            self._kernels.adamw(vectors, state.elements, constants)
            return
        master, given = state.master.numpy(), gradient.numpy()
        moments = [moment.numpy() for moment in state.moments]
        # Values beyond float32 become infinite, and the next step's loss tells.
        with np.errstate(all="ignore"):
            for start in range(0, state.elements, PIECE_ELEMENTS):
                where = slice(start, start + PIECE_ELEMENTS)
                piece = self._piece(master[where], [moment[where] for moment in moments], given[where], update)
                if isinstance(self._optimizer, AdamW):
                    _adamw(self._optimizer, update, piece)
                else:
                    _sgd(self._optimizer, update, piece)

    def _piece(self, master: Vector, moments: list[Vector], given: Vector, update: Update) -> _Piece:
        first, second = self._scratch[0, : given.size], self._scratch[1, : given.size]
        scaled = given if update.gradient_scale == 1.0 else np.multiply(given, np.float32(update.gradient_scale), first)
        return _Piece(master=master, moments=moments, gradient=scaled, first=first, second=second)


def _adamw_constants(settings: AdamW, update: Update) -> tuple[float, ...]:
    """Scale of the gradient, beta1, 1 - beta1, beta2, 1 - beta2, 1 / sqrt(correction2), epsilon, rate, decay."""
    beta1, beta2 = settings.betas
    # The number of the step, not of updates: a skipped step leaves nothing behind that later ones would depend on.
    count = update.step + 1
    correction1, correction2 = 1 - beta1**count, 1 - beta2**count
    rate, decay = update.learning_rate / correction1, 1 - update.learning_rate * settings.weight_decay
    inverse_root = 1 / math.sqrt(correction2)
    return update.gradient_scale, beta1, 1 - beta1, beta2, 1 - beta2, inverse_root, settings.eps, rate, decay


def _adamw(settings: AdamW, update: Update, piece: _Piece) -> None:
    average, square_average = piece.moments
    first, second, master = piece.first, piece.second, piece.master
    constants = map(np.float32, _adamw_constants(settings, update))
    _, beta1, rest1, beta2, rest2, inverse_root, epsilon, rate, decay = constants
    np.multiply(piece.gradient, piece.gradient, second)
    np.multiply(second, rest2, second)
    np.multiply(square_average, beta2, square_average)
    np.add(square_average, second, square_average)
    np.multiply(piece.gradient, rest1, first)
    np.multiply(average, beta1, average)
    np.add(average, first, average)
    np.sqrt(square_average, second)
    np.multiply(second, inverse_root, second)
    np.add(second, epsilon, second)
    np.multiply(average, rate, first)
    np.divide(first, second, first)
    np.multiply(master, decay, master)
    np.subtract(master, first, master)


def _sgd(settings: SGD, update: Update, piece: _Piece) -> None:
    direction = piece.gradient
    if settings.weight_decay:
        np.multiply(piece.master, np.float32(settings.weight_decay), piece.second)
        direction = np.add(piece.second, direction, piece.second)
    if settings.momentum:
        (velocity,) = piece.moments
        np.multiply(velocity, np.float32(settings.momentum), velocity)
        direction = np.add(velocity, direction, velocity)
    np.multiply(direction, np.float32(update.learning_rate), piece.first)
    np.subtract(piece.master, piece.first, piece.master)
