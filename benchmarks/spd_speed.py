"""How much faster is SPD here than a straightforward implementation in the published style, at equal losses?

The reference, below: one seed at a time, each component's MLP by einsum with its hidden units materialised, Δ formed in
every masked pass. This project: three seeds stacked, the compiled gate, the Δ identity. Both start from the same
weights, see the same batches and draw the same masks; their losses are compared before anything is timed.

    python benchmarks/spd_speed.py        # writes benchmarks/results/spd_speed.csv; minutes

One thread; CPU seconds of the process (not wall time), so that a shared machine disturbs less. Steps alternate between
the two, and the fastest of each is taken.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from config import GateConfig, Lp, Recon, SPDConfig, SPDTrainConfig
from devices import keep_freed_memory
from logs import write_csv
from spd_gates import lower, upper
from spd_model import ComponentModel
from spd_training import SPDTrainer
from toy_models import TMS, TOYS, Toy, ToyBatches

COLUMNS = ["toy", "C", "batch", "seeds", "reference_seed_steps_per_s", "stacked_seed_steps_per_s", "ratio",
           "largest_loss_difference", "torch", "clock"]  # fmt: skip
CASES = (("tms_5-2", 20, 3e-3, 1.0), ("tms_40-10", 200, 1e-4, 2.0))


@dataclass(frozen=True)
class Settings:
    batch: int = 4096
    seeds: int = 3
    repeats: int = 5
    output: Path = Path(__file__).parent / "results" / "spd_speed.csv"


class Reference:
    """One seed: V, U of the tied pair, an MLP per component and module; StochasticRecon + Layerwise + minimality."""

    def __init__(self, model: ComponentModel, minimality: float, p: float) -> None:
        self.W = model.target_model.linear1.weight[0]
        self.b = model.target_model.linear2.bias[0]
        state = {key: value[0].clone() for key, value in model.state_dict().items() if not key.endswith("bias")}
        self.P = {key: value.requires_grad_() for key, value in state.items()}
        self.optimiser = torch.optim.AdamW(self.P.values(), lr=1e-3, weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(0)
        self.minimality, self.p = minimality, p

    def weights(self, path: str) -> tuple[Tensor, Tensor, Tensor]:
        V, U = self.P["_components.linear1.V"], self.P["_components.linear1.U"]
        return (self.W, V, U) if path == "linear1" else (self.W.T, U.T, V.T)

    def gate(self, path: str, x: Tensor) -> Tensor:
        h = torch.einsum("bd,dc->bc", x, self.weights(path)[1])[..., None]
        W1, b1, W2, b2 = (self.P[f"_ci_fns.{path}.layers.{i}.{n}"] for i in (0, 2) for n in "Wb")
        hidden = F.gelu(torch.einsum("bci,cio->bco", h, W1) + b1)
        return (torch.einsum("bci,cio->bco", hidden, W2) + b2)[..., 0]

    def masked(self, path: str, x: Tensor, mask: Tensor, delta_mask: Tensor) -> Tensor:
        W, V, U = self.weights(path)
        delta = W - torch.einsum("dc,co->od", V, U)
        return torch.einsum("bc,co->bo", (x @ V) * mask, U) + delta_mask[:, None] * (x @ delta.T)

    def forward(self, x: Tensor, masks: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        h = self.masked("linear1", x, *masks["linear1"]) if "linear1" in masks else x @ self.W.T
        out = self.masked("linear2", h, *masks["linear2"]) if "linear2" in masks else h @ self.W
        return torch.relu(out + self.b)

    def draw(self, g: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            path: (
                v + (1 - v) * torch.rand(v.shape, generator=self.generator),
                torch.rand(len(v), generator=self.generator),
            )
            for path, v in g.items()
        }

    def step(self, x: Tensor) -> float:
        with torch.no_grad():
            inputs = {"linear1": x, "linear2": x @ self.W.T}
            clean = torch.relu(inputs["linear2"] @ self.W + self.b)
        z = {path: self.gate(path, value) for path, value in inputs.items()}
        g_lo = {path: lower(value) for path, value in z.items()}
        recon = (self.forward(x, self.draw(g_lo)) - clean).square().mean()
        each = self.draw(g_lo)
        for path, mask in each.items():
            recon = recon + (self.forward(x, {path: mask}) - clean).square().mean() / len(each)
        loss = recon + self.minimality * sum((upper(v) + 1e-12).pow(self.p).sum(1).mean() for v in z.values())
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.item()


def stacked(toy: Toy, C: int, minimality: float, p: float, seeds: int) -> SPDTrainer:
    g = torch.Generator().manual_seed(1)
    W = torch.randn(seeds, toy.width, toy.features, generator=g) / toy.width**0.5
    target = TMS(W, torch.zeros(seeds, toy.features), 0).requires_grad_(False)
    config = SPDConfig(
        components=(("linear1", C), ("linear2", C)),
        gate=GateConfig(kind="mlp", hidden=(16,)),
        tied=(("linear1", "linear2"),),
    )
    model = ComponentModel(target, config, g)
    model.importances.compile_gates()
    recon = (Recon(coefficient=1.0), Recon(coefficient=1.0, routing="layerwise"))
    return SPDTrainer(
        model,
        SPDTrainConfig(
            steps=1000, lr=1e-3, recon=recon, minimality=Lp(coefficient=minimality, p=(p, p)), schedule="constant"
        ),
        False,
    )


def seconds(function: Callable[[Tensor], object], x: Tensor) -> float:
    began = time.process_time()
    function(x)
    return time.process_time() - began


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()  # as our trainers do; here it holds for both
    rows: list[list[object]] = []
    for name, C, minimality, p in CASES:
        toy = TOYS[name]
        alone = stacked(toy, C, minimality, p, 1)
        reference = Reference(alone.model, minimality, p)
        batches = [next(ToyBatches(toy, s.seeds, s.batch, i)) for i in range(s.repeats)]
        worst = 0.0
        for x in batches[:3]:  # the same weights, batches and masks: the same losses, step after step
            ours, theirs = alone.step(x[:1])[0].item(), reference.step(x[0])
            worst = max(worst, abs(ours - theirs) / theirs)
        assert worst < 1e-3, f"{name}: losses differ by {worst:.1e}"
        trainer = stacked(toy, C, minimality, p, s.seeds)
        trainer.step(batches[0])
        times = [(seconds(reference.step, x[0]), seconds(trainer.step, x)) for x in batches]
        slow, fast = (min(column) for column in zip(*times))
        fast /= s.seeds
        speeds = [f"{v:.2f}" for v in (1 / slow, 1 / fast, slow / fast)]
        rows.append([name, C, s.batch, s.seeds, *speeds, f"{worst:.1e}",
                     torch.__version__, "CPU seconds, 1 thread, shared machine"])  # fmt: skip
        print(*zip(COLUMNS, rows[-1]))
    write_csv(s.output, COLUMNS, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))
