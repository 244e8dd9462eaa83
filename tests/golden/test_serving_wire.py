"""Messages of the serving protocol, byte for byte as openpi's own client packs them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rove.serving.wire import pack, unpack

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = (ROOT / os.environ.get("ROVE_GOLDEN", "../shared/golden")) / "deploy" / "openpi"
pytestmark = pytest.mark.skipif(
    not GOLDEN.exists(), reason=f"no golden data: {GOLDEN} does not exist; point ROVE_GOLDEN at its folder"
)
SCALARS = ("scalar", "int", "bool")
"""Entries that are NumPy scalars, which the archive can only hold as arrays without dimensions."""


def messages() -> dict[str, Any]:
    structure = json.loads((GOLDEN / "inputs.json").read_text())
    with np.load(GOLDEN / "inputs.npz", allow_pickle=False) as file:
        arrays = dict(file)

    def build(path: str) -> Any:
        if path in arrays:
            return arrays[path][()] if path.rpartition("|")[2] in SCALARS else arrays[path]
        entry = structure[path]
        if "dict" in entry:
            return {name: build(f"{path}|{name}") for name in entry["dict"]}
        return bytes.fromhex(entry["bytes"]) if "bytes" in entry else entry["value"]

    return {file.stem: build(file.stem) for file in GOLDEN.glob("*.bin")}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray | np.generic):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return a == b


def test_bytes_equal_those_of_the_client() -> None:
    found = messages()
    assert found
    for name, message in found.items():
        assert pack(message) == (GOLDEN / f"{name}.bin").read_bytes(), name


def test_its_bytes_are_read_as_what_was_packed() -> None:
    for name, message in messages().items():
        read = unpack((GOLDEN / f"{name}.bin").read_bytes())
        # A scalar of 64 bits is a Python float to msgpack, in the client too.
        assert same(unpack(pack(message)), read), name
        for entry, value in message.items():
            if isinstance(value, np.ndarray):
                assert same(value, read[entry]), (name, entry)


def test_what_the_client_refuses_is_refused() -> None:
    made = {
        "object": np.array([{}], dtype=object),
        "complex": np.array([1j]),
        "structured": np.zeros(1, dtype=[("x", "f4")]),
    }
    refused = json.loads((GOLDEN / "refused.json").read_text())
    assert refused
    for kind, error in refused.items():
        assert error == "ValueError"
        with pytest.raises(ValueError, match="cannot hold"):
            pack({"x": made[kind]})
