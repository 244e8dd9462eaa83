"""A CUDA device for a machine and a PyTorch that have none: what runs on it has shapes and no numbers.

CPU tensors stay what they are: real. Tensors on "cuda" are FakeTensors, with a shape, a dtype and a device,
and no memory. So a whole program runs (tokenizers, simulators, loops, optimizers), and a tensor on the wrong
device raises PyTorch's own error. What comes back from the device is zeros, unless a small tensor was copied
there and not computed with: its numbers are remembered.

Counted on the way are kernel launches, the bytes and floating-point operations of each, a roofline of them,
memory at its peak, which attention kernel would serve, and every place where the host waits for the device.

    from tests.gpu_pretended import pretend  # before anything imports torch
    with pretend.Cuda() as cuda: ...
    print(cuda.report())

It cannot show numbers, the time of real kernels, NCCL, or a CUDA graph being captured. A C++ compiler is
needed once: see `cuda.cpp`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import threading
import traceback
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "cuda.cpp"


def _load() -> None:
    """Compile `cuda.cpp` (10 s, once) and load it: PyTorch asks for hooks when it is imported, and never
    again."""
    if "torch" in sys.modules:
        raise ImportError("The pretended device has to be imported before torch, in a process of its own.")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    version = (root / "version.py").read_bytes()
    build = HERE.parents[1] / "build"
    library = build / f"pretended-cuda-{hashlib.sha1(SOURCE.read_bytes() + version).hexdigest()[:12]}.so"
    if not library.exists():
        build.mkdir(exist_ok=True)
        draft = library.with_name(f"{library.name}.{os.getpid()}")
        command = ["g++", "-O1", "-fPIC", "-shared", "-std=c++20", f"-I{root}/include", str(SOURCE)]
        command += ["-o", str(draft), f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        subprocess.run(command, check=True)
        draft.rename(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


os.environ.setdefault("PRETENDED_GPUS", "8")
_load()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402
from torch.utils.flop_counter import flop_registry  # noqa: E402

from rove.placement.cards import CARDS, Card  # noqa: E402

aten = torch.ops.aten


@dataclass(slots=True)
class Count:
    """What a piece of a program costs the device."""

    launches: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    """Each kernel at the larger of its arithmetic's and its memory's time."""

    def add(self, launches: int, flops: float, size: float, seconds: float) -> None:
        self.launches += launches
        self.flops += flops
        self.bytes += size
        self.seconds += seconds


_WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.item.default,
}
_VIEWS = {
    aten.select, aten.slice, aten.view, aten.unsqueeze, aten.squeeze, aten.detach, aten.alias, aten.expand,
    aten.unbind,
}  # fmt: skip
_EMPTY = {
    aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.alias,
    aten._unsafe_view, aten.view, aten.reshape,
}  # fmt: skip
_COPIES = {aten._to_copy, aten.to}
_KEPT = 4096
"""Elements up to which a tensor's numbers are remembered on the device."""


def _place() -> str:
    """file:line of the innermost frame that is the program's own."""
    skip = ("/torch/", __file__, "/contextlib")
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith("<") and not any(part in name for part in skip):
            return f"{name.split('site-packages/')[-1].split('/src/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


class Cuda(TorchDispatchMode):
    """While it is entered, "cuda" is a device; see the module. `reply` is what comes back from it."""

    def __init__(self, reply: float = 0.0, card: Card = CARDS["h100"]) -> None:
        super().__init__()
        self.reply, self.card = reply, card
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.allocated: Counter[int] = Counter()
        """Bytes in use, by device."""
        self.peak: Counter[int] = Counter()
        self.devices: Counter[int] = Counter()
        """Tensors made, by device."""
        self._sizes: dict[int, int] = {}
        self._lock = threading.RLock()
        self._patches = ExitStack()
        self.reset()

    def reset(self) -> None:
        """Count from here on; memory in use stays in use."""
        self.total = Count()
        self.by_op: dict[str, Count] = defaultdict(Count)
        self.waits: Counter[tuple[str, str]] = Counter()
        """(what, file:line) -> how often the host waited for the device."""
        self.transfers: Counter[str] = Counter()
        """"to device", "to host": how many."""
        self.moved: Counter[str] = Counter()
        """Likewise, bytes."""
        self.attention: Counter[tuple[str, str]] = Counter()
        """(kernel, shapes and place) -> how often."""
        self.peak = Counter(self.allocated)
        self.devices.clear()

    def __enter__(self) -> Cuda:
        for target, name, value in _patches(self):
            self._patches.enter_context(mock.patch.object(target, name, value, create=True))
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        self._patches.close()

    # --- what an operation does -------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        device = kwargs.get("device")
        if func.overloadpacket is aten.to:  # what `_to_copy` is, under inference mode
            device = next((x for x in leaves if isinstance(x, torch.device)), device)
        device = None if device is None else torch.device(device)
        if not fakes and (device is None or device.type != "cuda"):
            return self._on_host(func, args, kwargs)
        if func.overloadpacket in _COPIES and device is not None and device.type == "cpu":
            return self._to_host(func, args, kwargs)
        if (
            func is aten.copy_.default
            and isinstance(args[1], FakeTensor)
            and not isinstance(args[0], FakeTensor)
        ):
            self._count_to_host("copy_", args[1])
            return args[0].fill_(self.reply)
        if func in _WAITING and (answer := self._waited(func, args)) is not NotImplemented:
            return answer
        self._count_to_device(func, args, kwargs)
        args = self._without_mask_index(func, args)
        return self._on_device(func, args, kwargs, fakes)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not kwargs.pop("pin_memory", None):
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        out.pinned = True
        return out

    def _to_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        source = args[0]
        self._count_to_host("to the host", source)
        known = getattr(source, "host", None)
        if known is not None:
            return func(known, *args[1:], **kwargs)
        with self.fake:
            return self._real(func(*args, **kwargs))

    def _count_to_host(self, what: str, source: Tensor) -> None:
        self.waits[(what, _place())] += 1
        self.transfers["to host"] += 1
        self.moved["to host"] += source.numel() * source.element_size()

    def _count_to_device(self, func: Any, args: Any, kwargs: Any) -> None:
        """Count a copy from the host, and a wait unless it is from pinned memory and not waited for."""
        if func is aten.copy_.default:
            source, eager = args[1], not (args[2:] and args[2])
            if not isinstance(args[0], FakeTensor) or isinstance(source, FakeTensor):
                return
        elif func.overloadpacket in _COPIES and not isinstance(args[0], FakeTensor):
            source, eager = args[0], not (kwargs.get("non_blocking") or True in args[1:])
        else:
            return
        self.transfers["to device"] += 1
        self.moved["to device"] += source.numel() * source.element_size()
        if eager or not _pinned(source):
            self.waits[
                ("copy from pageable memory" if not _pinned(source) else "blocking copy", _place())
            ] += 1

    def _waited(self, func: Any, args: Any) -> Any:
        """What an operation answers for which the host waits; NotImplemented where it stays on the device."""
        self.waits[(str(func), _place())] += 1
        first = args[0]
        if func is aten._local_scalar_dense.default:
            known = getattr(first, "host", None)
            if known is not None:
                return known.item()
            kind = first.dtype
            return (
                float(self.reply)
                if kind.is_floating_point
                else (bool if kind == torch.bool else int)(self.reply)
            )
        if func is aten.nonzero.default:
            with self.fake:
                return torch.empty(first.numel(), first.dim(), dtype=torch.int64, device=first.device)
        return NotImplemented

    def _without_mask_index(self, func: Any, args: Any) -> Any:
        """`x[mask]` as an index of as many rows as the mask is known to have, else of all."""
        if func is not aten.index.Tensor:
            return args
        mask = next((i for i in args[1] if i is not None and i.dtype == torch.bool), None)
        if mask is None:
            return args
        self.waits[("index by a mask", _place())] += 1
        known = getattr(mask, "host", None)
        count = mask.numel() if known is None else int(known.sum())
        with self.fake:
            rows = torch.zeros(count, dtype=torch.int64, device=args[0].device)
            return (args[0].flatten(0, mask.dim() - 1), [rows])

    def _on_device(self, func: Any, args: Any, kwargs: Any, fakes: list[FakeTensor]) -> Any:
        first = args[0] if args else None
        with self.fake:
            given, named = tree_map_only(Tensor, _pretended, (args, kwargs))
            out = func(*given, **named)
        self._account(func, given, named, fakes, out)
        if isinstance(out, FakeTensor):
            self._remember(func, out, first, args[1:], kwargs)
        return tree_map_only(FakeTensor, self._real, out)

    def _remember(self, func: Any, out: FakeTensor, first: Any, rest: Any, kwargs: Any) -> None:
        """Keep the numbers of a small tensor that came from the host, as long as it is only viewed."""
        if func.overloadpacket in _COPIES and isinstance(first, Tensor) and not isinstance(first, FakeTensor):
            if out.dtype == first.dtype and first.numel() <= _KEPT:
                out.host = first.detach().clone()  # type: ignore[attr-defined]
        elif func.overloadpacket in _VIEWS and (known := getattr(first, "host", None)) is not None:
            out.host = func(known, *rest, **kwargs)  # type: ignore[attr-defined]

    def _real(self, x: FakeTensor) -> Tensor:
        """What came back to the host is real again."""
        if x.device.type != "cpu":
            return x
        with torch._C._DisableTorchDispatch():
            fill = bool(self.reply) if x.dtype == torch.bool else self.reply
            return torch.full(tuple(x.shape), fill, dtype=x.dtype)

    # --- what it costs ----------------------------------------------------------------------------

    def _account(self, func: Any, args: Any, kwargs: Any, fakes: list[FakeTensor], out: Any) -> None:
        outs = [x for x in tree_leaves(out) if isinstance(x, FakeTensor) and x.device.type == "cuda"]
        with self._lock:
            for x in outs:
                self.devices[x.device.index or 0] += 1
                self._track(x)
            if _is_view(func, fakes, outs) or func.namespace == "prim" or func.overloadpacket in _EMPTY:
                return
            flops, precise = _work(func, args, kwargs, out)
            read = list({id(x): x for x in fakes if x.device.type == "cuda"}.values())
            launches = 1
            if "_foreach" in str(func) and isinstance(args[0], list | tuple):
                launches = max(1, len(args[0]) // 30)
            if func.overloadpacket is aten.embedding:
                read = outs
            if func is aten.addmm.default and args[0].dim() == 2:
                # Only a bias is added within the product.
                self.kernel("copy before addmm", [args[0]], outs)
            self.kernel(str(func), read, outs, flops=flops, precise=precise, launches=launches)

    def kernel(
        self,
        name: str,
        read: Sequence[Tensor],
        written: Sequence[Tensor],
        *,
        flops: float = 0.0,
        precise: bool = False,
        launches: int = 1,
    ) -> None:
        """Count a kernel by what it reads, writes and computes; `precise`, in float32."""
        card = self.card
        size = sum(x.numel() * x.element_size() for x in (*read, *written))
        rate = card.float32 if precise else card.matrices
        seconds = max(flops / rate, size / card.bandwidth, card.kernel)
        with self._lock:
            for count in (self.total, self.by_op[name]):
                count.add(launches, flops, size, seconds)

    def _track(self, x: FakeTensor) -> None:
        storage = x.untyped_storage()
        key, device = storage._cdata, x.device.index or 0
        if key in self._sizes:
            return
        size = self._sizes[key] = storage.nbytes()
        self.allocated[device] += size
        self.peak[device] = max(self.peak[device], self.allocated[device])
        weakref.finalize(storage, self._freed, key, device)

    def _freed(self, key: int, device: int) -> None:
        with self._lock:
            self.allocated[device] -= self._sizes.pop(key, 0)

    # --- what it saw ------------------------------------------------------------------------------

    @property
    def launching(self) -> float:
        """Seconds that the launches take the host, from eager Python."""
        return self.card.launch * self.total.launches

    @property
    def share(self) -> float:
        """The share of the rate of matrix products that could be reached at best, launches aside."""
        return self.total.flops / self.card.matrices / max(self.total.seconds, 1e-12)

    def kernels(self) -> set[str]:
        """The attention kernels that would serve."""
        return {kernel for kernel, _ in self.attention}

    def report(self, top: int = 12) -> str:
        """Everything that was counted, as text."""
        total, card = self.total, self.card
        lines = [
            f"{total.launches:,} launches, {total.flops / 1e12:.3f} TFLOP, "
            f"{total.bytes / 2**30:.1f} GiB moved, {self.peak[0] / 2**30:.2f} GiB at the peak",
            f"{card.name}: matrices alone {1e3 * total.flops / card.matrices:.2f} ms, kernel by kernel "
            f"{1e3 * total.seconds:.2f} ms ({self.share:.0%} of the matrix rate), launching "
            f"{1e3 * self.launching:.1f} ms",
            f"transfers {dict(self.transfers)}, bytes {dict(self.moved)}",
        ]
        lines += [f"  waits      {n:6d}  {what:34s} {place}" for (what, place), n in self.waits.most_common()]
        lines += [
            f"  attention  {n:6d}  {kernel:9s} {shapes}"
            for (kernel, shapes), n in self.attention.most_common(top)
        ]
        costly = sorted(self.by_op.items(), key=lambda item: -item[1].seconds)
        for op, c in costly[:top]:
            cost = f"{1e3 * c.seconds:9.2f} ms {c.flops / 1e12:8.3f} T {c.bytes / 2**30:8.2f} GiB"
            lines.append(f"  {c.launches:6d} x {cost}  {op}")
        return "\n".join(lines)


def _pinned(x: Tensor) -> bool:
    return getattr(x, "pinned", False) or (x._base is not None and getattr(x._base, "pinned", False))


def _pretended(x: Tensor) -> Tensor:
    """A tensor of the host, as the device would find it; its numbers are not looked at."""
    if isinstance(x, FakeTensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _is_view(func: Any, fakes: list[FakeTensor], outs: list[FakeTensor]) -> bool:
    """Whether nothing is launched: the answer shares memory with what was given, and nothing is written."""
    if func.overloadpacket is aten.to:  # under inference mode casts arrive so
        given = {x.untyped_storage()._cdata for x in fakes}
        return any(x.untyped_storage()._cdata in given for x in outs)
    aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    return (bool(aliases) and not any(alias.is_write for alias in aliases)) or func in (
        aten.detach.default,
        aten.lift_fresh.default,
    )


def _work(func: Any, args: Any, kwargs: Any, out: Any) -> tuple[float, bool]:
    """Floating-point operations of a matrix product or attention, and whether they are in float32."""
    with torch._C._DisableTorchDispatch():
        if func is aten.linear.default:
            flops = 2 * args[0].numel() * args[1].shape[0]
        elif func is aten.matmul.default:
            flops = 2 * args[0].numel() * args[1].shape[-1]
        elif func is aten.addmm_.default:
            flops = 2 * args[1].numel() * args[2].shape[1]
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        else:
            return 0.0, False
    main = next((x for x in args if isinstance(x, FakeTensor)), None)
    return float(flops), main is not None and main.dtype == torch.float32


# --- what PyTorch is told ------------------------------------------------------------------------


def _attention(mode: Cuda, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Scaled dot-product attention as a CUDA build chooses its kernel: in half precision flash without a mask
    and memory-efficient with one, else memory-efficient, and math with grouped queries."""

    def chosen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not isinstance(query, FakeTensor):
            how = {"scale": scale, "enable_gqa": enable_gqa}
            return original(query, key, value, attn_mask, dropout_p, is_causal, **how)
        if torch.is_autocast_enabled("cuda"):
            low = torch.get_autocast_dtype("cuda")
            query, key, value = (x.to(low) if x.dtype == torch.float32 else x for x in (query, key, value))
        if not query.dtype == key.dtype == value.dtype:
            raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
        if attn_mask is not None and attn_mask.device != query.device:
            raise RuntimeError(f"the mask of attention on {query.device} is on {attn_mask.device}")
        half = query.dtype in (torch.bfloat16, torch.float16)
        kernel = "flash" if attn_mask is None and half else "math" if enable_gqa else "efficient"
        masked = None if attn_mask is None else tuple(attn_mask.shape)
        shapes = f"q {tuple(query.shape)} k {tuple(key.shape)} {query.dtype} mask {masked}"
        mode.attention[(kernel, f"{shapes} causal {is_causal} at {_place()}")] += 1
        if kernel == "math":
            how = {"scale": scale, "enable_gqa": enable_gqa}
            return original(query, key, value, attn_mask, dropout_p, is_causal, **how)
        if kernel == "flash":
            run = aten._scaled_dot_product_flash_attention
            return run(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        bias = attn_mask
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill(~bias, -torch.inf)
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        run = aten._scaled_dot_product_efficient_attention
        return run(query, key, value, bias, trained, dropout_p, is_causal, scale=scale)[0]

    return chosen


class _RMSNorm(torch.autograd.Function):
    """The kernels of a CUDA build, which a CPU build has in pieces."""

    @staticmethod
    def forward(ctx: Any, mode: Cuda, x: Tensor, weight: Tensor) -> Tensor:  # pyright: ignore
        ctx.mode = mode
        ctx.save_for_backward(x, weight)
        out = torch.empty_like(x)
        mode.kernel("rms_norm", [x, weight], [out])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor | None]:  # pyright: ignore
        x, weight = ctx.saved_tensors
        into_x, into_weight = torch.empty_like(x), None
        ctx.mode.kernel("rms_norm backward", [gradient, x, weight], [into_x])
        if ctx.needs_input_grad[2]:
            into_weight = torch.empty_like(weight)
            ctx.mode.kernel("rms_norm backward, weight", [gradient, x], [into_weight])
        return None, into_x, into_weight


class _SiLU(torch.autograd.Function):
    """Likewise."""

    @staticmethod
    def forward(ctx: Any, mode: Cuda, x: Tensor) -> Tensor:  # pyright: ignore
        ctx.mode = mode
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        mode.kernel("silu", [x], [out])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore
        (x,) = ctx.saved_tensors
        into_x = torch.empty_like(x)
        ctx.mode.kernel("silu backward", [gradient, x], [into_x])
        return None, into_x


def _rms_norm(mode: Cuda, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def chosen(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not isinstance(x, FakeTensor) or weight is None:
            return original(x, shape, weight, eps)
        if x.device != weight.device:
            raise RuntimeError(f"rms_norm of {x.device} with weights on {weight.device}")
        return _RMSNorm.apply(mode, x, weight)  # pyright: ignore[reportReturnType]

    return chosen


def _silu(mode: Cuda, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def chosen(x: Tensor, inplace: bool = False) -> Tensor:
        if not isinstance(x, FakeTensor) or inplace:
            return original(x, inplace)
        return _SiLU.apply(mode, x)  # pyright: ignore[reportReturnType]

    return chosen


def _swap(one: Any, other: Any) -> None:
    """`torch.utils.swap_tensors` also where something refers weakly to a tensor, as FakeTensorMode's caches
    do."""
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    torch._C._swap_tensor_impl(one, other)


class _Nothing:
    """A stream or an event: every call on it answers None, and everything has happened already."""

    device = torch.device("cuda", 0)
    cuda_stream = stream_id = 0

    def __init__(self, *args: Any, **settings: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **settings: None

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return _Nothing()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None: ...


@contextmanager
def _nothing(*args: Any, **settings: Any) -> Iterator[None]:
    yield


def _patches(mode: Cuda) -> list[tuple[Any, str, Any]]:
    cuda, current = torch.cuda, [0]

    class Properties:
        name, major, minor = f"pretended {mode.card.name}", 9, 0
        total_memory, multi_processor_count = mode.card.memory, 132

    def set_device(device: Any) -> None:
        current[0] = device if isinstance(device, int) else torch.device(device).index or 0

    def synchronize(*args: Any) -> None:
        mode.waits[("torch.cuda.synchronize", _place())] += 1

    def index(device: Any = None) -> int:
        if isinstance(device, int):
            return device
        return current[0] if device is None else torch.device(device).index or 0

    save = torch.save

    def pin_memory(x: Tensor, *args: Any) -> Tensor:
        out = x.clone()
        out.pinned = True  # type: ignore[attr-defined]
        return out

    def saved(value: Any, *args: Any, **settings: Any) -> None:  # FakeTensors do not pickle
        save(tree_map_only(FakeTensor, lambda x: x.detach().cpu(), value), *args, **settings)

    return [
        (torch, "save", saved),
        (Tensor, "pin_memory", pin_memory),
        (torch.utils, "swap_tensors", _swap),
        (cuda, "is_available", lambda: True),
        (cuda, "device_count", lambda: int(os.environ["PRETENDED_GPUS"])),
        (cuda, "current_device", lambda: current[0]),
        (cuda, "set_device", set_device),
        (cuda, "synchronize", synchronize),
        (cuda, "is_initialized", lambda: True),
        (cuda, "_lazy_init", lambda: None),
        (cuda, "init", lambda: None),
        (cuda, "is_bf16_supported", lambda *a, **k: True),
        (cuda, "get_device_name", lambda *a: Properties.name),
        (cuda, "get_device_properties", lambda *a: Properties),
        (cuda, "get_device_capability", lambda *a: (9, 0)),
        (cuda, "get_rng_state", lambda *a: torch.zeros(16, dtype=torch.uint8)),
        (cuda, "set_rng_state", lambda *a, **k: None),
        (cuda, "memory_allocated", lambda device=None: mode.allocated[index(device)]),
        (cuda, "max_memory_allocated", lambda device=None: mode.peak[index(device)]),
        (cuda, "empty_cache", lambda: None),
        (cuda, "is_current_stream_capturing", lambda: False),
        (cuda, "Stream", _Nothing),
        (cuda, "Event", _Nothing),
        (cuda, "current_stream", lambda *a: _Nothing()),
        (cuda, "default_stream", lambda *a: _Nothing()),
        (cuda, "stream", _nothing),
        (cuda, "device", _nothing),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (F, "scaled_dot_product_attention", _attention(mode, F.scaled_dot_product_attention)),
        (F, "rms_norm", _rms_norm(mode, F.rms_norm)),
        (F, "silu", _silu(mode, F.silu)),
    ]


def first_failure(error: BaseException, frames: int = 3) -> str:
    """The innermost lines of the program itself that an error came through."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "/src/rove/" in f.filename]
    return " <- ".join(
        f"{f.filename.split('/src/')[-1]}:{f.lineno} {f.line}" for f in reversed(own[-frames:])
    )
