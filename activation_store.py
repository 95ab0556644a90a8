"""Tokens → mixed, aligned batches of MLP inputs and outputs of L layers. One layer is not a special case.

    tokens ─ one forward of the target, stopped after the last hooked MLP ─▶ (x, y) of every layer, aligned by token
           ─ first position of each sequence dropped ─▶ buffer of `buffer_tokens` tokens ─ random half ─▶ batches

The buffer holds (inputs or outputs, layer, token, d) in fp16. It serves a random half of its tokens, puts new ones into
their slots, and draws a new random order, so that every batch mixes tokens of many sequences; nothing is ever moved.
A layer whose activations come near fp16's largest number, as Gemma 3's do, is kept divided by a power of two, which the
first forward's tokens decide, with room to grow 16-fold.
On CUDA the forwards of the next refill run beside the steps, on a stream of their own: after a step, as soon as a forward's
slots are served, one is queued that writes into them, those that the refill would have taken. Batches are the same to the last
bit; it costs memory of one forward at the same time as a step's. On a CPU a forward would take the cores from the step.
With a cache (`activation_cache.py`) forwards that were made before are read from disk, and the target does not run.
Buffer and batches may lie on another device than the target (`Harvest.device`).
Of a target at another site (`at_site`) input and output are one value, that site's; the rest is the same.
Memory: 2 · L · (buffer_tokens + one forward's tokens) · d · 2 bytes, allocated once, and 16 for the order of each token.
Beside it live for a moment a batch (6 bytes a number) and, in a refill, one forward's activations; nothing grows with steps.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from activation_cache import ActivationCache, Cache, Shard
from coder import ActivationStats
from devices import Aside, bf16_is_fast, check_device, sent
from parallel import decided, from_process, gathered, world
from patching import Captured, capture
from python_corpus import Split
from target_models import TargetModel
from token_stream import TokenStream, text_fingerprint

ROOM = 16  # times the largest activation of the first forward that fp16 must hold


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    layers: tuple[int, ...]
    batch_tokens: int  # tokens per training batch
    buffer_tokens: int = 65_536  # tokens mixed with each other; the first ones give scales and means
    model_batch: int = 32  # sequences per forward of the target
    seed: int = 0  # of the order of documents and of the mixing

    def __post_init__(self) -> None:
        if self.buffer_tokens < 2 * self.batch_tokens:
            raise ValueError(
                f"a batch of {self.batch_tokens} tokens is more than half of the buffer of {self.buffer_tokens}: "
                "choose a smaller batch or a larger buffer"
            )
        if min(self.batch_tokens, self.model_batch) < 1:
            raise ValueError(f"a batch of {self.batch_tokens} tokens, {self.model_batch} sequences: choose 1 or more")


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """How activations get from the target to the coders; of all this int8 alone changes what they learn."""

    cache: Cache = "none"  # kept on disk, for trainings to come
    device: str | None = None  # of buffer and coders; None: the target's


AT_HOME = Harvest()  # on the target's device, nothing kept on disk


class ActivationBatch(NamedTuple):
    inputs: Float[Tensor, "layer batch d_in"]  # fp32, on the store's device
    targets: Float[Tensor, "layer batch d_out"]


def check_layers(target: TargetModel, layers: tuple[int, ...]) -> None:
    outside = [layer for layer in layers if not 0 <= layer < target.n_layers]
    if outside or not layers:
        raise ValueError(f"layer {outside} is not among the layers 0…{target.n_layers - 1} of {target.name!r}")


def harvests_ahead(device: torch.device) -> bool:
    """Whether forwards can run beside training steps."""
    return device.type == "cuda"


class ActivationsStore:
    """An iterator of `ActivationBatch`; ends (StopIteration) when the token stream does.

    `shared`: processes that share out the data (`parallel.py`) each take documents, a part of the buffer and a part of every
    batch of their own, and agree on the statistics; those that share out coders or latents each make some of the forwards and
    send them to all others, so that every one has the whole buffer. Raises ValueError for a batch that cannot be dealt evenly.
    """

    def __init__(
        self, target: TargetModel, config: DataConfig, split: Split = "train", *, shared: bool = False,
        harvest: Harvest = AT_HOME,
    ) -> None:  # fmt: skip
        check_layers(target, config.layers)
        self.harvest = harvest
        self.device = torch.device(check_device(harvest.device)) if harvest.device else target.device
        if world().size > 1 and self.device != target.device:
            raise ValueError("several processes have a device each for all they do: leave out --target-device")
        part = world().part if shared else (0, 1)
        if config.batch_tokens % part[1]:
            raise ValueError(
                f"a batch of {config.batch_tokens} tokens cannot be dealt evenly to {part[1]} processes: choose --batch so"
            )
        self.batch_tokens, self.buffer_tokens = config.batch_tokens // part[1], config.buffer_tokens // part[1]
        self.target, self.config, self.split = target, config, split
        self.stream = target.stream(split, config.model_batch, config.seed, part)
        # processes that make the forwards of one buffer, and what one forward puts into it
        self.harvesters = world().size if shared and part[1] == 1 else 1
        self.harvested = (2, len(config.layers), config.model_batch * (target.context - 1), target.d_model)
        self.forwards = 0  # batches of tokens whose activations were put into the buffer
        # where the text is to be taken up; None: where the stream is
        self.position: dict[str, int | Tensor] | None = None
        self.cache: ActivationCache | None = None
        if harvest.cache != "none":
            precision = "bf16" if bf16_is_fast(target.device) else "float32"
            self.cache = ActivationCache(harvest.cache, [self.fingerprint(), precision, *part])
            if self.harvesters > 1:  # what process 0 adds from now on, the others make with it
                self.cache.whole = decided(lambda: self.cache.whole)  # type: ignore[union-attr]
        self.generator = torch.Generator().manual_seed(config.seed)
        slots = self.buffer_tokens + self.harvested[2]
        shape = (2, len(config.layers), slots, target.d_model)
        self.buffer = torch.zeros(shape, dtype=torch.float16, device=self.device)
        self.scales: Float[Tensor, "two layer"] | None = None  # what the buffer's activations were divided by
        self.scaled = False  # whether any of them was
        self.free = torch.arange(slots)  # slots without a token to give out
        self.order = torch.zeros(0, dtype=torch.int64)  # slots with one, in the order in which they are given out
        self.slots = self.order  # the same on the store's device
        self.early = torch.zeros(0, dtype=torch.int64)  # slots that were filled for the next refill, before it
        # which layers were finite in all forwards since the last refill
        self.whole = torch.ones(len(config.layers), dtype=torch.bool, device=self.device)
        self.aside = Aside(self.device)
        # where forwards are shared, others would have to take part in each of them
        self.ahead = harvests_ahead(self.device) and self.harvesters == 1
        self.served = 0  # slots at the start of `order` that were given out
        self.serve = 0  # slots to give out before the next refill
        self._refill()
        if not self.serve:
            raise ValueError(
                f"dataset {target.data.path!r} gives {len(self.order)} tokens of its {split} split, less than a batch of "
                f"{self.batch_tokens}: choose a smaller batch or more text"
            )
        own = measure(self.buffer, self.slots, self.scales)
        self.stats = pooled(gathered(own)) if part[1] > 1 else own

    @property
    def bytes(self) -> int:
        """Memory of the mixing buffer, all its life."""
        return self.buffer.nbytes

    def fingerprint(self) -> str:
        """16 hex digits that change with the model, the text or a setting that decides the activations and their order."""
        c, t = self.config, self.target
        data = [*dataclasses.astuple(t.data), text_fingerprint(t.data)]
        settings = [t.name, t.site, t.fingerprint, data, c.layers, c.model_batch, t.context, c.seed, self.split]
        settings += ["int8"] if self.harvest.cache == "int8" else []
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def _harvest(self, n: int) -> list[Float[Tensor, "two layer token d"]]:
        """Inputs and outputs of the tokens of n forwards, or fewer where the text ends; one where they lie in the cache."""
        if self.cache is None:
            return self._made(list(itertools.islice(self._stream_there(), n)))
        if self.forwards < self.cache.whole:
            shard = self.cache.read(self.forwards)
            self.forwards, self.position = self.forwards + 1, {"read": shard.read, "leftover": shard.leftover}
            if self.scales is None:  # those of all its shards
                self._scale_by(shard.scales.to(self.device))
            return [sent(shard.kept, self.device)]
        batches, positions = [], []
        for tokens in itertools.islice(self._stream_there(), n):
            batches.append(tokens)
            positions.append(self.stream.state_dict())
        made, served = self._made(batches), []
        for i, (kept, position) in enumerate(zip(made, positions), self.forwards - len(made)):
            shard = Shard(kept.cpu(), self.scales.cpu(), position["read"], position["leftover"])
            served.append(sent(self.cache.write(i, shard, leads=self.harvesters == 1 or world().leads), self.device))
        return served

    def _stream_there(self) -> TokenStream:
        """The text, taken up where the last forward left it."""
        if self.position is not None:
            self.stream.load_state_dict(self.position)
            self.position = None
        return self.stream

    def _scale_by(self, scales: Float[Tensor, "two layer"]) -> None:
        self.scales, self.scaled = scales, bool((scales != 1).any())

    def _made(self, batches: list[Int[Tensor, "batch seq"]]) -> list[Float[Tensor, "two layer token d"]]:
        """Inputs and outputs of the tokens of each batch; each is made by another process."""
        self.forwards += len(batches)
        if self.scales is None and batches:
            captured = capture(self.target, batches[0], self.config.layers)
            self._scale_by(self._first_scales(captured))
            if len(batches) == 1:
                return [self._stacked(captured)]
        mine = world().rank if self.harvesters > 1 else 0
        kept = [
            self._activations(tokens) if i == mine else self.buffer.new_empty(self.harvested)
            for i, tokens in enumerate(batches)
        ]
        return [from_process(i, made) for i, made in enumerate(kept)] if self.harvesters > 1 else kept

    def _activations(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "two layer token d"]:
        return self._stacked(capture(self.target, tokens, self.config.layers))

    def _stacked(self, captured: Captured) -> Float[Tensor, "two layer token d"]:
        """`stack_tokens`, on the store's device."""
        scales = self.scales.to(captured.inputs.device) if self.scaled else None  # type: ignore[union-attr]
        return stack_tokens(captured, scales).to(self.device)

    def _first_scales(self, captured: Captured) -> Float[Tensor, "two layer"]:
        """1 where the activations are far below fp16's largest number, else the power of two that brings them there."""
        largest = torch.stack(
            [reduce(part[:, :, 1:].float().abs(), "layer batch seq d -> layer", "max") for part in captured[:2]]
        )
        for layer, sides in zip(self.config.layers, largest.isfinite().all(0).tolist()):
            if not sides:
                raise ValueError(f"layer {layer} of {self.target.name!r} writes or is given NaN or infinity")
        powers = [[_power_of_two(value) for value in side] for side in largest.tolist()]
        return torch.tensor(powers, device=self.device)

    def _refill(self) -> None:
        """Put new tokens where the served ones were, mix all, and serve half; all of it once the text has ended."""
        self.aside.join()
        self.free, self.order = self._empty(), torch.cat([self.order[self.served :], self.early])
        self.early = self.early[:0]
        while (lacking := self.buffer_tokens - len(self.order)) > 0:
            forwards = self._harvest(min(self.harvesters, -(-lacking // self.harvested[2])))
            if not forwards:
                break
            for kept in forwards:
                slots, self.free = self.free.tensor_split([kept.shape[2]])
                self._put(kept, slots)
                self.order = torch.cat([self.order, slots])
        finite, self.whole = self.whole.tolist(), torch.ones_like(self.whole)
        for layer, is_finite in zip(self.config.layers, finite):
            if not is_finite:
                raise ValueError(
                    f"an activation of layer {layer} of {self.target.name!r} is not finite, or over {ROOM} times as large as "
                    "the first forward's: leave the layer out, or harvest more sequences per forward"
                )
        n = len(self.order)
        self.order = self.order[torch.randperm(n, generator=self.generator)]
        self.slots = sent(self.order, self.buffer.device)
        share = max(n // 2, self.batch_tokens) if n >= self.buffer_tokens else n
        self.served, self.serve = 0, share // self.batch_tokens * self.batch_tokens

    def _empty(self) -> Int[Tensor, "slot"]:
        """Slots without a token to give out, in the order in which they are filled."""
        return torch.cat([self.free, self.order[: self.served]])[len(self.early) :]

    def _put(self, kept: Float[Tensor, "two layer token d"], slots: Int[Tensor, "token"]) -> None:
        self.buffer.index_copy_(2, sent(slots, self.buffer.device), kept)
        self.whole &= kept.isfinite().flatten(2).all(2).all(0)

    def _harvest_ahead(self) -> None:
        """One forward of the next refill, where it will be asked for and has room already."""
        empty = self._empty()[: self.harvested[2]]
        lacking = self.buffer_tokens - (len(self.order) - self.serve) - len(self.early)
        if lacking <= 0 or len(empty) < self.harvested[2]:
            return
        with self.aside.begun():
            for kept in self._harvest(1):
                self._put(kept, empty)
                self.early = torch.cat([self.early, empty])

    def __iter__(self) -> "ActivationsStore":
        return self

    def __next__(self) -> ActivationBatch:
        if self.served == self.serve:
            self._refill()
        if not self.serve:
            raise StopIteration
        slots = self.slots[self.served : self.served + self.batch_tokens]
        self.served += self.batch_tokens
        batch = self.buffer.index_select(2, slots).float()
        if self.ahead:
            self._harvest_ahead()
        return ActivationBatch(*(batch * self.scales[:, :, None, None] if self.scaled else batch))

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the batches to come, the buffer itself (no copy of it) included."""
        self.aside.join()
        return {
            "buffer": self.buffer, "early": self.early, "whole": self.whole, "free": self.free, "order": self.order,
            "served": self.served, "serve": self.serve, "forwards": self.forwards,
            "stream": self.position or self.stream.state_dict(), "generator": self.generator.get_state(),
            "stats": tuple(self.stats), "scales": self.scales,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.aside.join()
        self.buffer.copy_(state["buffer"])
        self.free, self.order, self.early = state["free"].cpu(), state["order"].cpu(), state["early"].cpu()
        self.whole = state["whole"].to(self.device)
        self.slots = sent(self.order, self.buffer.device)
        self.served, self.serve, self.forwards = state["served"], state["serve"], state["forwards"]
        self.position = state["stream"]
        self.generator.set_state(state["generator"].cpu())
        self.stats = ActivationStats(*(v.to(self.device) if isinstance(v, Tensor) else v for v in state["stats"]))
        self._scale_by(state["scales"].to(self.device))


def _power_of_two(largest: float) -> float:
    """The smallest one, from 1 on, by which fp16 holds ROOM times the largest value."""
    fits = torch.finfo(torch.float16).max / ROOM
    return 2.0 ** math.ceil(math.log2(largest / fits)) if largest > fits else 1.0


def stack_tokens(
    captured: Captured, scales: Float[Tensor, "two layer"] | None = None
) -> Float[Tensor, "two layer token d"]:
    """Inputs and outputs side by side in fp16, divided by `scales`, without the first position of each sequence."""
    parts = (rearrange(part[:, :, 1:], "layer batch seq d -> layer (batch seq) d") for part in captured[:2])
    if scales is None:
        return torch.stack([part.half() for part in parts])
    return torch.stack([(part / scale[:, None, None]).half() for part, scale in zip(parts, scales)])


def measure(
    buffer: Float[Tensor, "two layer slot d"], slots: Int[Tensor, "token"], scales: Float[Tensor, "two layer"]
) -> ActivationStats:
    """Means, scales and variances of the tokens in these slots, times `scales`; one layer in fp32 at a time."""

    def one(side: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        a = buffer[side, layer, slots].float() * scales[side, layer]
        mean = a.mean(0)
        return mean, a.shape[1] ** 0.5 / a.norm(dim=1).mean(), (a - mean).square().sum(1).mean()

    layers = range(buffer.shape[1])
    x_mean, x_scale, _ = (torch.stack(column) for column in zip(*(one(0, layer) for layer in layers)))
    y_mean, y_scale, y_variance = (torch.stack(column) for column in zip(*(one(1, layer) for layer in layers)))
    return ActivationStats(x_mean, x_scale, y_mean, y_scale, y_variance, len(slots))


def pooled(parts: Sequence[ActivationStats]) -> ActivationStats:
    """The statistics of all tokens together from those of parts of them."""
    n = sum(part.n_tokens for part in parts)

    def mean(values: Sequence[Tensor]) -> Tensor:
        return torch.stack([value * (part.n_tokens / n) for value, part in zip(values, parts)]).sum(0)

    x_mean, y_mean = mean([part.x_mean for part in parts]), mean([part.y_mean for part in parts])
    x_scale, y_scale = (1 / mean([1 / part[i] for part in parts]) for i in (1, 3))
    between = [(part.y_mean - y_mean).square().sum(1) for part in parts]
    variance = mean([part.y_variance + apart for part, apart in zip(parts, between)])
    return ActivationStats(x_mean, x_scale, y_mean, y_scale, variance, n)


def check_varies(target: TargetModel, layers: Sequence[int], stats: ActivationStats) -> None:
    """Raises ValueError for a layer that writes the same on every token, as a pruned MLP does: nothing is to be learnt."""
    size = stats.y_mean.shape[-1] / stats.y_scale.square()  # (E‖y‖)²; 0 where y_scale is infinite
    constant = stats.y_variance <= 1e-10 * size
    if names := [layer for layer, same in zip(layers, constant.tolist()) if same]:
        raise ValueError(
            f"layer {', '.join(map(str, names))} of {target.name!r} writes the same on every token: leave it out of the layers"
        )
