"""Tokens → mixed, aligned batches of MLP inputs and outputs of L layers. One layer is not a special case.

    tokens ─ one forward of the target, stopped after the last hooked MLP ─▶ (x, y) of every layer, aligned by token
           ─ first position of each sequence dropped ─▶ buffer of `buffer_tokens` tokens ─ random half ─▶ batches

The buffer holds (inputs or outputs, layer, token, d) in fp16, mixed; it serves half of itself and refills that half, so
that every batch mixes tokens of many sequences. Memory: 2 · L · buffer_tokens · d · 2 bytes, twice that while mixing.
With `cache`, what the model gave is also written to disk (fp16) and read instead of the model by a later run; a
fingerprint of model, data and settings refuses a stale one.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from logs import atomic_path, write_json
from sparsity import ActivationStats
from target_models import Captured, TargetModel, capture
from token_stream import Split, TokenStream

MAX_FP16 = 65_504.0


@dataclass(frozen=True)
class DataConfig:
    layers: tuple[int, ...]
    batch_tokens: int  # tokens per training batch
    buffer_tokens: int = 65_536  # tokens mixed with each other
    model_batch: int = 32  # sequences per forward of the target
    seed: int = 0  # of the order of documents and of the mixing
    stats_tokens: int = 1_000_000  # scales and means are taken from this many tokens, or from one buffer if it is smaller
    cache: str = ""  # folder that keeps the activations between runs; empty: none

    def __post_init__(self) -> None:
        assert self.buffer_tokens >= 2 * self.batch_tokens, f"{self.buffer_tokens=} must be twice {self.batch_tokens=}"


class ActivationBatch(NamedTuple):
    inputs: Float[Tensor, "layer batch d_in"]  # fp32, on the target's device
    targets: Float[Tensor, "layer batch d_out"]


def check_layers(target: TargetModel, layers: tuple[int, ...]) -> None:
    outside = [layer for layer in layers if not 0 <= layer < target.n_layers]
    if outside or not layers:
        raise ValueError(f"layer {outside} is not among the layers 0…{target.n_layers - 1} of {target.name!r}")


class ActivationsStore:
    """An iterator of `ActivationBatch`; ends (StopIteration) when the token stream does."""

    def __init__(self, target: TargetModel, config: DataConfig, split: Split = "train") -> None:
        check_layers(target, config.layers)
        self.target, self.config, self.split = target, config, split
        self.stream = TokenStream(target.data, target.tokenizer, split, config.model_batch, target.context, config.seed)
        self.stream_position = 0  # batches of tokens read
        self.forwards = 0  # batches of tokens whose activations were put into the buffer
        self.generator = torch.Generator().manual_seed(config.seed)
        self.buffer = torch.empty(2, len(config.layers), 0, target.d_model, dtype=torch.float16, device=target.device)
        self.served = 0  # tokens at the buffer's start that were given out
        self.serve = 0  # tokens to give out before the next refill
        if config.cache:
            open_cache(Path(config.cache), self._fingerprint())
        self._refill()
        self.stats = measure(self.buffer[:, :, : config.stats_tokens])

    @property
    def bytes(self) -> int:
        """Memory of the mixing buffer at its largest: while it is being mixed, twice its content."""
        n = self.config.buffer_tokens + self.config.model_batch * self.target.context  # one forward more than it keeps
        return 2 * 2 * len(self.config.layers) * n * self.target.d_model * self.buffer.element_size()

    def _fingerprint(self) -> str:
        c, t = self.config, self.target
        settings = [t.name, t.fingerprint, dataclasses.astuple(t.data), c.layers, c.model_batch, t.context, c.seed, self.split]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def _harvest(self) -> Float[Tensor, "two layer token d"]:
        """Inputs and outputs of one forward's tokens, from the model or from the cache."""
        file = Path(self.config.cache) / f"{self.forwards:06d}.npy"
        if self.config.cache and file.exists():
            kept = torch.from_numpy(np.load(file)).to(self.target.device)
        else:
            for _ in range(self.forwards - self.stream_position):
                next(self.stream)
            kept = stack_tokens(capture(self.target, next(self.stream), self.config.layers))
            self.stream_position = self.forwards + 1
            if self.config.cache:
                with atomic_path(file) as temporary, temporary.open("wb") as f:
                    np.save(f, kept.cpu().numpy())
        self.forwards += 1
        return kept

    def _refill(self) -> None:
        """Drop what was served, fill up, mix, and serve half."""
        parts = [self.buffer[:, :, self.served :]]
        n = parts[0].shape[2]
        while n < self.config.buffer_tokens:
            parts.append(self._harvest())
            n += parts[-1].shape[2]
        order = torch.randperm(n, generator=self.generator).to(self.buffer.device)
        self.buffer = torch.cat(parts, dim=2)[:, :, order]
        batches = max(1, n // 2 // self.config.batch_tokens)
        self.served, self.serve = 0, batches * self.config.batch_tokens

    def __iter__(self) -> "ActivationsStore":
        return self

    def __next__(self) -> ActivationBatch:
        if self.served == self.serve:
            self._refill()
        inputs, targets = self.buffer[:, :, self.served : self.served + self.config.batch_tokens].float()
        self.served += self.config.batch_tokens
        return ActivationBatch(inputs, targets)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the batches to come, the buffer included."""
        return {
            "buffer": self.buffer, "served": self.served, "serve": self.serve, "forwards": self.forwards,
            "stream": self.stream.state_dict(), "stream_position": self.stream_position,
            "generator": self.generator.get_state(), "stats": tuple(self.stats),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer = state["buffer"].to(self.target.device)
        self.served, self.serve, self.forwards = state["served"], state["serve"], state["forwards"]
        self.stream.load_state_dict(state["stream"])
        self.stream_position = state["stream_position"]
        self.generator.set_state(state["generator"])
        self.stats = ActivationStats(*state["stats"])


def stack_tokens(captured: Captured) -> Float[Tensor, "two layer token d"]:
    """Inputs and outputs side by side in fp16, without the first position of each sequence."""
    both = torch.stack([captured.inputs[:, :, 1:].flatten(1, 2).float(), captured.outputs[:, :, 1:].flatten(1, 2).float()])
    largest = both.abs().amax().item()
    assert largest < MAX_FP16, f"an activation of {largest:.3g} does not fit the fp16 buffer"
    return both.half()


def measure(buffer: Float[Tensor, "two layer token d"]) -> ActivationStats:
    """Means, scales and variances of a sample of tokens."""
    x, y = buffer.float()
    y_mean = y.mean(1)
    return ActivationStats(
        x_mean=x.mean(1),
        x_scale=x.shape[-1] ** 0.5 / x.norm(dim=-1).mean(1),
        y_mean=y_mean,
        y_scale=y.shape[-1] ** 0.5 / y.norm(dim=-1).mean(1),
        y_variance=(y - y_mean[:, None]).square().sum(-1).mean(1),
        n_tokens=x.shape[1],
    )


def open_cache(folder: Path, fingerprint: str) -> None:
    """Create the cache or check that it holds these activations; raises ValueError where it holds others."""
    file = folder / "fingerprint.json"
    if not file.exists():
        write_json(file, fingerprint)
    found = json.loads(file.read_text())
    if found != fingerprint:
        raise ValueError(f"activation cache {folder} is stale (it holds {found}, this run needs {fingerprint}): delete it")
