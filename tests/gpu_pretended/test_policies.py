"""Every kind of policy acts, evaluates, is warmed up, trained and saved on a GPU, and makes the host wait no
more often than it has to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tests.gpu_pretended import pretend, tiny

import torch  # isort: skip

from rove import algorithms
from rove.config.schema import GRPO, PPO, AlgorithmConfig, OptimConfig, Run, SFTConfig, TrainingConfig, Vine
from rove.policies.openvla import OpenVLA
from rove.rollout.collect import act
from rove.runtime.channel import pack, unpack
from rove.training.deal import step_of_rank
from rove.training.learner import Learner
from rove.training.pointing import learn_to_point
from rove.training.sft import fit
from rove.types import Conventions
from rove.workers import weights

ROWS = 4


@dataclass(frozen=True)
class Case:
    kind: str
    lora: bool
    policy: OpenVLA
    cuda: pretend.Cuda


KINDS = [*((kind, False) for kind in tiny.KINDS), ("causal", True), ("everything", True), ("l1", True)]
NAMES = {case: f"{case[0]}{'-lora' if case[1] else ''}" for case in KINDS}
every = pytest.mark.parametrize("case", KINDS, ids=NAMES.get, indirect=True)
stochastic = pytest.mark.parametrize(  # an L1 head gives actions no likelihood
    "case", [case for case in KINDS if case[0] != "l1"], ids=NAMES.get, indirect=True
)
trained = pytest.mark.parametrize(  # bidirectional attention is nothing new to a learner
    "case",
    [("causal", False), ("causal", True), ("everything", True), ("autoregressive", False)],
    ids=NAMES.get,
    indirect=True,
)


@pytest.fixture(scope="module")
def device():
    with pretend.Cuda() as cuda:
        yield cuda


@pytest.fixture(scope="module")
def case(request, device: pretend.Cuda) -> Case:
    return Case(*request.param, tiny.make(*request.param), device)


@every
def test_acting_waits_once_for_the_device(case: Case) -> None:
    seen, policy = tiny.observe(ROWS), case.policy
    for rows in (ROWS, 1):
        case.cuda.reset()
        some = None if policy.regresses else tiny.noise(rows)
        chunk = act(policy, tiny.SPEC, seen.select(range(rows)), some)
        assert chunk.actions.shape == (rows, tiny.C, 3) and chunk.actions.device.type == "cpu"
        assert sum(case.cuda.waits.values()) == 1, case.cuda.report()
        # Constants go there once.
        assert case.cuda.transfers == {"to device": 1, "to host": 1} or rows == ROWS
    # bidirectional attention has to leave out what pads a shorter prompt
    mixed = {"efficient"} if case.kind in ("bidirectional", "l1", "autoregressive") else set()
    assert not case.lora or case.cuda.kernels() <= {"flash"} | mixed, case.cuda.report()


@stochastic
def test_many_samples_values_and_points(case: Case) -> None:
    seen, policy = tiny.observe(ROWS), case.policy
    chunk = act(policy, tiny.SPEC, seen, tiny.noise(ROWS), 3)
    assert chunk.sample.shape == (ROWS, 3, tiny.C, 3)
    assert policy.value(seen).device == tiny.DEVICE
    if policy.vlm.pointer is not None:
        policy.point(seen).sum().backward()


@stochastic
def test_evaluating_does_not_wait(case: Case) -> None:
    seen, policy, cuda = tiny.observe(ROWS), case.policy, case.cuda
    tokens = torch.full((ROWS, tiny.C, 3), 100)
    for smoothing in (0.0, 2.0):
        cuda.reset()
        output = policy.evaluate(seen, tokens, 1.0, smoothing)
        assert output.value is not None
        (output.logprob.sum() + output.value.sum()).backward()
        assert not cuda.waits, cuda.report()
        assert cuda.transfers["to host"] == 0


@stochastic
def test_logits_as_published(case: Case) -> None:
    seen, policy = tiny.observe(ROWS), case.policy
    ids, mask = policy._prompt(seen)
    assert mask is not None
    state = torch.rand(ROWS, tiny.STATE) if policy.state_normalizer else None
    logits = policy.action_logits(ids, mask, policy.process_images(seen.images), state=state)
    assert logits.shape == (ROWS, tiny.C, 3, 256)


@every
def test_preflight(case: Case) -> None:
    state = tiny.STATE if case.policy.state_normalizer else None
    wanted = Conventions("x", tiny.SPEC, (), (), ("go left",), state=state)
    assert case.policy.preflight(wanted, rl=False)


@every
def test_warming_up_waits_once_a_step(case: Case) -> None:
    policy, shown, cuda = case.policy, tiny.demonstrations(ROWS), case.cuda
    config = SFTConfig(
        steps=1, batch=4, micro_batch=2, color_jitter=0.1, smoothing=0.0 if policy.regresses else 2.0,
        grounding_steps=1, optim=OptimConfig(),
    )  # fmt: skip
    for learn in [fit] + [learn_to_point] * (policy.vlm.pointer is not None):
        cuda.reset()
        learn(policy, shown, config, 0, max_bad_steps=2)
        assert sum(cuda.waits.values()) == 1, cuda.report()


LEARNERS: dict[str, tuple[AlgorithmConfig, dict]] = {
    "ppo": (PPO(), {}),
    "ppo-frugal": (PPO(), {"precision": "bfloat16", "gradient_checkpointing": True}),
    "grpo-kl": (GRPO(kl_coef=0.1), {"offload": True}),
    "vine": (Vine(branches=3), {}),
}


@trained
@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_waits_once_an_optimizer_step(case: Case, name: str) -> None:
    algorithm, how = LEARNERS[name]
    policy, cuda = case.policy, case.cuda
    config = TrainingConfig(iterations=1, batch=ROWS, micro_batch=ROWS, optim=OptimConfig(lr=1e-3), **how)
    run = Run("test", algorithm, training=config)
    learner = Learner(policy, algorithms.get(algorithm.kind), run, tiny.DEVICE)
    rows = tiny.batch(
        ROWS,
        critic=isinstance(algorithm, PPO),
        normalized=isinstance(algorithm, GRPO),
        branches=algorithm.branches if isinstance(algorithm, Vine) else 0,
    )
    for iteration in (0, 1):  # the second is behind: older weights acted
        cuda.reset()
        metrics = learner.update(rows, iteration)
        assert metrics["train/steps"] == 1 and metrics["train/behind"] == iteration
        # The batch is anchored first, which brings its log-probabilities back.
        assert cuda.transfers["to host"] == 1 + iteration, cuda.report()
        assert sum(cuda.waits.values()) == 1 + iteration, cuda.report()
    if config.offload:
        learner.offload()
        learner.update(rows, 0)
    state = learner.state_dict()
    learner.load_state_dict(state)


@stochastic
def test_a_micro_batch_does_not_wait(case: Case) -> None:
    run = Run("test", PPO(), training=TrainingConfig(iterations=1, batch=ROWS, micro_batch=2))
    learner = Learner(case.policy, algorithms.get("ppo"), run, tiny.DEVICE)
    case.cuda.reset()
    batch = tiny.batch(ROWS)
    learner.accumulate(batch, step_of_rank(batch, torch.arange(ROWS)))
    assert not case.cuda.waits, case.cuda.report()


@every
def test_weights_are_published_and_saved(case: Case, tmp_path: Path) -> None:
    policy = case.policy
    trained = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    weights.load(policy, unpack(*pack(weights.publish(1, trained))))
    policy.save_pretrained(tmp_path / "policy")
    assert (tmp_path / "policy" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["causal", "autoregressive"])
def test_ratios_and_values_of_whole_chunks(kind: str, cuda: pretend.Cuda) -> None:
    algorithm = PPO(ratio_level="chunk", advantage_level="chunk")
    run = Run("test", algorithm, training=TrainingConfig(iterations=1, batch=ROWS, micro_batch=2))
    learner = Learner(tiny.make(kind, critic="chunk"), algorithms.get("ppo"), run, tiny.DEVICE)
    assert learner.update(tiny.batch(ROWS, level="chunk"), 1)["train/steps"] == 1


def test_what_is_on_the_wrong_device_is_noticed(cuda: pretend.Cuda) -> None:
    """The device would be worth nothing if it let everything pass."""
    policy = tiny.make("causal")
    output = policy.evaluate(tiny.observe(2), torch.full((2, tiny.C, 3), 100))
    with pytest.raises(Exception, match="same device"):
        output.logprob - torch.zeros(2, tiny.C, 3)
    cuda.reset()
    ways = (lambda: output.logprob.sum().item(), lambda: (output.logprob > 0).nonzero(), output.logprob.cpu)
    for wait in ways:
        wait()
    torch.zeros(3).to(tiny.DEVICE)
    assert sum(cuda.waits.values()) == 4
    images = torch.zeros(2, 1, 24, 24, 3, dtype=torch.uint8, device=tiny.DEVICE)
    seen = replace(tiny.observe(2), images=images)
    assert policy.act(seen, "greedy").sample.device == tiny.DEVICE
