"""Rotations: known turns, and agreement with MuJoCo's and with each other."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest
import torch

from rove.envs import rotations

HALF = np.sqrt(0.5)
IDENTITY, UPSIDE_DOWN, QUARTER = (
    np.array([1.0, 0, 0, 0]),
    np.array([0, 1.0, 0, 0]),
    np.array([HALF, 0, 0, HALF]),
)


@pytest.fixture
def quaternions() -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=(500, 4))
    return np.concatenate(
        [[IDENTITY, -IDENTITY, UPSIDE_DOWN, QUARTER], drawn / np.linalg.norm(drawn, axis=1)[:, None]]
    )


def test_known_turns():
    np.testing.assert_allclose(rotations.matrix(QUARTER), [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-15)
    np.testing.assert_allclose(rotations.axis_angle(QUARTER), [0, 0, np.pi / 2])
    np.testing.assert_array_equal(rotations.axis_angle(IDENTITY), np.zeros(3))
    np.testing.assert_array_equal(rotations.axis_angle(np.array([1 + 1e-9, 0, 0, 0])), np.zeros(3))
    np.testing.assert_allclose(rotations.yaw_quaternion(np.pi / 2), QUARTER)
    np.testing.assert_array_equal(rotations.matrix(UPSIDE_DOWN), np.diag([1.0, -1.0, -1.0]))


def test_a_yaw_is_read_as_it_was_written():
    angles = np.linspace(-3.1, 3.1, 51)
    written = np.array([rotations.yaw_quaternion(angle) for angle in angles])
    np.testing.assert_allclose(rotations.yaw_of(written), angles, atol=1e-15)
    assert rotations.yaw_of(written.reshape(3, 17, 4)).shape == (3, 17)


def test_matrices_are_mujocos_bit_for_bit(quaternions):
    expected = np.zeros((len(quaternions), 9))
    for row, quaternion in zip(expected, quaternions, strict=True):
        mujoco.mju_quat2Mat(row, quaternion)
    np.testing.assert_array_equal(rotations.matrix(quaternions), expected.reshape(-1, 3, 3))


def test_tensors_turn_alike(quaternions):
    found = rotations.tensor_matrix(torch.from_numpy(quaternions))
    np.testing.assert_allclose(found, rotations.matrix(quaternions), atol=1e-15)


def test_axes_and_angles_are_mujocos(quaternions):
    for quaternion in quaternions:
        expected = np.zeros(3)
        mujoco.mju_quat2Vel(expected, quaternion, 1.0)
        found = rotations.axis_angle(quaternion)
        if quaternion[0] < 0:  # the same turn, the long way round
            size = np.linalg.norm(found)
            found = found * (size - 2 * np.pi) / size if size else found
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_axes_and_angles_become_the_matrices_that_they_are_between():
    turns = np.random.default_rng(1).uniform(-1.5, 1.5, size=(100, 3))
    turned = rotations.axis_angle_matrix(turns)
    assert turned.dtype == np.float32
    still = np.tile(np.eye(3), (len(turns), 1, 1))
    np.testing.assert_allclose(rotations.axis_angle_between(still, turned), turns, atol=1e-5)
    np.testing.assert_array_equal(rotations.axis_angle_between(still, still), np.zeros((100, 3)))
