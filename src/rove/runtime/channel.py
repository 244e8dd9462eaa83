"""Messages between processes of one machine, and memory that they share.

Nothing here has a name that could outlive its users. Shared memory is a file without one, passed as a file
descriptor; messages travel through socket pairs. So after Ctrl-C, and after `kill -9`, nothing is left of it.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import select
import socket
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rove.runtime import memory

_HEADER = struct.Struct("!QQQ")
"""Bytes of the pickle, number of buffers, bytes of the segment that holds them (0: they follow inline)."""
_INLINE = 1 << 16
"""Bytes of tensors up to which a message carries them itself."""
_ALIGN = 64
_DESCRIPTORS = 8
"""Segments that one message can carry."""


class ChannelClosed(ConnectionError):
    """The other end of a channel is gone."""


# --- memory ---------------------------------------------------------------------------------------


class Segment:
    """Memory that processes share through a file descriptor; freed when nobody maps it any more.

    A segment anywhere in a message of a `Channel` is the same memory on the other side.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        """`size` bytes, zeroed; or, with `fd`, those of another process's segment, which it takes over."""
        self.size = size
        self.fd = memory.anonymous_file(size) if fd is None else fd
        self._map = mmap.mmap(self.fd, size)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A view; it keeps the memory alive for as long as it is."""
        count = int(torch.Size(shape).numel())
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))

    def numbers(self) -> memoryview:
        """The whole, as int64."""
        return memoryview(self._map).cast("q")

    def release(self) -> None:
        """Close the descriptor; views stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.release()


def aligned(size: int) -> int:
    """`size` rounded up, so that what follows starts on a cache line."""
    return -(-size // _ALIGN) * _ALIGN


# --- messages -------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Keeps the bytes of tensors, and segments, out of the pickle."""

    def __init__(self, file: io.BytesIO) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        self.segments: list[Segment] = []
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not Segment:
            return None
        self.segments.append(value)
        return len(self.segments) - 1, value.size

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
            return NotImplemented
        # A copy is made only of what is not contiguous, or on a device.
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _rebuild, (pickle.PickleBuffer(flat.numpy().data), value.dtype, tuple(value.shape))


class _Unpickler(pickle.Unpickler):
    """Puts segments back, from the descriptors that came with a message."""

    def __init__(self, data: bytes | bytearray, buffers: Iterable[Any], descriptors: Sequence[int]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._descriptors = descriptors

    def persistent_load(self, pid: tuple[int, int]) -> Segment:
        number, size = pid
        return Segment(size, self._descriptors[number])


def _rebuild(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(memoryview(buffer)):
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        # Messages are read, never written to; those in an object store are mapped read-only.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


def _dump(value: Any) -> tuple[bytes, list[memoryview], list[Segment]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), [buffer.raw() for buffer in pickler.buffers], pickler.segments


def pack(value: Any) -> tuple[bytes, list[memoryview]]:
    """Any picklable value, the bytes of its tensors apart: each a flat buffer of bytes, not copied."""
    data, buffers, segments = _dump(value)
    assert not segments, "a segment travels through a channel only"
    return data, buffers


def unpack(data: bytes | bytearray, buffers: Iterable[Any]) -> Any:
    """Return the value that `pack` was given; its tensors are views of `buffers`."""
    return pickle.loads(data, buffers=buffers)


def fill(buffers: Sequence[memoryview]) -> Segment:
    """A segment with the buffers in it, one after the other."""
    segment = Segment(sum(aligned(len(buffer)) for buffer in buffers))
    offset = 0
    for buffer in buffers:
        segment._map[offset : offset + len(buffer)] = buffer
        offset += aligned(len(buffer))
    return segment


def views(segment: Segment, sizes: Sequence[int]) -> Iterator[memoryview]:
    """The buffers that `fill` put into a segment."""
    whole, offset = memoryview(segment._map), 0
    for size in sizes:
        yield whole[offset : offset + size]
        offset += aligned(size)


class Channel:
    """One end of a socket pair. Tensors above 64 KiB travel in shared memory: copied once, by the sender."""

    def __init__(self, sock: socket.socket, patience: float | None = None) -> None:
        """`patience`: seconds that the other end may stop in the middle of a message; None: for ever."""
        self._socket = sock
        self._socket.settimeout(patience)

    def fileno(self) -> int:
        """For `select` and `multiprocessing.connection.wait`."""
        return self._socket.fileno()

    def poll(self, seconds: float | None = 0.0) -> bool:
        """Whether a message, or the end, can be read within this time; None: however long it takes."""
        return bool(select.select([self._socket], [], [], seconds)[0])

    def send(self, value: Any) -> None:
        """Send a message. Raises ChannelClosed where the other end is gone."""
        data, buffers, segments = _dump(value)
        sizes = [len(buffer) for buffer in buffers]
        total = sum(map(aligned, sizes))
        own = None
        if total > _INLINE:
            own = fill(buffers)
            segments.append(own)
        assert len(segments) <= _DESCRIPTORS, f"a message carries at most {_DESCRIPTORS} segments"
        head = _HEADER.pack(len(data), len(buffers), total if own else 0)
        rest = struct.pack(f"!{len(sizes)}Q", *sizes) + data
        if own is None:
            rest = b"".join([rest, *buffers])
        try:
            socket.send_fds(self._socket, [head], [segment.fd for segment in segments])
            self._socket.sendall(rest)
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if own is not None:
            own.release()

    def recv(self) -> Any:
        """The next message. Raises ChannelClosed at the end."""
        try:
            head, descriptors, _, _ = socket.recv_fds(self._socket, _HEADER.size, _DESCRIPTORS)
            head += self._exactly(_HEADER.size - len(head)) if head else b""
            if not head:
                raise ChannelClosed("the other end is gone")
            length, count, shared = _HEADER.unpack(head)
            sizes = struct.unpack(f"!{count}Q", self._exactly(8 * count))
            data = self._exactly(length)
            inline = [] if shared else [self._exactly(size) for size in sizes]
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        buffers = views(Segment(shared, descriptors.pop()), sizes) if shared else inline
        return _Unpickler(data, buffers, descriptors).load()

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view, got = memoryview(data), 0
        while got < count:
            read = self._socket.recv_into(view[got:])
            if read == 0:
                raise ChannelClosed("the other end is gone")
            got += read
        return data

    def close(self) -> None:
        """Closing tells the other end; twice is harmless."""
        self._socket.close()
