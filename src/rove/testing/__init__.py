"""A kit to test environments with: `check_env` holds one of yours to the contract of `rove.envs.base`."""

from rove.testing.check import CheckResult, check_env

__all__ = ["CheckResult", "check_env"]
