"""Initial states of older editions of LIBERO: arrays are read, and nothing else."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rove.envs.libero import package
from rove.errors import RoveError

STATES = np.arange(12.0).reshape(3, 4)


def by_numpy_1(file: Path) -> None:
    """Name NumPy's modules as version 1 did, with which the published files were written."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture
def states(tmp_path, monkeypatch):
    file = tmp_path / "task.pruned_init"
    monkeypatch.setattr(package, "_initial_states_file", lambda task: file)
    yield file
    package.initial_states.cache_clear()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("rename", [by_numpy_1, lambda file: None], ids=["numpy 1", "numpy 2"])
def test_arrays_are_read(states, zipped, rename):
    torch.save(STATES, states, _use_new_zipfile_serialization=zipped)
    if zipped:
        rename(states)
    assert np.array_equal(package.initial_states("a task"), STATES)


@pytest.mark.parametrize("what", ["code", "objects", "damage"])
def test_nothing_else_is(states, tmp_path, what):
    harm = tmp_path / "harm"
    if what == "damage":
        states.write_bytes(b"\0" * 64)
    elif what == "objects":
        torch.save(np.array([Harmful(harm)]), states)
    else:
        states.write_bytes(pickle.dumps(Harmful(harm), protocol=2))
    with pytest.raises(RoveError, match="task.pruned_init is damaged, or holds more than an array"):
        package.initial_states("a task")
    assert not harm.exists()
