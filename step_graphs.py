"""A training step as one CUDA graph: a small coder's step is hundreds of kernels of microseconds each, and Python launches
them at a tenth of the speed at which a GPU runs them.

A graph is a recording: it repeats the same kernels on the same addresses. So what a step reads of outside is copied to one
place, and whatever decides the shapes within it (how many latents are active, how many are dead) is its key: with another
key the step runs once as it is written, and the next step of that key is recorded.
"""

import functools
import gc
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Step = Callable[..., Tensor]


def records_graphs(device: torch.device) -> bool:
    """Whether steps on this device can be recorded."""
    return device.type == "cuda"


def _recorded(step: Step, inputs: tuple[Tensor, ...], **pool: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of a step, and what it will write to. Recording runs nothing.

    Python's garbage collector is off meanwhile: where it finds an older graph, its end breaks the recording (seen on an H200).
    """
    graph, current, aside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    collects = gc.isenabled()
    gc.disable()
    with torch.cuda.stream(aside):
        graph.capture_begin(**pool)
        output = step(*inputs)
        graph.capture_end()
    if collects:
        gc.enable()
    current.wait_stream(aside)
    return graph, output


@functools.cache
def _keeper(device: torch.device) -> torch.cuda.CUDAGraph:
    """Of all recordings on a device, which share memory, the one that stays: the memory is lost with its last graph."""
    return _recorded(lambda: torch.zeros(1, device=device), ())[0]


class RecordedStep:
    """A step of tensors, recorded when its key comes twice in a row. What it returns holds until the next call.

    Recordings run one after another on one stream, so that they can share memory.
    """

    def __init__(self) -> None:
        self.key: Hashable = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.output: Tensor | None = None

    def __call__(self, step: Step, key: Hashable, *inputs: Tensor) -> Tensor:
        if key != self.key:
            self.key, self.graph, self.output = key, None, None
            return step(*inputs)
        if self.graph is None:
            self.inputs = self.inputs or tuple(map(torch.clone, inputs))
            with torch.cuda.device(device := inputs[0].device):
                self.graph, self.output = _recorded(step, self.inputs, pool=_keeper(device).pool())
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output
