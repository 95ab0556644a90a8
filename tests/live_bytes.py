"""How many bytes of tensors live at once: a claim about memory as a number, the same on every machine and in every run.

    with LiveBytes() as live:
        x = torch.zeros(1000)             live.now == live.peak == 4000
        del x                             live.now == 0, live.peak == 4000

Counted are the storages that operations make inside, until the last tensor that views them is gone. Not seen: what a kernel
takes and gives back within one call, what numpy copies, and operations of other threads.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, `now` are the bytes of tensors made inside that still live, `peak` the most that ever lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()  # addresses of the storages that live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs or {}))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, address: int, size: int) -> None:
        self._known.remove(address)
        self.now -= size


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    """Of all tensors but sparse ones, whose parts come by as tensors of their own."""
    found = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.layout == torch.strided]
    return [x.untyped_storage() for x in found]
