"""Which device a run uses, and what that device is good at: the questions whose answers differ between CPU and CUDA.

The ruler measures in the precision of the target's weights (float32) on every device; bf16 is used where activations are
harvested for training and where a bound, not a value, is wanted. `NN_BF16=on` or `off` overrides what the processor says,
so that both paths can be tested on any machine.

glibc gives freed pages back to the system in mid-run, or never: `keep_freed_memory` and `give_back_memory` decide.
They do nothing where the C library is another one.

Float32 products of AMD's AVX512 processors go through oneDNN, in float32 (`onednn_is_exact`): MKL's are half as fast there.

Torch divides single operations among processors. Comparing, sorting, small sums and Python use one of them; independent
calls side by side (`in_threads`) can fill the others, and where they run a model whose modules are patched, copies of the
process (`in_processes`).
"""

import atexit
import contextlib
import ctypes
import functools
import gc
import inspect
import io
import multiprocessing
import os
import pickle
import platform
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parallel import world


def check_device(device: str) -> str:
    """The device itself; raises ValueError in one line where it cannot be used as it was named.

    A CUDA device must exist, and of several processes each must know of the others (`parallel.joined`): `torchrun` would
    repeat the whole job on one device.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) != world().size:
        raise ValueError(
            f"{processes} processes were started, and each would repeat the whole job: start it without torchrun"
        )
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (number and kind == "cpu"):
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:NUMBER")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was named, but this machine offers no CUDA device: use --device cpu")
    if number and int(number) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} was named, but there are {torch.cuda.device_count()}, counted from 0")
    return device


def device_name(device: str) -> str:
    """The GPU's own name, or the kind of processor and its number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def processor_description() -> str:
    """What the system says of the processor: in Linux its maker, model and instruction sets."""
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else platform.processor()


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices faster than float32 ones; emulated bf16 products are slower.

    Raises ValueError where NN_BF16 is set to anything but on and off.
    """
    forced = os.environ.get("NN_BF16")
    if forced not in (None, "on", "off"):
        raise ValueError(f"NN_BF16 is {forced!r}: set it to on or off, or leave it unset")
    if forced is not None:
        return forced == "on"
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def float32_through_onednn() -> bool:
    """Let oneDNN multiply float32 matrices on a processor that MKL leaves half idle, AMD's with AVX512; returns whether it does.

    Torch asks oneDNN only where float32 products may be rounded to bf16. None is on a processor without AMX: that is tried, on
    products of every kind that transformers and coders make, and MKL goes on where one is further from float64 than float32 is.
    """
    amd = "AuthenticAMD" in processor_description()
    if not amd or torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cpu._is_amx_tile_supported():
        return False
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    if not onednn_is_exact():
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
        return False
    return True


def onednn_is_exact() -> bool:
    """Whether float32 products are as near float64's as float32 can be: within 10⁻⁶ of their norm, bf16's are 10⁻³ away."""
    generator = torch.Generator().manual_seed(0)
    for n, d_in, d_out in ((64, 32, 16), (64, 192, 768), (64, 768, 192), (1024, 192, 192), (1, 768, 512)):
        x, weight = torch.randn(n, d_in, generator=generator), torch.randn(d_out, d_in, generator=generator)
        exact = x.double() @ weight.double().T
        made = (x @ weight.T, torch.addmm(torch.zeros(d_out), x, weight.T), (x[None] @ weight.T[None])[0])
        if max((product - exact).norm() / exact.norm() for product in made) > 1e-6:
            return False
    return True


float32_through_onednn()  # before anything is computed, so that a process computes the same from its start to its end


def spare_the_compiler() -> None:
    """Optimisers load torch's compiler at their first use, to tell it to leave them alone: 4 s, of a job that compiles no step.

    Until something else loads it there is nothing to tell. A step takes no gradients, as torch's own wrapper has it.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = inspect.unwrap(getattr(Optimizer, name))
        method.__dict__["__dynamo_disable"] = method  # where torch keeps what its compiler makes of the method
    for optimiser in (torch.optim.Adam, torch.optim.Muon):  # AdamW is an Adam
        optimiser.step = torch.no_grad()(inspect.unwrap(optimiser.step))  # type: ignore[method-assign]


spare_the_compiler()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on `device` that the host does not wait for: to CUDA it goes through pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Aside:
    """Work that is wanted later only: on CUDA a stream of its own, beside what is queued after it; elsewhere done at once.

    Whoever drops it drops what the work reads and writes, which is then given to others: they come after the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:
            weakref.finalize(self, _join, self.stream).atexit = False

    @contextlib.contextmanager
    def begun(self) -> Iterator[None]:
        """Inside, work comes after all that was queued before, and nothing that is queued later waits for it."""
        with contextlib.ExitStack() as stack:
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
                stack.enter_context(torch.cuda.stream(self.stream))
            yield

    def join(self) -> None:
        """What is queued from now on comes after the work aside; the host does not wait."""
        if self.stream is not None:
            _join(self.stream)


def _join(stream: torch.cuda.Stream) -> None:
    torch.cuda.current_stream(stream.device).wait_stream(stream)


TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # mallopt's names for its parameters


def keep_freed_memory() -> None:
    """For training: arrays up to 32 MiB are made of pages that earlier ones left behind.

    Every step frees and makes the same arrays. Pages that go back to the system in between are faulted in again one by
    one: 12 thousand in a step of 4,096 tokens and latents, 7 % of its time on one slow core. All threads share one arena,
    for those that threads have of their own give pages back whatever the threshold.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(ARENA_MAX, 1)


@functools.cache
def _look_no_further() -> None:
    """What lives now, modules and models, is no garbage: later collections don't look through it, 0.15 s each time."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


def give_back_memory() -> None:
    """For evaluation: memory would grow by the batch, since hooks and passes refer to each other and pages are kept."""
    _look_no_further()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@functools.cache
def _pool(caller: int, workers: int) -> ThreadPoolExecutor:
    """One pool per calling thread: nested calls on a shared pool would deadlock."""
    return ThreadPoolExecutor(workers)


def in_threads[A, B](function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    """[function(item) for item in items], begun in this order by as many threads as torch has, or as there are items."""
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers == 1:
        return [function(item) for item in items]

    def call(item: A) -> B:
        torch.set_num_threads(threads // workers)
        return function(item)

    try:
        return list(_pool(threading.get_ident(), workers).map(call, items))
    finally:
        torch.set_num_threads(threads)  # for threads to come, too, which begin with what was set last


_given: list[tuple[Callable[[Any], Any], Sequence[Any]]] = []  # what copies of this process find in it


class _Packer(pickle.Pickler):
    """Tensors as arrays: torch's own way takes a file, or a handle, for each."""

    def reducer_override(self, value: object) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented


def _packed(i: int) -> bytes:
    torch.set_num_threads(1)
    function, items = _given[-1]
    file = io.BytesIO()
    _Packer(file, protocol=5).dump(function(items[i]))
    return file.getvalue()


def in_processes[A, B](function: Callable[[A], B], items: Sequence[A], device: torch.device) -> Iterator[B]:
    """function(item) of each item in order; on a CPU by as many copies of this process as torch has threads.

    For passes of a model, whose hooks no two threads can share. Copies are made when the first result is asked for and have one
    thread each; what comes back are CPU tensors and plain values. Here, and on all threads, where items are fewer than those.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < threads or not hasattr(os, "fork"):
        yield from map(function, items)
        return
    with contextlib.ExitStack() as stack:
        _given.append((function, items))
        stack.callback(_given.pop)
        stack.enter_context(warnings.catch_warnings())
        # of threads that a copy lacks: it has torch's of one, and needs no other
        warnings.simplefilter("ignore", DeprecationWarning)
        pool = stack.enter_context(ProcessPoolExecutor(threads, multiprocessing.get_context("fork")))
        yield from map(pickle.loads, pool.map(_packed, range(len(items))))
