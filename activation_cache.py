"""Activations on disk: what the target made of a text once, so that a second training on it need not run the target.

    folder / index.json            what made them, and how many forwards are whole; written last, so never ahead of the shards
    folder / 00000.safetensors     one forward's tokens (inputs or outputs, layer, token, d), and where the text then was

    fp16   the values as the store's buffer holds them              bytes of a token: 2 · 2 · L · d
    int8   a ≈ s q,  s = max |a| / 127 of a token, layer and side   bytes of a token: 2 · L · (d + 4)

A store that reads fp16 serves what one without a cache serves, bit for bit. int8 errs by at most s / 2 in each number; a store
that writes it serves the rounded values from the first training on, so that the second one is equal to it.
To fill a cache the host waits for the device once a forward; to read one it does not.
Files appear whole or not at all, and a shard beyond the index is written again. What is not there yet comes from the target
and is added. A folder is named by a hash of all that decides the values; nobody deletes it but its owner.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from logs import atomic_path, cache_folder, read_tensors, write_json

Cache = Literal["none", "fp16", "int8"]


class Shard(NamedTuple):
    """One forward, on the CPU."""

    kept: Float[Tensor, "two layer token d"]  # fp16, as the store's buffer takes them
    scales: Float[Tensor, "two layer"]  # what they were divided by
    read: int  # documents or pieces of the text that were read by then
    leftover: Int[Tensor, "tokens"]  # read of them and not used


def quantised(
    kept: Float[Tensor, "two layer token d"],
) -> tuple[Int[Tensor, "two layer token d"], Float[Tensor, "two layer token"]]:
    """int8 q and float32 s of each token, layer and side, so that s q is nearest to the values; NaN where one is not finite."""
    wide = kept.float()
    s = wide.abs().amax(-1) / 127
    s = torch.where(s.isfinite(), s, torch.nan)
    q = (wide / s.clamp_min(torch.finfo(torch.float32).tiny)[..., None]).round().nan_to_num()
    return q.to(torch.int8), s


def restored(
    q: Int[Tensor, "two layer token d"], s: Float[Tensor, "two layer token"]
) -> Float[Tensor, "two layer token d"]:
    """s q in fp16."""
    return (q.float() * s[..., None]).half()


class ActivationCache:
    """The forwards of one text under one target, in a folder of their own."""

    def __init__(self, form: Cache, settings: Sequence[Any]) -> None:
        """`settings` are all that decides the activations; ValueError where the folder says that others made it."""
        assert form != "none", f"{form=}"
        self.form, self.settings = form, json.loads(json.dumps([form, *settings]))
        name = hashlib.sha256(json.dumps(self.settings).encode()).hexdigest()[:16]
        self.folder = cache_folder() / "activations" / name
        self.whole = self._counted()  # forwards that are here

    def _counted(self) -> int:
        file = self.folder / "index.json"
        if not file.exists():
            return 0
        index = json.loads(file.read_text())
        if index["settings"] != self.settings:
            raise ValueError(f"{self.folder} holds activations of other settings: delete it")
        return int(index["forwards"])

    def _file(self, forward: int) -> Path:
        return self.folder / f"{forward:05d}.safetensors"

    def read(self, forward: int) -> Shard:
        """ValueError for a file that is missing or damaged."""
        assert forward < self.whole, f"{forward=} {self.whole=}"
        t = read_tensors(self._file(forward))
        kept = t["kept"] if self.form == "fp16" else restored(t["kept"], t["s"])
        return Shard(kept, t["scales"], int(t["read"]), t["leftover"])

    def write(self, forward: int, shard: Shard, *, leads: bool) -> Float[Tensor, "two layer token d"]:
        """What `read` will give. It is written where this process `leads` and it is the next one; a gap is never left."""
        kept = shard.kept.contiguous()
        parts = {"kept": kept} if self.form == "fp16" else dict(zip(("kept", "s"), quantised(kept)))
        if forward == self.whole:
            self.whole += 1
            if leads:
                position = {"read": torch.tensor(shard.read), "leftover": shard.leftover}
                with atomic_path(self._file(forward)) as temporary:
                    save_file(parts | {"scales": shard.scales} | position, temporary)
                write_json(self.folder / "index.json", {"settings": self.settings, "forwards": self.whole})
        return kept if self.form == "fp16" else restored(parts["kept"], parts["s"])
