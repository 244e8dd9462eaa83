"""Processes of one machine: messages between them, and memory that they share.

Nothing here has a name that could outlive its users. Shared memory is a file without one, passed as a file
descriptor; messages travel through socket pairs; a child ends itself when the other end of its channel is
gone. So after Ctrl-C, and after `kill -9` of the parent, no segment, port or process is left.
"""

from __future__ import annotations

import faulthandler
import importlib
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HEADER = struct.Struct("!QQQ")
"""Bytes of the pickle, number of buffers, bytes of the segment that holds them (0: they follow inline)."""
_INLINE = 1 << 16
"""Bytes of tensors up to which a message carries them itself."""
_ALIGN = 64


class ChannelClosed(ConnectionError):
    """The other end of a channel is gone."""


# --- memory ---------------------------------------------------------------------------------------


class Segment:
    """Memory that processes share through a file descriptor; freed when nobody maps it any more."""

    def __init__(self, size: int, fd: int | None = None) -> None:
        """`size` bytes, zeroed; or, with `fd`, those of another process's segment, which it takes over."""
        self.size = size
        self.fd = _anonymous_file(size) if fd is None else fd
        self._map = mmap.mmap(self.fd, size)

    @staticmethod
    def attach(fd: int, size: int) -> Segment:
        """The segment that came with a message, of `size` bytes."""
        return Segment(size, fd)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A view; it keeps the memory alive for as long as it is."""
        count = int(torch.Size(shape).numel())
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).reshape(tuple(shape))

    def release(self) -> None:
        """Close the descriptor; views stay valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.release()


def _anonymous_file(size: int) -> int:
    """Descriptor of a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        # Not in /dev/shm, which a container limits to 64 MB: to write past that ends the process.
        descriptor = os.memfd_create("rove")
        os.ftruncate(descriptor, size)
        return descriptor
    with tempfile.TemporaryFile() as file:
        os.ftruncate(file.fileno(), size)
        return os.dup(file.fileno())


def aligned(size: int) -> int:
    """`size` rounded up, so that what follows starts on a cache line."""
    return -(-size // _ALIGN) * _ALIGN


# --- messages -------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Keeps the bytes of tensors out of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor and type(value) is not torch.nn.Parameter:
            return NotImplemented
        # A copy is made only of what is not contiguous, or on a device.
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return _rebuild, (pickle.PickleBuffer(flat.numpy().data), value.dtype, tuple(value.shape))


def _rebuild(buffer: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not len(memoryview(buffer)):
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        # Messages are read, never written to; those in an object store are mapped read-only.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape)


def pack(value: Any) -> tuple[bytes, list[memoryview]]:
    """Any picklable value, the bytes of its tensors apart: each a flat buffer of bytes, not copied."""
    import io

    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def unpack(data: bytes | bytearray, buffers: Iterable[Any]) -> Any:
    """What `pack` was given; its tensors are views of `buffers`."""
    return pickle.loads(data, buffers=buffers)


def _fill(buffers: Sequence[memoryview]) -> Segment:
    """A segment with the buffers in it, one after the other."""
    segment = Segment(sum(aligned(len(buffer)) for buffer in buffers))
    offset = 0
    for buffer in buffers:
        segment._map[offset : offset + len(buffer)] = buffer
        offset += aligned(len(buffer))
    return segment


def _views(fd: int, sizes: Sequence[int]) -> Iterator[memoryview]:
    """The buffers of another process's segment, whose descriptor is closed."""
    memory = memoryview(mmap.mmap(fd, sum(map(aligned, sizes))))
    os.close(fd)
    offset = 0
    for size in sizes:
        yield memory[offset : offset + size]
        offset += aligned(size)


class Packed:
    """A value that several processes are sent: packed once, into memory that all of them map.

    It is sent in a message together with its `segment`; the reader has the descriptor to `unpack` it with.
    """

    def __init__(self, value: Any) -> None:
        """Tensors in it are copied."""
        self._data, buffers = pack(value)
        self._sizes = [len(buffer) for buffer in buffers]
        self.segment: Segment | None = _fill(buffers)

    def __getstate__(self) -> dict[str, Any]:
        return {"_data": self._data, "_sizes": self._sizes, "segment": None}

    def unpack(self, fd: int | None) -> Any:
        """The value, with the descriptor that came with the message, which is closed."""
        assert fd is not None, "it was sent without its segment"
        return unpack(self._data, _views(fd, self._sizes))


class Channel:
    """One end of a socket pair. Tensors above 64 KiB travel in shared memory: copied once, by the sender."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def fileno(self) -> int:
        """For `select` and `multiprocessing.connection.wait`."""
        return self._socket.fileno()

    def poll(self, seconds: float = 0.0) -> bool:
        """Whether a message, or the end, can be read within this time."""
        return bool(select.select([self._socket], [], [], seconds)[0])

    def send(self, value: Any, *, segment: Segment | None = None) -> None:
        """Send a message. With `segment`, its memory goes along, for `recv_segment`.

        Raises ChannelClosed where the other end is gone.
        """
        data, buffers = pack(value)
        sizes = [len(buffer) for buffer in buffers]
        total = sum(map(aligned, sizes))
        own = None
        if total > _INLINE:
            assert segment is None, "a message carries one segment"
            segment = own = _fill(buffers)
        head = _HEADER.pack(len(data), len(buffers), total if own else 0)
        rest = struct.pack(f"!{len(sizes)}Q", *sizes) + data
        if own is None:
            rest = b"".join([rest, *buffers])
        try:
            socket.send_fds(self._socket, [head], [segment.fd] if segment else [])
            self._socket.sendall(rest)
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        if own is not None:
            own.release()

    def recv(self) -> Any:
        """The next message. Raises ChannelClosed at the end."""
        return self._recv()[0]

    def recv_segment(self) -> tuple[Any, int | None]:
        """The next message and the descriptor of the segment that came with it, which the caller closes."""
        return self._recv()

    def _recv(self) -> tuple[Any, int | None]:
        try:
            head, fds, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
            head += self._exactly(_HEADER.size - len(head)) if head else b""
            if not head:
                raise ChannelClosed("the other end is gone")
            length, count, shared = _HEADER.unpack(head)
            sizes = struct.unpack(f"!{count}Q", self._exactly(8 * count))
            data = self._exactly(length)
            if not shared:
                buffers = [self._exactly(size) for size in sizes]
                return unpack(data, buffers), (fds[0] if fds else None)
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        return unpack(data, _views(fds[0], sizes)), None

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


# --- processes ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setup:
    """What a new process needs before it can unpickle the user's own classes."""

    path: tuple[str, ...]
    """`sys.path`."""
    files: tuple[Path, ...] = ()
    """Files of the user's that were imported by path, in order; see `recipes.import_file`."""
    environments: tuple[tuple[str, str], ...] = ()
    """Registered kinds and their entry points."""
    policies: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def here() -> Setup:
        """As in this process."""
        from rove import recipes
        from rove.envs import registry as envs
        from rove.policies import registry as policies

        return Setup(
            tuple(sys.path),
            recipes.imported_files(),
            tuple(envs.entry_points().items()),
            tuple(policies.entry_points().items()),
        )

    def apply(self) -> None:
        """Make this process like the one that the setup was taken in."""
        from rove import recipes
        from rove.envs import registry as envs
        from rove.policies import registry as policies

        sys.path[:] = [*self.path, *(entry for entry in sys.path if entry not in self.path)]
        for kind, entry_point in self.environments:
            envs.register(kind, entry_point)
        for kind, entry_point in self.policies:
            policies.register(kind, entry_point)
        for file in self.files:
            recipes.import_file(file)


@dataclass(frozen=True, slots=True)
class Crash:
    """A child's last message: the exception that ended it."""

    error: BaseException
    trace: str


class Child:
    """A process that runs `function(channel, *args)` of a module, and dies with this one."""

    def __init__(
        self,
        target: str,
        args: tuple[Any, ...],
        *,
        setup: Setup,
        cores: Sequence[int] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        """`target` is "module:function"; `cores` bind the process, () leaves it everywhere."""
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours)
        command = [sys.executable, "-c", f"from rove import ipc; ipc.child({theirs.fileno()})"]
        # `sys.path` may hold what an interpreter does not start with: a checkout, a test's folder.
        paths = os.pathsep.join(entry for entry in setup.path if entry)
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths, **(environment or {})},
        )
        theirs.close()
        self.channel.send((setup, tuple(cores)))
        self.channel.send((target, args))

    def kill(self) -> None:
        """End it now, and reap it."""
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def join(self, seconds: float = 5.0) -> None:
        """Close the channel, at which it ends itself; kill it if it has not in time."""
        self.channel.close()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()


def child(fd: int) -> None:
    """Where a `Child` begins."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    sock = socket.socket(fileno=fd)
    channel = Channel(sock)
    threading.Thread(target=_die_with_parent, args=(fd,), daemon=True).start()
    try:
        setup, cores = channel.recv()
        # A cluster's nodes may be given more cores than there are. What this process inherited says nothing:
        # its parent may have kept to a core of its own when it started it.
        if own := set(cores) & set(range(os.cpu_count() or 0)):
            os.sched_setaffinity(0, own)
            torch.set_num_threads(len(own))
        setup.apply()
        target, args = channel.recv()
        module, _, name = target.partition(":")
        getattr(importlib.import_module(module), name)(channel, *args)
    except ChannelClosed:
        pass
    except BaseException as error:  # noqa: BLE001 - whatever it was, the parent is told
        with suppress(ChannelClosed):
            channel.send(crash(error))
    # Threads of simulators and renderers need not be waited for.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def crash(error: BaseException) -> Crash:
    """The exception being handled, fit to travel: one that cannot be pickled goes as text."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - any exception of the user's own making may not survive pickling
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return Crash(error, trace)


def _die_with_parent(fd: int) -> None:
    """End this process when the parent's end of the channel is gone, whatever it is doing."""
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP and POLLERR are always reported
    poll.poll()
    os._exit(1)
