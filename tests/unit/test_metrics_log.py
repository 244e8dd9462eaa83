import json
import sys
from pathlib import Path

import pytest

from rove.errors import RoveError
from rove.reporting import log, metrics
from rove.reporting.log import Logger

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def logged(directory, iterations, cut=None):
    """Log these iterations, after a cut if one is given; what the file then holds."""
    with Logger(directory, tensorboard=False, wandb=False) as logger:
        if cut is not None:
            logger.cut(cut)
        for iteration in iterations:
            logger.log(iteration, {"rollout/success": iteration / 10})
    return [line["step"] for line in log.read(directory) if "step" in line]


def test_the_reference_page_is_current():
    assert PAGE.read_text() == metrics.markdown(), "run `python -m rove.reporting.metrics > docs/metrics.md`"


def test_every_metric_belongs_to_a_described_group():
    assert {metric.group for metric in metrics.METRICS.values()} == set(metrics.GROUPS)
    assert all(metric.unit and metric.meaning for metric in metrics.METRICS.values())


def test_an_undeclared_metric_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(RoveError, match="Did you mean 'train/grad_norm'"):
        metrics.declaration("train/gradnorm")
    with Logger(tmp_path, tensorboard=False, wandb=False) as logger, pytest.raises(RoveError):
        logger.log(1, {"rollout/sucess": 0.5})
    assert log.read(tmp_path) == []


def test_lines_are_strict_json_and_flushed_at_once(tmp_path):
    with Logger(tmp_path, tensorboard=False, wandb=False) as logger:
        logger.log(3, {"train/grad_norm": float("nan"), "train/lr": 1e-4})
        line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 3, "train/grad_norm": None, "train/lr": 1e-4}


def test_resuming_cuts_what_the_checkpoint_does_not_hold(tmp_path):
    assert logged(tmp_path, range(1, 8)) == [1, 2, 3, 4, 5, 6, 7]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "rollout/su')  # a crash in mid-line
    assert len(log.read(tmp_path)) == 7
    assert logged(tmp_path, [5, 6], cut=4) == [1, 2, 3, 4, 5, 6]
    assert logged(tmp_path, [7]) == [1, 2, 3, 4, 5, 6, 7]


def test_a_cut_keeps_the_warm_up(tmp_path):
    with Logger(tmp_path, tensorboard=False, wandb=False) as logger:
        logger.log_sft(900, {"sft/loss": 1.0})
        logger.log(1, {"rollout/success": 0.5})
        logger.cut(0)
    assert log.read(tmp_path) == [{"sft_step": 900, "sft/loss": 1.0}]


def test_tensorboard_gets_the_same_numbers_and_the_same_cut(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Logger(tmp_path, tensorboard=True, wandb=False) as logger:
        for iteration, success in ((1, 0.25), (2, 0.5), (3, 0.75)):
            logger.log(iteration, {"rollout/success": success})
        logger.cut(1)
        logger.log(2, {"rollout/success": 1.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("rollout/success")] == [(1, 0.25), (2, 1.0)]


def test_a_missing_sink_names_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RoveError, match=r"pip install 'rove\[wandb\]'"):
        Logger(tmp_path, tensorboard=False, wandb=True)
