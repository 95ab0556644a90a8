"""Does the engine change what is learnt? Fast and dense path on the same 500 batches, from the same weights.

Both are BatchTopK transcoders of one layer of the embedded model, trained by the same `training_step`. The dense one
selects in float32 and reaches every sum and gradient by plain matrix products. The fast one selects through bf16 upper
bounds, also where bf16 products are emulated. A third number says what the bounds are for: the share of the winners
that selection by plain bf16 pre-activations would miss, every 50 steps.

    python benchmarks/fast_vs_dense.py        # writes results/fast_vs_dense.csv and .png
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
import tyro
from torch import Tensor

from activation_store import ActivationsStore, DataConfig
from config import BatchTopK, EncoderConfig, TrainConfig
from logs import write_csv
from sparse_encode import dense_encode_batch_topk
from sparse_ops import Codes, dense_decode, from_dense, to_dense
from target_models import load_target
from training import annealed_k, schedule, start_run, training_step
from transcoder import BatchTopKTranscoder

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@dataclass(frozen=True)
class Settings:
    layer: int = 1
    steps: int = 500
    batch: int = 2048
    d_dict: int = 1536
    k: int = 16
    seed: int = 0
    output: Path = Path(__file__).parent / "results" / "fast_vs_dense.csv"


class DenseTranscoder(BatchTopKTranscoder):
    """The slow twin: autograd sees (batch, d_dict) matrices alone."""

    def encode(self, x: Tensor) -> Codes:
        e = self.encoder
        a = dense_encode_batch_topk(x * self.x_scale, e.W_enc, e.b_enc, e.k_now)
        return from_dense(a, a.detach() > 0)

    def encode_with_penalty(self, x: Tensor, y: Tensor, variance: Tensor) -> tuple[Codes, Tensor]:
        return self.encode(x), x.new_zeros(())

    def decode(self, codes: Codes) -> Tensor:
        return (dense_decode(to_dense(codes), self.W_dec) + self.b_dec) / self.y_scale


@torch.no_grad()
def missed_by_bf16(coder: BatchTopKTranscoder, x: Tensor) -> float:
    """Share of the float32 winners that the k·B largest plain bf16 pre-activations leave out."""
    codes, e = coder.encode(x), coder.encoder
    low = (x * coder.x_scale).bfloat16() @ e.W_enc.bfloat16().T + e.b_enc.bfloat16()
    chosen = torch.zeros(low.numel(), dtype=torch.bool)
    chosen[low.flatten().float().topk(len(codes.values)).indices] = True
    return 1 - chosen[codes.rows * codes.d_dict + codes.cols].float().mean().item()


def main(s: Settings) -> None:
    target = load_target("tiny", "cpu")
    store = ActivationsStore(target, DataConfig(layers=(s.layer,), batch_tokens=s.batch, seed=s.seed))
    tokens = s.steps * s.batch
    config = TrainConfig(tokens=tokens, seed=s.seed)
    runs = []
    for cls in (BatchTopKTranscoder, DenseTranscoder):
        shape = EncoderConfig(
            layer=s.layer, d_in=target.d_model, d_out=target.d_model, d_dict=s.d_dict, rule=BatchTopK(s.k)
        )
        coder = cls(shape, torch.Generator().manual_seed(s.seed))
        runs.append(start_run("", coder, store=store, config=config, folder=Path(tempfile.mkdtemp())))
    rows: list[tuple[object, ...]] = []
    for step in range(s.steps):
        batch, factor, fvus = next(store), schedule(step, s.steps, config), []
        for run in runs:
            run.coder.set_k(annealed_k(s.k, step, steps=s.steps, config=config))
            fvus.append(training_step(run, batch, config=config, lr=run.lr * factor)[1].item())
        last = step % 50 == 0 or step + 1 == s.steps
        missed = f"{missed_by_bf16(runs[0].coder, runs[0].coder.view(*batch, runs[0].rows)[0]):.5f}" if last else ""
        rows.append((step, f"{fvus[0]:.6f}", f"{fvus[1]:.6f}", missed))
        if last:
            print(*rows[-1], flush=True)
    write_csv(s.output, ("step", "fvu_fast", "fvu_dense", "winners_bf16_would_miss"), rows)
    draw(rows, s.output.with_suffix(".png"))


def draw(rows: list[tuple[object, ...]], path: Path) -> None:
    fast, dense = ([float(str(row[i])) for row in rows] for i in (1, 2))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    left.plot(fast, color="#0072b2", lw=2.5, alpha=0.5)
    left.plot(dense, "--", color="#222222", lw=0.8)
    left.annotate("fast (blue), dense (dashed)", (len(rows) * 0.35, fast[len(rows) // 3] + 0.08), fontsize=9)
    left.set(xlabel="step", ylabel="FVU of the batch", ylim=(0, 1.05))
    right.plot([abs(a - b) for a, b in zip(fast, dense)], color="#0072b2", lw=0.8)
    right.set(xlabel="step", ylabel="|FVU fast − FVU dense|", yscale="log")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["NN_BF16"] = "on"
    main(tyro.cli(Settings, description=__doc__))
