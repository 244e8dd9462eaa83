"""Messages of openpi's websocket protocol: msgpack, with NumPy arrays as maps of bytes, dtype and shape.

The bytes equal those of the packer of openpi-client 0.1.2. What is read may come from anybody: nothing in it
runs code, and an array is made only where its dtype, its shape and its bytes fit together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

_REFUSED = "VOc"
"""Kinds of dtypes that are not sent: structured ones, Python objects, complex numbers."""


def pack(obj: Any) -> bytes:
    """Write None, numbers, text, bytes, lists, dicts and NumPy arrays and scalars as one message.

    Raises ValueError on anything else, and on arrays of objects, of structures or of complex numbers.
    """
    try:
        return msgpack.Packer(default=_encode).pack(obj)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"A message cannot hold this: {error}.") from error


def unpack(data: bytes) -> Any:
    """Read one message. Arrays are views of its bytes, and cannot be written to.

    Raises ValueError where it is no msgpack, and where the dtype, the shape and the length of an array do not
    fit together.
    """
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"The message is no msgpack of the protocol: {error}.") from error


def _encode(obj: Any) -> Any:
    if isinstance(obj, np.ndarray | np.generic):
        if obj.dtype.kind in _REFUSED:
            raise ValueError(f"A message cannot hold an array of dtype {obj.dtype}: send numbers.")
        if isinstance(obj, np.ndarray):
            return {
                b"__ndarray__": True,
                b"data": obj.tobytes(),
                b"dtype": obj.dtype.str,
                b"shape": obj.shape,
            }
        return {b"__npgeneric__": True, b"data": obj.item(), b"dtype": obj.dtype.str}
    raise TypeError(f"an object of type {type(obj).__name__}")


def _decode(found: Mapping[Any, Any]) -> Any:
    if b"__ndarray__" in found:
        return _array(found)
    if b"__npgeneric__" in found:
        dtype, value = _dtype(found), _part(found, b"data")
        try:
            return dtype.type(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{value!r} is no scalar of dtype {dtype}.") from error
    return found


def _array(found: Mapping[Any, Any]) -> np.ndarray:
    dtype, shape, content = _dtype(found), _part(found, b"shape"), _part(found, b"data")
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"The shape of an array is {shape!r}: expected a list of sizes.")
    if not isinstance(content, bytes) or len(content) != math.prod(shape) * dtype.itemsize:
        length = f"{len(content)} bytes" if isinstance(content, bytes) else type(content).__name__
        raise ValueError(f"An array of dtype {dtype} and shape {shape} cannot be made of {length}.")
    return np.frombuffer(content, dtype).reshape(shape)


def _dtype(found: Mapping[Any, Any]) -> np.dtype:
    name = _part(found, b"dtype")
    try:
        # Text alone: a list would describe a structure.
        dtype = np.dtype(name) if isinstance(name, str) else None
    except (TypeError, ValueError, SyntaxError):
        dtype = None
    if dtype is None or dtype.kind in _REFUSED or not dtype.itemsize:
        raise ValueError(f"{name!r} is no dtype of numbers, such as '<f4'.")
    return dtype


def _part(found: Mapping[Any, Any], name: bytes) -> Any:
    if name not in found:
        raise ValueError(f"An array lacks its {name.decode()}.")
    return found[name]
