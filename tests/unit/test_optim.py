"""The optimizer: schedule, groups, and what a non-finite gradient does."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from rove.config.schema import OptimConfig
from rove.errors import RoveError
from rove.training.muon import Muon, orthogonalized
from rove.training.optim import Optimizer, learning_rate_factor, make_optimizer


def test_schedules_warm_up_then_end_at_the_final_fraction():
    for schedule in ("cosine", "linear"):
        config = OptimConfig(warmup=10, schedule=schedule, final_lr_fraction=0.2)
        factors = [learning_rate_factor(step, 110, config) for step in range(111)]
        assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
        assert factors[110] == pytest.approx(0.2)
        assert all(a >= b for a, b in pairwise(factors[10:]))
    half = learning_rate_factor(60, 110, OptimConfig(warmup=10, schedule="cosine", final_lr_fraction=0.0))
    assert half == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))


def test_value_head_has_its_own_rate_and_vectors_do_not_decay():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
    groups = make_optimizer(
        model, OptimConfig(lr=1.0, value_lr=5.0, weight_decay=0.1), model["head"]
    ).param_groups
    found = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert found == {(1.0, 0.1): 1, (1.0, 0.0): 1, (5.0, 0.1): 1, (5.0, 0.0): 1}


def test_muon_trains_the_matrices_of_blocks_and_goes_on_where_it_was_saved():
    """Its steps are orthogonal: all singular values are as large, whatever those of the gradient."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(linear, nn.LayerNorm(16))])
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layers[0](x))

    def make() -> tuple[Net, nn.Linear, Optimizer]:
        model = Net(linear := nn.Linear(8, 16))
        return model, linear, Optimizer(model, OptimConfig(lr=1e-3, muon_lr=0.1, warmup=1), 10, 0)

    def step(model: Net, optimizer: Optimizer, seed: int) -> None:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()

    model, linear, optimizer = make()
    assert optimizer.muon is not None
    (of_muon,) = optimizer.muon.param_groups[0]["params"]
    of_adamw = [p for group in optimizer.adamw.param_groups for p in group["params"]]
    assert of_muon is linear.weight and all(p is not of_muon for p in of_adamw)
    assert len(optimizer.parameters) == 6 == 1 + len(of_adamw)

    before = linear.weight.detach().clone()
    step(model, optimizer, 0)
    values = torch.linalg.svdvals((linear.weight - before).detach())
    assert values.max() / values.min() < 3 and 0.1 < values.mean() < 0.2

    other, beside, again = make()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(model, optimizer, seed)
        step(other, again, seed)
    assert torch.equal(beside.weight, linear.weight)
    assert Optimizer(other, OptimConfig(), 10, 0).muon is None


@pytest.mark.parametrize("rank", [2, 64])
def test_muon_takes_the_steps_of_pytorchs(rank):
    """Tall, wide and square matrices. Where a gradient has nothing in most directions, rounding to bfloat16
    fills them, and makes up a good part of a step."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(64, 64), (96, 64), (64, 64), (64, 96), (96, 64)]
    ours = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    group = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [Muon([{"params": ours, **group}]), torch.optim.Muon([{"params": theirs, **group}])]
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in ours]
        for own, other in zip(ours, theirs, strict=True):
            with torch.no_grad():
                other.copy_(own)
            rows, columns = own.shape
            left, right = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
            own.grad = left @ right
            other.grad = own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for own, other, was in zip(ours, theirs, before, strict=True):
            with torch.no_grad():
                assert (own - other).norm() < 0.02 * (other - was).norm()
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    left_out = nn.Parameter(torch.ones(4, 4))
    Muon([{"params": [left_out], **group}]).step()
    assert torch.equal(left_out, torch.ones(4, 4)), "without a gradient nothing is stepped"


def test_a_cpu_orthogonalises_in_float32():
    """In bfloat16, for which most have no instructions, it takes as long as the rest of a training step; the
    numbers are bfloat16's all the same."""
    matrices = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    found = orthogonalized(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() and values.max() < 1.3
    torch.testing.assert_close(
        orthogonalized(matrices.mT, (3.4445, -4.7750, 2.0315), 5, 1e-7), found.mT, rtol=0, atol=1e-2
    )


def test_non_finite_gradients_are_skipped_then_stop_the_run():
    model = nn.Linear(1, 1)
    optimizer = Optimizer(model, OptimConfig(), total_steps=10, max_bad_steps=2)
    before = model.weight.clone()
    for _ in range(2):
        model.weight.grad = torch.full_like(model.weight, float("nan"))
        model.bias.grad = torch.zeros_like(model.bias)
        assert optimizer.step()[1] is False
    assert torch.equal(model.weight, before)
    model.weight.grad = torch.full_like(model.weight, float("inf"))
    with pytest.raises(RoveError, match=r"up to step \d+, had .*Lower training\.optim\.lr"):
        optimizer.step()


def test_a_good_step_ends_the_streak():
    model = nn.Linear(1, 1)
    optimizer = Optimizer(model, OptimConfig(), total_steps=10, max_bad_steps=1)
    for value in (float("nan"), 1.0, float("nan")):
        model.weight.grad = torch.full_like(model.weight, value)
        optimizer.step()
    assert optimizer.bad_streak == 1


def test_the_rate_is_that_of_the_step_it_describes_and_the_schedule_may_be_given_its_place():
    model = nn.Linear(1, 1)
    config = OptimConfig(lr=1.0, warmup=2, schedule="linear", final_lr_fraction=0.0)
    optimizer = Optimizer(model, config, total_steps=12, max_bad_steps=0)
    seen = []
    for at in (0, 4, 7, 12):  # steps that others would have taken
        model.weight.grad, model.bias.grad = torch.ones_like(model.weight), torch.ones_like(model.bias)
        optimizer.step(at=at)
        seen.append((optimizer.last_lr, optimizer.adamw.param_groups[0]["lr"]))
    assert seen == [(0.5, 0.5), (1.0, 1.0), (0.5, 0.5), (0.0, 0.0)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_ruined_end_the_run(value):
    model = nn.Linear(2, 1)
    optimizer = Optimizer(model, OptimConfig(), total_steps=10, max_bad_steps=2)
    optimizer.check_weights()
    model.weight.data[0, 1] = value
    with pytest.raises(RoveError, match=r"not finite after optimizer step 0; they are not saved"):
        optimizer.check_weights()
