"""A training step of a coder, and of its dense twin: the same mathematics in plain matrix products."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from floors import Size
from gpu_bench import Step
from torch import Tensor

from activation_store import ActivationBatch
from checkpoints import build_coder
from coder import ActivationStats
from config import BatchTopK, CLTConfig, CoderConfig, EncoderConfig, JumpReLU, Relu, Rule, SAEConfig, TopK, TrainConfig
from losses import fvu
from sae import BaseAutoencoder
from sparse_encode import dense_encode_batch_topk, dense_encode_topk
from sparsity import SparseEncoder, jumprelu
from target_models import TargetModel
from training import CoderRun, adam, group_step


def run_of(config: CoderConfig, device: str) -> CoderRun:
    """A coder with decoders and scales that are neither zero nor one."""
    coder = build_coder(config, torch.Generator().manual_seed(0)).to(device).train()
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for W in coder.decoders:
            W.normal_(std=0.01, generator=generator)
        coder.constrain_weights()
        coder.x_scale.fill_(0.7)
        coder.y_scale.fill_(1.3 if coder.y_scale is not coder.x_scale else 0.7)
    rows, variance = list(range(len(config.layers))), float(config.d_in)
    stats = ActivationStats(*[torch.full((len(rows),), variance, device=device)] * 5, n_tokens=1)
    optimiser = adam(coder, TrainConfig(tokens=1), lr=1e-4)
    return CoderRun("", coder, rows, coder.variance(stats), optimiser, None, 1e-4)  # type: ignore[arg-type]


def batches(size: Size, layers: int, device: str) -> Iterator[ActivationBatch]:
    """Four batches in turn, so that no step finds its inputs in a cache."""
    generator = torch.Generator(device).manual_seed(2)
    made = torch.randn(4, 2, layers, size.batch, size.d, generator=generator, device=device)
    return itertools.cycle([ActivationBatch(*pair) for pair in made])


def our_loss(run: CoderRun, batch: ActivationBatch) -> Tensor:
    x, y = run.coder.view(*batch, run.rows)
    codes, penalty = run.coder.encode_with_penalty(x, y, run.variance)
    return fvu(y, run.coder.reconstruct(codes, x), run.variance).mean() + penalty


def dense_codes(encoder: SparseEncoder, z: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """Activations and penalty as the rules are defined, in plain matrix products."""
    match encoder.rule:
        case TopK(k):
            return dense_encode_topk(z, encoder.W_enc, encoder.b_enc, k), z.new_zeros(())
        case BatchTopK(k):
            return dense_encode_batch_topk(z, encoder.W_enc, encoder.b_enc, k), z.new_zeros(())
        case Relu(l1):
            a = torch.addmm(encoder.b_enc, z, encoder.W_enc.T).relu()
            return a, l1 * (a @ W_dec.norm(dim=1)).mean()
        case JumpReLU(l0, bandwidth, _, preact):
            pre = torch.addmm(encoder.b_enc, z, encoder.W_enc.T)
            a, gate = jumprelu(pre, encoder.log_theta, bandwidth)
            below = (encoder.log_theta.exp() - pre).relu() @ W_dec.norm(dim=1)
            return a, l0 * gate.sum(1).mean() + preact * below.mean()
    raise AssertionError(f"{encoder.rule} has no dense twin here")


def dense_loss(run: CoderRun, batch: ActivationBatch) -> Tensor:
    coder, (x, y) = run.coder, run.coder.view(*batch, run.rows)
    across, shift = isinstance(coder.config, CLTConfig), coder.b_dec if isinstance(coder, BaseAutoencoder) else 0.0
    wide, penalties = [], []
    for x_i, scale, encoder, W_dec in zip(x if across else x[None], coder.x_scale, coder.encoders, coder.decoders):
        a, penalty = dense_codes(encoder, x_i * scale - shift, W_dec)
        wide.append(a @ W_dec)
        penalties.append(penalty)
    if across:
        y_hat = (coder._gather(wide) + coder.b_dec[:, None]) / coder.y_scale[:, None, None]
    else:
        y_hat = (wide[0] + coder.b_dec) / coder.y_scale
    if coder.skip is not None:
        y_hat = y_hat + coder.skip_output(x)
    return fvu(y, y_hat, run.variance).mean() + torch.stack(penalties).mean()


def our_step(config: CoderConfig, given: Iterator[ActivationBatch], device: str) -> Step:
    run, train = run_of(config, device), TrainConfig(tokens=1, lr=1e-4)
    return lambda: group_step([run], next(given), config=train, factor=1.0)


def adam_step(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> Step:
    optimiser = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def dense_step(config: CoderConfig, given: Iterator[ActivationBatch], device: str) -> Step:
    run = run_of(config, device)
    return adam_step(list(run.coder.parameters()), lambda: dense_loss(run, next(given)))


def largest_error(config: CoderConfig, batch: ActivationBatch, device: str) -> float:
    """Of the loss and of every gradient: ‖ours − dense‖ / ‖dense‖, the largest."""
    found = []
    for loss_of in (our_loss, dense_loss):
        run = run_of(config, device)
        loss = loss_of(run, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in run.coder.parameters())])
    return max(((a - b).norm() / b.norm().clamp_min(1e-20)).item() for a, b in zip(*found))


def coder_configs(size: Size, rule: Rule) -> dict[str, CoderConfig]:
    d, d_dict = size.d, size.d_dict
    return {
        "SAE": SAEConfig(layer=0, site="mlp_out", d_in=d, d_dict=d_dict, rule=rule),
        "transcoder": EncoderConfig(layer=0, d_in=d, d_out=d, d_dict=d_dict, rule=rule),
        "transcoder, skip": EncoderConfig(layer=0, d_in=d, d_out=d, d_dict=d_dict, rule=rule, skip=True),
        "CLT, 2 layers": CLTConfig(layers=(0, 1), d_in=d, d_out=d, d_dict=d_dict, rule=rule),
    }


def clt_config(size: Size, layers: int) -> CLTConfig:
    return CLTConfig(layers=tuple(range(layers)), d_in=size.d, d_out=size.d, d_dict=size.d_dict, rule=BatchTopK(size.k))


class Rows:
    """An endless source of random sequences of a token folder, all of which lie on the device."""

    def __init__(self, target: TargetModel, batch: int, seed: int) -> None:
        ids = np.load(Path(target.data.path) / "train.npy").astype(np.int64)
        n = len(ids) // target.context
        self.rows = torch.from_numpy(ids[: n * target.context]).view(n, target.context).to(target.device)
        self.batch, self.generator = batch, torch.Generator(target.device).manual_seed(seed)

    def __next__(self) -> Tensor:
        return self.rows[
            torch.randint(len(self.rows), (self.batch,), generator=self.generator, device=self.rows.device)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
