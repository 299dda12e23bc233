"""Training in one process: independent of the pretended layout, and right by torch's own account."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from numerics_harness import TIED, Tokens, next_token_loss, small_job
from torch import Tensor, nn

from elaswave.core.events import StepResult
from elaswave.core.ids import Layer
from elaswave.core.samples import SampleOrder
from elaswave.errors import ConfigError, NonFiniteError, UserCodeError
from elaswave.job import SGD, AdamW, Job, WarmupLinear
from elaswave.runtime.description import build_layer
from elaswave.runtime.evaluation import Evaluation
from elaswave.runtime.reference import ReferenceLayout, ReferenceResult, train_reference

LAYOUTS = [
    ReferenceLayout(cuts=(2,), replicas=2, shards=3),
    ReferenceLayout(cuts=(1, 2, 3), replicas=4, shards=7),
    ReferenceLayout(cuts=(3,), replicas=3),
]
VARIANTS = {
    "plain": {},
    "clipped": {"clip_norm": 0.1, "optimizer": SGD(lr=0.1, momentum=0.9, weight_decay=0.01)},
    "tied": {"tied": TIED, "recompute": True},
    "bfloat16": {"parameter_dtype": "bfloat16", "tied": TIED, "clip_norm": 0.5},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_layout_does_not_show(name: str) -> None:
    job = small_job(**VARIANTS[name])
    expected = train_reference(job)
    assert len(set(expected.losses)) == 2
    for layout in LAYOUTS:
        assert train_reference(job, layout) == expected


def test_recomputation_does_not_show() -> None:
    assert train_reference(small_job(recompute=True)) == train_reference(small_job())


def test_with_float32_sums_the_layout_does_show() -> None:
    # The comparison above can fail: plain sums depend on who added what.
    job = small_job(accumulation="float32")
    digests = {train_reference(job, layout).digest for layout in [ReferenceLayout(), *LAYOUTS]}
    assert len(digests) > 1


def test_a_longer_run_passes_through_the_same_parameters() -> None:
    results: list[ReferenceResult] = [train_reference(small_job(steps=steps)) for steps in (1, 3)]
    assert results[1].steps[:1] == results[0].steps
    assert results[0].digest != results[1].digest


# ------------------------------------------------------------------ torch's own account


def plain_job(**changes: object) -> Job:
    """Without dropout, so that a plain training loop can follow; samples depend on the index only."""
    layers = [
        lambda: nn.Embedding(32, 16), lambda: nn.LayerNorm(16), lambda: nn.Linear(16, 32), nn.GELU,
        lambda: nn.Linear(32, 32),
    ]  # fmt: skip
    return small_job(layers=layers, data=Fixed(), steps=6, **changes)


class Fixed(Tokens):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 32, (9,), generator=torch.Generator().manual_seed(index))
        return tokens[:-1], tokens[1:]


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({"optimizer": AdamW(lr=1e-2, weight_decay=0.1)}, lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        ({"optimizer": SGD(lr=0.5, momentum=0.9)}, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9)),
    ],
)
def test_a_plain_training_loop_agrees(
    changes: dict[str, object], make: Callable[[object], torch.optim.Optimizer]
) -> None:
    job = plain_job(clip_norm=0.2, schedule=WarmupLinear(total_steps=6, warmup_steps=2), **changes)
    ours = train_reference(job, ReferenceLayout(cuts=(2,), replicas=2, shards=2))
    model = nn.Sequential(*(build_layer(job, Layer(index)) for index in range(5)))
    optimizer = make(model.parameters())
    theirs = []
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = job.learning_rate(step)
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches(job, step):
            loss = next_token_loss(model(batch[0]), batch[1]) / job.micro_batches
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        theirs.append((total.item(), norm.item()))
    found = [(result.loss, result.grad_norm) for result in ours.steps]
    assert torch.allclose(torch.tensor(found), torch.tensor(theirs), rtol=1e-4)
    assert found[0][1] > 0.2
    assert len(set(found)) == job.steps


def batches(job: Job, step: int) -> list[tuple[Tensor, Tensor]]:
    order = SampleOrder(seed=job.seed, samples=64, global_batch=8, micro_batch=2)
    found = []
    for micro_batch in range(4):
        samples = [job.data[int(index)] for index in order.sample_ids(step, micro_batch)]
        found.append((torch.stack([one for one, _ in samples]), torch.stack([two for _, two in samples])))
    return found


def test_the_digest_is_what_its_description_says() -> None:
    job = small_job(steps=1, tied=TIED, parameter_dtype="bfloat16")
    seen: list[Evaluation] = []
    watched = small_job(steps=1, tied=TIED, parameter_dtype="bfloat16", evaluate=seen.append, evaluate_every=1)
    result = train_reference(watched)
    digest = hashlib.sha256()
    for layer, module in enumerate(seen[0].layers):
        for name, parameter in module.named_parameters():
            digest.update(f"{layer} {name}\n".encode())
            digest.update(parameter.detach().contiguous().view(torch.int16).numpy().astype("<i2").tobytes())
    assert result.digest == digest.hexdigest() == train_reference(job).digest


# ------------------------------------------------------------------ what is not finite


def spoilt_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Infinite for the micro-batches whose first sample starts with a token below 8."""
    return next_token_loss(scores, target) * (float("inf") if target.sum() % 5 == 0 else 1.0)


def test_a_bad_loss_ends_the_job_or_skips_the_step() -> None:
    with pytest.raises(NonFiniteError, match=r"step \d+: the output of layer 3 for micro-batch \d is infinite"):
        train_reference(small_job(steps=8, loss=spoilt_loss))
    job = small_job(steps=8, loss=spoilt_loss, non_finite="skip-step")
    digests: list[str] = []
    result = train_reference(job)
    skipped = [step.skipped for step in result.steps]
    assert True in skipped
    assert False in skipped
    for layout in LAYOUTS:
        assert train_reference(job, layout) == result
    first = skipped.index(True)
    for steps in (first, first + 1):
        digests.append(train_reference(small_job(steps=steps or 1, loss=spoilt_loss, non_finite="skip-step")).digest)
    if first:
        assert digests[0] == digests[1]


class SpoilGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


class Spoiler(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return SpoilGradient.apply(value)


def test_a_bad_gradient_is_found_behind_a_good_loss() -> None:
    layers = [lambda: nn.Embedding(32, 16), Spoiler, lambda: nn.Linear(16, 32)]
    with pytest.raises(NonFiniteError, match="step 0: a gradient is infinite or not a number"):
        train_reference(small_job(layers=layers))
    result = train_reference(small_job(layers=layers, non_finite="skip-step"))
    assert all(step.skipped for step in result.steps)


# ------------------------------------------------------------------ callbacks


def test_callbacks_are_called_in_order_and_change_nothing() -> None:
    def on_step(result: StepResult) -> str | None:
        torch.rand(3)
        return f"step {result.step}" if result.step else None

    def evaluate(found: Evaluation) -> str:
        tokens, _ = Tokens()[3]
        with_dropout_off = [found.forward(tokens[None]) for _ in range(2)]
        assert torch.equal(*with_dropout_off)
        assert not with_dropout_off[0].requires_grad
        assert not any(layer.training for layer in found.layers)
        return f"evaluated {found.step}"

    plain = train_reference(small_job(steps=4))
    result = train_reference(small_job(steps=4, on_step=on_step, evaluate=evaluate, evaluate_every=2))
    assert result.lines == ("step 1", "evaluated 1", "step 2", "step 3", "evaluated 3")
    assert (result.steps, result.digest) == (plain.steps, plain.digest)
    assert [step.tokens for step in result.steps] == [64] * 4


def test_a_callback_that_raises_is_named() -> None:
    def fails(found: object) -> str:
        raise RuntimeError("full disk")

    with pytest.raises(UserCodeError, match="on_step raised RuntimeError: full disk"):
        train_reference(small_job(on_step=fails))
    with pytest.raises(UserCodeError, match="evaluate raised RuntimeError: full disk"):
        train_reference(small_job(evaluate=fails, evaluate_every=1))


def test_cuts_must_fit() -> None:
    for cuts in ((0,), (4,), (2, 2), (3, 1)):
        with pytest.raises(ConfigError, match="must ascend between 1 and 3"):
            train_reference(small_job(), ReferenceLayout(cuts=cuts))
