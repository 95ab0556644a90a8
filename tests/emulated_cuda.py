"""CUDA devices without a GPU: tensors that hold their values on the CPU, say that they lie on CUDA, and are as strict.

    with emulated_cuda() as cuda:                         two devices, cuda:0 (the current one) and cuda:1
        x = torch.randn(3, 4).to("cuda:1")                x.device == torch.device("cuda:1"), x.numpy() raises TypeError
        with cuda.counted() as waits:
            x.sum().item()                                waits == Counter({"_local_scalar_dense in <caller>": 1})

What CUDA refuses is refused: operations on two devices (CPU tensors without a dimension may enter pointwise ones), a
generator of another device, `numpy()`, a Triton kernel whose tensors lie elsewhere than on the current device. What makes
the host wait for the device is counted, with the function of the project that did it. The arithmetic is the CPU's, with the
CPU's generator, so that whatever a program computes here it must compute on the CPU to the last rounding.

Every operation below autograd passes through one function, `_Devices.__torch_dispatch__`, gradients' own included. To torch's
C++ an emulated tensor lies on "meta", a device without memory, whose code paths ask nothing of a driver; only Python sees
CUDA. The Triton kernels are replaced by `_Kernel`s that do the same eagerly, with the same arguments: their dense twins,
which stand in `kernel_twins.py`.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_twins import TWINS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

PROJECT = Path(__file__).parents[1]
N_DEVICES = 2
SOMEWHERE = torch.device("cuda")  # of what torch's C++ makes by itself: it takes the side of any device
COPIES = {"_to_copy", "copy_", "copy", "_foreach_copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # an index may lie on the CPU, and is then copied
FILLING = {"masked_fill", "masked_fill_", "fill", "fill_"}  # with a CPU tensor without a dimension
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
PRODUCTS = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}
READING = {  # the host needs a value, or the size of what comes out
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount",
    "equal", "is_nonzero", "_linalg_check_errors", "histc",
}  # fmt: skip


class Cuda(torch.Tensor):
    """A tensor of an emulated device; `value` is what it holds, an ordinary CPU tensor."""

    value: torch.Tensor
    place: torch.device
    device = property(lambda self: self.place)
    is_cuda, is_cpu, is_meta = True, False, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: torch.Tensor, device: torch.device) -> "Cuda":
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, value.stride(), value.storage_offset(), dtype=value.dtype, device="meta"
        )
        made.value, made.place = value, device
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func}: an emulated tensor outlived its emulation")

    def get_device(self) -> int:
        return self.place.index

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.value.__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.value!r} on {self.device}"


RealGenerator = torch.Generator


class Generator(RealGenerator):
    """`torch.Generator`; for CUDA, the CPU's generator under the name of a device."""

    device: torch.device = torch.device("cpu")

    def __new__(cls, device: Any = "cpu") -> "Generator":
        own = RealGenerator.__new__(cls)
        own.device = _named(torch.device(device))
        return own

    def __init__(self, device: Any = "cpu") -> None:
        pass


_current = 0  # index of the current device


def _named(device: torch.device) -> torch.device:
    """The device in full: "cuda" is the current one."""
    if device.type != "cuda":
        return torch.device("cpu")
    index = _current if device.index is None else device.index
    if index >= N_DEVICES:
        raise RuntimeError(f"CUDA error: invalid device ordinal ({device}, of {N_DEVICES})")
    return torch.device("cuda", index)


def _different(func: Any, *devices: Any) -> RuntimeError:
    found = ", ".join(sorted(map(str, devices)))
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {found}! ({func})"
    )


def _place() -> str:
    """The nearest caller that belongs to the project, tests left out."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.parent == PROJECT:
            return f"{path.stem}.{frame.f_code.co_qualname.replace('.<locals>', '')}"
        frame = frame.f_back
    return "elsewhere"


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in the arguments of an operation."""
    for x in tree:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _tensors(x)


def _values(tree: Any) -> Any:
    """Arguments with the values of emulated tensors in their places."""
    if isinstance(tree, Cuda):
        return tree.value
    return type(tree)(map(_values, tree)) if isinstance(tree, list | tuple) else tree


def _wrapped(tree: Any, device: torch.device) -> Any:
    """What an operation gave, said to lie on a device."""
    if isinstance(tree, torch.Tensor):
        return Cuda(tree, device)
    return type(tree)(_wrapped(x, device) for x in tree) if isinstance(tree, list | tuple) else tree


class _Devices(TorchDispatchMode):
    """Every operation: on the values, after its devices were looked at, and what it makes said to lie where CUDA puts it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values())))
        here = {x.place for x in inputs if isinstance(x, Cuda)}
        asked = kwargs.get("device")
        if not here and (asked is None or asked.type == "cpu"):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        to = self.check(func, name, inputs, here) if here else SOMEWHERE
        if asked is not None:
            to = to if asked.type == "meta" else _named(asked)
            kwargs = kwargs | {"device": torch.device("cpu")}
        elif name in COPIES:
            to = inputs[0].device
        if self.waits_for(name, args, kwargs, to):
            self.waits[f"{name} in {_place()}"] += 1
        out = func(*_values(args), **{key: _values(value) for key, value in kwargs.items()})
        if name in EMPTY:  # nobody may count on what was in memory
            out.fill_(torch.nan if out.is_floating_point() else True if out.dtype == torch.bool else -(2**6))
        if to.type == "cpu":
            return args[0] if name == "copy_" else out
        out = _wrapped(out, to)
        return return_and_correct_aliasing(func, args, kwargs, out) if func._schema.is_mutable else out

    def check(self, func: Any, name: str, inputs: list[torch.Tensor], here: set[torch.device]) -> torch.device:
        """The one device that all inputs lie on; raises RuntimeError where there are several."""
        definite = here - {SOMEWHERE}
        if name in COPIES:
            return definite.pop() if definite else SOMEWHERE
        scalars = torch.Tag.pointwise in func.tags or name in FILLING
        stranger = [x for x in inputs if not isinstance(x, Cuda) and not (scalars and x.ndim == 0)]
        if name in INDEXING and isinstance(inputs[0], Cuda):
            stranger = [x for x in stranger if x.is_floating_point()]
        if len(definite) > 1 or stranger:
            raise _different(func, *(definite or here), *(["cpu"] if stranger else []))
        return definite.pop() if definite else SOMEWHERE

    def waits_for(self, name: str, args: Any, kwargs: Any, to: torch.device) -> bool:
        """Does the host wait for the device?"""
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if isinstance(source, Cuda) == (to.type == "cuda"):
                return False
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            return not (asynchronous and getattr(source, "pinned", False))
        if name in INDEXING:
            index = [x for x in args[1] if x is not None]
            fills = name != "index" and args[2].numel() == 1 and len(index) == 1  # then a mask is a masked_fill
            masks = any(x.dtype == torch.bool for x in index) and not fills
            return masks or any(not isinstance(x, Cuda) for x in index)
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name == "segment_reduce":
            return not kwargs.get("unsafe", False)
        return name in READING


class _Calls(TorchFunctionMode):
    """What torch decides above the operations: an index's device, autocast's products, whose random numbers to take."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], Cuda):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)  # C++ makes it on "meta", empty
            args = (args[0], index, *args[2:])
        if name in PRODUCTS and torch.is_autocast_enabled("cuda"):
            low = torch.get_autocast_dtype("cuda")
            args, kwargs = tree_map_only(Cuda, lambda x: x.to(low) if x.is_floating_point() else x, (args, kwargs))
        if (generator := kwargs.get("generator")) is not None:
            filled = args[0].device if args and isinstance(args[0], torch.Tensor) else "cpu"
            wanted = _named(torch.device(kwargs.get("device") or filled))
            if wanted != generator.device:
                raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{generator.device}'")
        return func(*args, **kwargs)


class _Stream:
    """Stands for `torch.cuda.Stream`: what is queued is done at once, so that nobody need wait."""

    def __init__(self, device: Any = None) -> None:
        self.device = _named(torch.device("cuda" if device is None else device))

    def wait_stream(self, other: "_Stream") -> None:
        assert isinstance(other, _Stream), f"{other=}"


@contextlib.contextmanager
def _on_stream(stream: _Stream) -> Iterator[None]:
    """`torch.cuda.stream`: its device is the current one inside."""
    before = _exchange_device(stream.device.index)
    with contextlib.ExitStack() as stack:
        stack.callback(_exchange_device, before)
        yield


class _Kernel:
    """Stands for a Triton kernel: `kernel[grid](*arguments)`, launched on the current device."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(n > 0 for n in grid), f"an empty {grid=} cannot be launched"
        return self.launch

    def launch(self, *args: Any, num_warps: int = 4, **constants: int) -> None:
        for i, x in enumerate(args):
            if isinstance(x, torch.Tensor) and x.device != torch.device("cuda", _current):
                raise ValueError(f"Pointer argument (at {i}) cannot be accessed from Triton ({x.device} tensor?)")
        self.function(*args, **constants)


def _exchange_device(index: int) -> int:
    """Make a device the current one, none at −1; returns the one it was."""
    global _current
    before, _current = _current, _current if index < 0 else index
    return before


def _pinned(x: torch.Tensor, device: Any = None) -> torch.Tensor:
    """`Tensor.pin_memory`."""
    if isinstance(x, Cuda):
        raise RuntimeError(f"cannot pin a tensor of {x.device}: only dense CPU tensors can be pinned")
    copy = x.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def _load(load: Callable[..., Any], file: Any, map_location: Any, **rest: Any) -> Any:
    """`torch.load`: every tensor to `map_location`."""
    state = load(file, map_location="cpu", **rest)
    return tree_map_only(torch.Tensor, lambda x: x.to(map_location), state)


class Emulation:
    """What `emulated_cuda` gives: the counter of all that the host waited for."""

    def __init__(self, devices: _Devices) -> None:
        self.devices = devices

    @contextlib.contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """Inside, operations that make the host wait for the device are counted: operation and function → number."""
        outside, self.devices.waits = self.devices.waits, Counter()
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.devices, "waits", outside)
            yield self.devices.waits


@contextlib.contextmanager
def emulated_cuda() -> Iterator[Emulation]:
    """Inside, this thread has two CUDA devices. What was replaced for it is put back on any exit.

    Inference mode is replaced by `no_grad`: views of ordinary tensors made in it are ordinary, which a subclass cannot be.
    """
    import sparse_triton
    import training

    assert not torch.cuda.is_available(), "there is a real CUDA device: use it"
    torch._C._ensureCUDADeviceGuardSet()
    only_lift, swap = torch._C._only_lift_cpu_tensors(), torch.__future__.get_swap_module_params_on_conversion()
    devices = _Devices()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(_exchange_device, 0)
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_lift)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_swap_module_params_on_conversion(True)  # a moved parameter stays the same object
        for name, stand_in in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: N_DEVICES,
            "current_device": lambda: _current,
            "get_device_name": lambda device=None: "emulated CUDA device",
            "is_bf16_supported": lambda including_emulation=True: True,
            "is_current_stream_capturing": lambda: False,
            "synchronize": lambda device=None: devices.waits.update([f"synchronize in {_place()}"]),
            "Stream": _Stream,
            "current_stream": _Stream,
            "stream": _on_stream,
            "set_device": lambda device: _exchange_device(_named(torch.device(device)).index),
            "_exchange_device": _exchange_device,
            "_maybe_exchange_device": _exchange_device,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "inference_mode", torch.no_grad)
        patch.setattr(torch, "load", functools.partial(_load, torch.load))
        patch.setattr(torch.Tensor, "pin_memory", _pinned)
        patch.setattr(training, "records_graphs", lambda _device: False)  # a recording needs a driver
        for name, twin in TWINS.items():
            patch.setattr(sparse_triton, name, _Kernel(twin))
        stack.enter_context(_Calls())
        stack.enter_context(devices)
        yield Emulation(devices)
