"""Messages from strangers: read as what they are, or refused by ValueError."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rove.serving.wire import pack, unpack

NUMBERS = st.sampled_from(["<f4", "<f8", ">f4", "|u1", "|i1", "<i2", "<i8", "|b1", "<u4"])


@given(hnp.arrays(NUMBERS.map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))
def test_arrays_come_back_as_they_were(array: np.ndarray) -> None:
    back = unpack(pack({"x": [array]}))["x"][0]
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    np.testing.assert_array_equal(back, array)
    assert not back.flags.writeable


def array(**parts: Any) -> bytes:
    whole = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    changed = whole | {name.encode(): value for name, value in parts.items()}
    return msgpack.packb({key: value for key, value in changed.items() if value is not None})


BAD = {
    "another length": array(shape=[3]),
    "a huge shape": array(shape=[1 << 40, 1 << 40]),
    "a negative size": array(shape=[-2]),
    "two negative sizes": array(shape=[-2, -1]),
    "a size that is no number": array(shape=["2"]),
    "a size that is a truth": array(shape=[True, 2]),
    "a shape that is no list": array(shape=2),
    "no shape": array(shape=None),
    "no data": array(data=None),
    "data as text": array(data="12345678"),
    "objects": array(dtype="|O"),
    "a structure": array(dtype="f4,f4"),
    "a structure as a list": array(dtype=[["x", "<f4"]]),
    "complex numbers": array(dtype="<c8"),
    "a dtype that is none": array(dtype="<f3"),
    "an empty dtype": array(dtype="|V0"),
    "text of no size": array(dtype="<U0", shape=[0], data=b""),
    "no dtype": array(dtype=None),
    "a scalar of another type": msgpack.packb({b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}),
    "a scalar out of range": msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
    "cut short": pack({"x": np.zeros(4)})[:-3],
    "more than one": pack({}) + pack({}),
    "nothing": b"",
    "no msgpack": b"\xc1",
    "text that is no UTF-8": b"\xa1\xff",
    "an unhashable key": b"\x81\x90\x01",
    "a bottomless list": b"\x91" * 100_000,
    "a list that says it is huge": b"\xdd\xff\xff\xff\xff",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_message_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="."):
        unpack(BAD[name])


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(ValueError):
        unpack(data)


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, 1 << 70, {"x": object()}, np.datetime64])
def test_what_no_message_can_hold_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        pack(value)
