"""Jobs that train, with DDP, FSDP2 and DTensor, while ranks are lost."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from elaswave.comm.process_group import ElasticProcessGroup, forget_step
from elaswave.errors import EpochChanged
from tests.comm.process_group_place import IN_AGREEMENT, Place, die_after, job, joined

STEPS = 5
WIDTH = 96  # 9216 weights of float64 go round a ring


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(4)])


def batch_of(worker: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + worker)
    return torch.randn(6, WIDTH, dtype=torch.float64, generator=generator)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.flip(1)).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def oracle(history: list[list[int]]) -> dict[str, Tensor]:
    """Weights after steps whose gradient is the mean over these workers' batches, computed alone."""
    model = model_of()
    optimizer = sgd(model)
    for step, workers in enumerate(history):
        optimizer.zero_grad()
        torch.stack([loss_of(model, batch_of(worker, step)) for worker in workers]).mean().backward()
        optimizer.step()
    return model.state_dict()


def agrees(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)


@job
def fsdp2_and_checkpoint(place: Place) -> object:
    with joined(place):
        mesh = init_device_mesh("cpu", (place.size,))
        model = sharded(model_of(), mesh)
        optimizer = sgd(model)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, batch_of(place.rank, step)).backward()
            optimizer.step()
        expected = oracle([list(range(place.size))] * 3)
        agrees(full_state(model), expected)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(state, checkpoint_id=str(place.folder / "checkpoint"))
        other = sharded(model_of(seed=1), mesh)
        loaded = {"model": other.state_dict()}
        checkpoint.load(loaded, checkpoint_id=str(place.folder / "checkpoint"))
        other.load_state_dict(loaded["model"])
        agrees(full_state(other), expected)
    return True


def sharded(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True)
    return {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=options).items()}


def members(group: ElasticProcessGroup) -> list[int]:
    return list(group._group.communicator.members)


class Trainer(Protocol):
    """How a kind of parallel training makes a step, and what it does after a loss."""

    def step(self, worker: int, step: int) -> None: ...

    def lost(self) -> None: ...

    def check(self, history: list[list[int]]) -> None:
        """Compare the weights with those of an undisturbed run, alone, in which these were the members of each step."""


class WithDdp:
    def __init__(self, **options: bool) -> None:
        self.model = DistributedDataParallel(model_of(), bucket_cap_mb=0.1, **options)
        self.optimizer = sgd(self.model)

    def step(self, worker: int, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch_of(worker, step)).backward()
        self.optimizer.step()

    def lost(self) -> None:
        forget_step(self.model)
        assert all(parameter.grad is None for parameter in self.model.parameters())

    def check(self, history: list[list[int]]) -> None:
        agrees(self.model.module.state_dict(), oracle(history))


class WithFsdp:
    """What the dead rank had is lost: all go back to the full state that each has kept of the step before."""

    def __init__(self) -> None:
        self.kept: tuple[dict[str, Any], dict[str, Any] | None] = (model_of().state_dict(), None)
        self.lost()

    def lost(self) -> None:
        weights, momenta = self.kept
        self.model = sharded(model_of(seed=1), init_device_mesh("cpu", (dist.get_world_size(),)))
        self.optimizer = sgd(self.model)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, dict(weights), options=options)
        if momenta is not None:
            set_optimizer_state_dict(self.model, self.optimizer, deepcopy(momenta), options=options)

    def step(self, worker: int, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, batch_of(worker, step)).backward()
        self.optimizer.step()
        options = StateDictOptions(full_state_dict=True)
        momenta = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        self.kept = full_state(self.model), deepcopy(momenta)

    def check(self, history: list[list[int]]) -> None:
        agrees(full_state(self.model), oracle(history))


class WithDTensor:
    """Replicated weights and one batch in shards, whoever is there: an undisturbed run alone is the same."""

    def __init__(self) -> None:
        self.weights = model_of().state_dict()
        self.lost()

    def lost(self) -> None:
        """A mesh of the survivors, around the weights that each has."""
        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = model_of(seed=1)
        model.load_state_dict(self.weights)
        self.model = distribute_module(model, self.mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)

    def step(self, worker: int, step: int) -> None:
        batch = distribute_tensor(self.whole(step), self.mesh, [Shard(0)])
        self.optimizer.zero_grad()
        loss_of(self.model, batch).backward()
        for parameter in self.model.parameters():
            gradient = parameter.grad
            assert isinstance(gradient, DTensor)
            parameter.grad = gradient.redistribute(placements=[Replicate()])
        self.optimizer.step()
        self.weights = full_state(self.model)

    def whole(self, step: int) -> Tensor:
        return torch.cat([batch_of(0, step), batch_of(1, step)])

    def check(self, history: list[list[int]]) -> None:
        model = model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(len(history)):
            optimizer.zero_grad()
            loss_of(model, self.whole(step)).backward()
            optimizer.step()
        agrees(self.weights, model.state_dict())


TRAINERS: dict[str, Callable[..., Trainer]] = {"ddp": WithDdp, "fsdp2": WithFsdp, "dtensor": WithDTensor}


@job
def trains_on(place: Place) -> object:
    """STEPS steps on whoever is left; returns the members of each. "losses" are [worker, step, lines]."""
    history: list[list[int]] = []
    with joined(place) as group:
        trainer = TRAINERS[place.arguments["trainer"]](**place.arguments.get("options", {}))
        while len(history) < STEPS:
            for worker, step, lines in place.arguments["losses"]:
                # This rank may hear of the loss before it has begun the step, so it waits for that early.
                begins = 0 if lines == IN_AGREEMENT else step
                if (worker, begins) == (place.rank, len(history)):
                    die_after(group, lines)
            try:
                with group.guard():
                    present = members(group)
                    trainer.step(place.rank, len(history))
                history.append(present)
            except EpochChanged:
                group.reconfigure()
                trainer.lost()
        assert dist.get_world_size() == len(history[-1])
        assert dist.get_process_group_ranks(group) == list(range(dist.get_world_size()))
        trainer.check(history)
        dist.barrier()
    return history


@job
def powersgd(place: Place) -> object:
    """A communication hook whose callbacks wait for collectives of their own."""
    with joined(place):
        plain = model_of()
        model = DistributedDataParallel(deepcopy(plain))  # one bucket: of several, ranks could take turns differently
        state = PowerSGDState(process_group=None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook)
        for step in range(STEPS):
            model.zero_grad()
            model(batch_of(place.rank, step)).square().mean().backward()
        torch.stack([plain(batch_of(worker, step)).square().mean() for worker in range(place.size)]).mean().backward()
        # Biases are not compressed; what PowerSGD makes of the weights is its own affair, but the same on all ranks.
        for name, found in model.module.named_parameters():
            assert found.grad is not None
            if name.endswith("bias"):
                torch.testing.assert_close(found.grad, plain.get_parameter(name).grad)
            others = [torch.empty_like(found.grad) for _ in range(place.size)]
            dist.all_gather(others, found.grad)
            assert all(torch.equal(other, found.grad) for other in others)
    return True
