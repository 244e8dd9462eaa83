"""Training on a `TrainBatch` in optimizer steps.

Gradients are accumulated over micro-batches under whole-batch denominators, so the micro-batch size changes
memory, not the gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rove import transfer
from rove.algorithms import Algorithm
from rove.config.needs import needs, optimizer_steps
from rove.config.schema import Run
from rove.errors import RoveError, nearest
from rove.policies.base import Policy
from rove.runtime.pulse import headway
from rove.training.deal import OptimizerStep, Share, deal, schedule
from rove.training.optim import Optimizer
from rove.training.parallel import ParallelModel, Ranks, gather_full
from rove.training.reference import Reference
from rove.types import PolicyOutput, TrainBatch


def freeze(module: nn.Module, beginnings: Sequence[str], setting: str) -> None:
    """Freeze the parameters whose names begin with one of `beginnings`. RoveError where one matches none."""
    for beginning in beginnings:
        found = [p for name, p in module.named_parameters() if name.startswith(beginning)]
        if not found:
            parts = {".".join(name.split(".")[:2]) for name, _ in module.named_parameters()}
            raise RoveError(f"{setting}: no parameter begins with {beginning!r}. {nearest(beginning, parts)}")
        for parameter in found:
            parameter.requires_grad_(False)


class Learner:
    """Owner of the policy's gradients: one `update` per iteration, `epochs` passes over its batch.

    Several learners, one a rank, train on their shares of each step's rows.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        run: Run,
        device: torch.device,
        ranks: Ranks = Ranks(),
    ) -> None:
        self.policy, self.algorithm, self.device = policy, algorithm, device
        self.config = run.algorithm
        self.run, self.training = run, run.training
        self.head: nn.Module | None = policy.value_head
        self.ranks = ranks
        freeze(policy, run.training.freeze, "training.freeze")
        self.model = ParallelModel(policy, run.training, device, ranks)
        self.reference = Reference(policy) if needs(self.config).kl_coef else None
        self._steps = optimizer_steps(run, run.rollout.num_envs * run.rollout.chunks)
        """Steps of an iteration whose batch is all that was collected."""
        steps = self._steps * run.training.iterations
        self.optimizer = Optimizer(policy, run.training.optim, steps, run.training.max_bad_steps, self.head)

    def update(
        self, batch: TrainBatch, iteration: int, on_step: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Train on `batch`, the whole of which every rank is given; see `train`."""
        steps = schedule(len(batch), self.run, iteration)
        return self.train(deal(batch, steps, self.ranks.rank, self.ranks.world), iteration, on_step)

    def train(
        self, share: Share, iteration: int, on_step: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Train on this rank's share of a batch; returns the mean of each metric over the optimizer steps.

        `iteration` is also the version of the weights: where older ones acted, updates stay close to policy
        and critic as they are now, and samples are weighted by how likely the policy is to act so (decoupled
        objective, see `losses.policy_loss`), unless the algorithm is told to leave that out.
        """
        batch = share.batch
        behind = 0 if batch.version is None else iteration - batch.version
        if behind > 0 and len(batch) and needs(self.config).decoupled:
            batch = self.anchored(batch)
        totals: dict[str, float] = defaultdict(float)
        steps = skipped = 0
        for step in share.steps:
            sums = self.accumulate(batch, step, iteration)
            # The schedule ends with the run, also where rows that were dropped make for fewer steps.
            at = self._steps * (iteration + steps / len(share.steps))
            metrics, taken = self.optimizer.step(sums, at)
            steps, skipped = steps + 1, skipped + (not taken)
            for name, value in metrics.items():
                totals[name] += value if taken else 0.0
            on_step()
        mean = {f"train/{name}": value / max(1, steps - skipped) for name, value in totals.items()}
        return mean | {
            "train/behind": behind,
            "train/rows": share.size,
            "train/steps": steps,
            "train/skipped_steps": skipped,
            "train/lr": self.optimizer.last_lr,
        }

    def accumulate(self, batch: TrainBatch, step: OptimizerStep, iteration: int = 0) -> dict[str, Tensor]:
        """Compute the gradients of one optimizer step on this rank's `batch`. Returns metrics, summed over
        all ranks, which stay on the device: the host does not wait for them here."""
        totals: dict[str, Tensor] = {}
        mine = step.select(batch)
        micros = torch.arange(len(mine)).split(self.training.micro_batch)
        references = self._reference_logprobs(mine, micros)
        for number, own in enumerate(micros):
            headway()
            micro = transfer.to(mine.select(own), self.device)
            with self.model.accumulating(last=number == len(micros) - 1):
                output = self._evaluate(self.model, micro)
                loss, metrics = self.algorithm.loss(
                    output,
                    micro,
                    self.config,
                    denominator=step.denominator,
                    value_denominator=step.value_denominator,
                    reference=None if references is None else references[number],
                )
                (loss * self.model.loss_scale if self.ranks.world > 1 else loss).backward()
            for name, value in metrics.items():
                totals[name] = totals[name] + value if name in totals else value
        totals = self.ranks.sum(totals)
        if iteration < needs(self.config).critic_warmup:
            self._keep_head_gradients_only()
        return totals

    def _evaluate(self, model: ParallelModel | Policy, micro: TrainBatch) -> PolicyOutput:
        with torch.autocast(self.device.type, torch.bfloat16, self.training.precision == "bfloat16"):
            return model.evaluate(micro.observation, micro.sample)

    @torch.no_grad()
    def anchored(self, batch: TrainBatch) -> TrainBatch:
        """Return `batch` with current log-probs as `proximal`, and with a critic, current values."""
        micros = torch.arange(len(batch)).split(self.training.micro_batch)
        outputs = []
        for own in micros:
            headway()
            outputs.append(self._evaluate(self.policy, transfer.to(batch.select(own), self.device)))
        values = [output.value for output in outputs if output.value is not None]
        now = (torch.cat([output.logprob for output in outputs]), torch.cat(values) if values else None)
        logprob, value = transfer.to(now, batch.logprob.device)
        return replace(batch, proximal=logprob, value=None if batch.value is None else value)

    @torch.no_grad()
    def _reference_logprobs(self, mine: TrainBatch, micros: Sequence[Tensor]) -> list[Tensor] | None:
        """Compute the reference's log-probs of each micro-batch; at first exactly the policy's."""
        if self.reference is None:
            return None
        with self.reference.in_place():
            return [self._evaluate(self.policy, mine.select(own)).logprob for own in micros]

    def _keep_head_gradients_only(self) -> None:
        head = {id(p) for p in self.head.parameters()} if self.head is not None else set()
        for parameter in self.optimizer.parameters:
            if id(parameter) not in head:
                parameter.grad = None

    def state_dict(self) -> dict:
        """Return optimizer state, and the reference where there is one; every rank has to call it."""
        reference = None if self.reference is None else self.reference.state_dict()
        return {"optimizer": gather_full(self.optimizer.state_dict()), "reference": reference}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that training changes, by name."""
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def trainable(self) -> dict[str, Tensor]:
        """Gather the weights that training changes, whole, by name; every rank has to call it."""
        return {name: gather_full(p).detach() for name, p in self.parameters().items()}

    def offload(self) -> None:
        """Move the optimizer's moments to host memory, until `update` needs them."""
        self.optimizer.move("cpu")

    def load_state_dict(self, state: dict) -> None:
        """Restore the state that `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
