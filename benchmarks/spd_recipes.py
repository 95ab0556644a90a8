"""Which recipe decomposes `tiny` best? Variants of one SPD recipe on the same text, and the training of the one that is shipped.

    python benchmarks/gpu.py --prepare 6000000                   # beforehand, on any machine: the token folder
    python benchmarks/spd_recipes.py --steps 400 --batch 32      # every variant; --only NAME… for some: processes share a table
    python benchmarks/spd_recipes.py --train best --tokens 50000000 --minutes 20 --batch 32 --output RESULTS

Variants train on equal tokens from equal seeds, and each is measured by the project's ruler on the tuning split: ΔCE and KL
`frozen` and `free` with the masks of deployment (a component is on where its importance is positive; Δ off) at the L0
that the variant reached, and the KL that 20 steps of PGD on shared sources find. `base` is how the first
shipped decomposition was trained; names with a number have that coefficient, so that variants can be compared at equal L0.

The goal was ΔCE 0.30 frozen and 0.60 free at L0 32, where 2 million tokens of `base` gave 0.62 and 1.19 at 36; what is shipped,
`shipped-lr-4e-3-l0-30` after 10 million, has 0.19 and 0.31 at 30 and 25. What `all` is made of, and why:
  - a third of the sequences under running gates: what `free` does. No other term shows a gate the stream that
    earlier masks have changed; a third under deployed masks, which `frozen` needs.
  - C = 768 neuron-aligned components: V U = W at the start, and as many as neurons. Gates of 128 hidden units keep the
    checkpoint under 15 MB in fp16.
  - smooth L0: the pull on a gate is bounded and sits near 0, where Lp's grows without bound as p falls.
`through` gives an open gate under deployed masks the gradient of its mask, which tells whether its component helps: without
it, deployed masks can open a gate but never close it, and only minimality and stochastic masks do.
Training needs torch, einops, jaxtyping, numpy, tqdm and transformers alone.
"""

import argparse
import csv
import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # nothing is installed on a bare machine

import torch
from gpu_steps import Rows
from torch import Tensor

from checkpoints import CONFIG, TrainingRecord, save_checkpoint
from config import (
    Aim,
    Frequency,
    GateConfig,
    Locality,
    Lp,
    Merged,
    Recon,
    SmoothL0,
    SPDConfig,
    SPDTrainConfig,
)
from devices import bf16_is_fast, check_device, device_name
from evaluation import evaluate, held_out
from logs import errors_in_one_line, git_commit, write_json
from spd_model import ComponentModel
from spd_replacement import SPDReplacement
from spd_training import SPDTrainer, train_spd
from target_models import TargetModel, load_target, mlp_matrices
from token_stream import DatasetSpec

HERE = Path(__file__).parent
LARGEST = 15e6  # bytes of a shipped checkpoint
PGD = Recon(coefficient=1.0, source="pgd", steps=20, step_size=0.1)


@dataclass(frozen=True, kw_only=True)
class Variant:
    components: int  # of every matrix
    gate: GateConfig
    train: SPDTrainConfig  # `steps` is another in every run

    def but(self, **changes: Any) -> "Variant":
        """With other settings of its training."""
        return replace(self, train=replace(self.train, **changes))

    def model(self, target: TargetModel) -> ComponentModel:
        paths = [path for layer in range(target.n_layers) for path in mlp_matrices(target, layer)]
        config = SPDConfig(components=tuple((path, self.components) for path in paths), gate=self.gate)
        return ComponentModel(target.model, config, torch.Generator().manual_seed(self.train.seed)).to(target.device)


def recon(*terms: Recon | Merged) -> tuple[Recon | Merged, ...]:
    """Terms that share the sequences of a batch evenly."""
    return tuple(replace(term, coefficient=1 / len(terms)) for term in terms)


def lp(coefficient: float) -> Lp:
    return Lp(coefficient=coefficient, p=(2.0, 0.4))


def smooth(coefficient: float) -> SmoothL0:
    return SmoothL0(coefficient=coefficient)


SUBSETS = Recon(coefficient=1.0, source="stochastic", routing="subset")
DEPLOYED, RUNNING = Recon(coefficient=1.0, source="deployed"), Recon(coefficient=1.0, source="running")
DEPLOYED_THROUGH, RUNNING_THROUGH = (replace(term, straight_through=True) for term in (DEPLOYED, RUNNING))
LOCAL = GateConfig(kind="shared_mlp", hidden=(192,))
CAUSAL = GateConfig(
    kind="global_shared_transformer", hidden=(384,), d_model=192, blocks=2, heads=6, taps=("*.c_fc",)
)  # as many parameters as LOCAL gates; it reads the stream before every MLP
BASE = Variant(
    components=512, gate=LOCAL, train=SPDTrainConfig(
        steps=1, lr=1e-3, recon=recon(SUBSETS, DEPLOYED), minimality=lp(5e-4), distance="kl", split=True,
        faithfulness=1e4, final=0.1, warmup=0.02, start="least_squares", clip=1.0, metrics_every=20,
    ),
)  # fmt: skip
ALL = replace(BASE, components=768, gate=replace(LOCAL, hidden=(128,))).but(
    start="neurons", minimality=smooth(5e-4), recon=recon(SUBSETS, DEPLOYED, RUNNING)
)
THROUGH = ALL.but(recon=recon(SUBSETS, DEPLOYED_THROUGH, RUNNING_THROUGH))
AIMED = ALL.but(
    recon=recon(Merged(coefficient=1.0), DEPLOYED, RUNNING),
    minimality=SmoothL0(coefficient=3e-4, between=(0.0, 0.5)),
    aim=Aim(l0=(250.0, 28.0)),
)
# The frequency term takes over half of the pull of `base`: log₂(1 + 10⁶ · 0.06) is 16. Relative faithfulness of 200 weighs a
# squared error as 10⁴ of the absolute does, at the mean square 0.02 of the weights.
VARIANTS = {
    "base": BASE,
    "base-2.5e-4": BASE.but(minimality=lp(2.5e-4)),
    "base-1e-3": BASE.but(minimality=lp(1e-3)),
    "smooth-2.5e-4": BASE.but(minimality=smooth(2.5e-4)),
    "smooth-5e-4": BASE.but(minimality=smooth(5e-4)),
    "smooth-1e-3": BASE.but(minimality=smooth(1e-3)),
    "frequency": BASE.but(minimality=lp(2.5e-4), frequency=Frequency(coefficient=1.6e-5, positions=1e6)),
    "relative-200": BASE.but(relative=True, faithfulness=200.0),
    "relative-1000": BASE.but(relative=True, faithfulness=1000.0),
    "c768": replace(BASE, components=768),
    "neurons": replace(BASE, components=768).but(start="neurons"),
    "locality-3e-5": BASE.but(locality=Locality(coefficient=3e-5)),
    "locality-1e-3": BASE.but(locality=Locality(coefficient=1e-3)),
    "merged": BASE.but(recon=recon(Merged(coefficient=1.0), DEPLOYED)),
    "causal": replace(BASE, gate=CAUSAL),
    "muon": BASE.but(optimiser="muon"),
    "deployed": BASE.but(recon=recon(DEPLOYED)),
    "running": BASE.but(recon=recon(SUBSETS, DEPLOYED, RUNNING)),
    "running-deployed": BASE.but(recon=recon(RUNNING, DEPLOYED)),
    "through": BASE.but(recon=recon(SUBSETS, DEPLOYED_THROUGH)),
    "through-1e-3": BASE.but(recon=recon(SUBSETS, DEPLOYED_THROUGH), minimality=lp(1e-3)),
    "all": ALL,
    "all-2.5e-4": ALL.but(minimality=smooth(2.5e-4)),
    "all-1e-3": ALL.but(minimality=smooth(1e-3)),
    "all-muon": ALL.but(optimiser="muon"),
    "all-through": THROUGH,
    "all-through-1e-3": THROUGH.but(minimality=smooth(1e-3)),
    "all-through-2e-3": THROUGH.but(minimality=smooth(2e-3)),
    "aimed": AIMED,
    "aimed-deployed": AIMED.but(
        recon=(
            Merged(coefficient=0.1),
            replace(DEPLOYED_THROUGH, coefficient=0.45),
            replace(RUNNING_THROUGH, coefficient=0.45),
        )
    ),
    "all-merged": ALL.but(recon=recon(Merged(coefficient=1.0), DEPLOYED, RUNNING)),
}
# Peak rates, of the recipe that was shipped before the best one.
BEFORE = VARIANTS["aimed-deployed"]
VARIANTS |= {
    "shipped-lr-5e-4": BEFORE.but(lr=5e-4, gate_lr=1e-3),
    "shipped-lr-2e-3": BEFORE.but(lr=2e-3, gate_lr=1e-3),
    "shipped-lr-4e-3": BEFORE.but(lr=4e-3, gate_lr=1e-3),
    "shipped-lr-8e-3": BEFORE.but(lr=8e-3, gate_lr=1e-3),
    "shipped-lr-1.6e-2": BEFORE.but(lr=1.6e-2, gate_lr=1e-3),
    "shipped-lr-2e-3-gates-2e-3": BEFORE.but(lr=2e-3),
    "shipped-lr-4e-3-l0-30": BEFORE.but(lr=4e-3, gate_lr=1e-3, aim=Aim(l0=(250.0, 30.0))),
    "shipped-gates-5e-4": BEFORE.but(gate_lr=5e-4),
    "shipped-gates-2e-3": BEFORE.but(gate_lr=2e-3),
    "shipped-gates-4e-3": BEFORE.but(gate_lr=4e-3),
}
# One thing changed of the best recipe, all at the L0 that it aims at. A transformer gate reads all modules at once, so none runs.
BEST = VARIANTS["shipped-lr-4e-3-l0-30"]
ADVERSARY, *_ = BEST.train.recon
VARIANTS |= {
    "best": BEST,
    "best-lr-8e-3": BEST.but(lr=8e-3),
    "best-gates-2e-3": BEST.but(gate_lr=2e-3),
    "best-final-0.01": BEST.but(final=0.01),
    "best-muon": BEST.but(optimiser="muon"),
    "best-lp": BEST.but(minimality=lp(3e-4)),
    "best-without-adversary": BEST.but(recon=recon(DEPLOYED_THROUGH, RUNNING_THROUGH)),
    "best-stochastic": BEST.but(recon=(replace(SUBSETS, coefficient=0.1), *BEST.train.recon[1:])),
    "best-without-running": BEST.but(recon=(ADVERSARY, replace(DEPLOYED_THROUGH, coefficient=0.9))),
    "best-not-through": BEST.but(recon=(ADVERSARY, *(replace(term, coefficient=0.45) for term in (DEPLOYED, RUNNING)))),
    "best-least-squares": BEST.but(start="least_squares"),
    "best-frequency": BEST.but(frequency=Frequency(coefficient=1.6e-5, positions=1e6)),
    "best-relative": BEST.but(relative=True, faithfulness=200.0),
    "best-locality": BEST.but(locality=Locality(coefficient=1e-3)),
}


# ---------------------------------------------------------------------------------------------------------- measuring


def pgd_kl(trainer: SPDTrainer, sequences: Tensor) -> float:
    """KL under the sources, the same at every position of a batch of 16 sequences, that 20 steps of ascent find."""
    found = []
    for batch in sequences.split(16):
        z, clean = trainer.importances(batch)
        g_lo = {path: trainer.model.lower(logit).detach() for path, logit in z.items()}
        found.append(trainer.recon(0, PGD, g_lo, clean, batch).detach())
    return torch.stack(found).mean().item()


def measured(
    args: argparse.Namespace, target: TargetModel, variant: Variant, model: ComponentModel
) -> dict[str, float]:
    text = held_out(target, args.eval_tokens, "tuning")
    ruler = SPDReplacement(target, model.eval())
    points = evaluate(target, [ruler], text, ("frozen", "free")).points
    row = {"components": variant.components, "gate_parameters": ruler.gate_parameters(ruler.layers)}
    for point in points:
        row |= {f"l0_{point.protocol}": point.l0, f"dce_{point.protocol}": point.ce_degradation}
        row[f"kl_{point.protocol}"] = point.kl
    attacked = SPDTrainer(model, replace(variant.train, recon=(PGD,), optimiser="adamw"), args.half)
    row["kl_pgd20"] = pgd_kl(attacked, text.tokens[: args.attacked].to(target.device))
    return {name: round(value, 4) for name, value in row.items()}


def append(file: Path, row: dict[str, object]) -> None:
    """One more line of a table that other processes write to too."""
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as table:
        fcntl.flock(table, fcntl.LOCK_EX)
        writer = csv.DictWriter(table, list(row), lineterminator="\n")
        if table.seek(0, os.SEEK_END) == 0:
            writer.writeheader()
        writer.writerow(row)


def target_of(args: argparse.Namespace) -> TargetModel:
    return replace(load_target("tiny", check_device(args.device)), data=DatasetSpec(str(args.text), tokenised=True))


def result(
    args: argparse.Namespace, target: TargetModel, name: str, model: ComponentModel, *, steps: int, seconds: float
) -> None:
    """Measure what was trained, and append its row."""
    about = {"variant": name, "device": device_name(target.device.type), "steps": steps, "batch": args.batch,
             "tokens": steps * args.batch * target.context, "seconds_per_step": round(seconds / steps, 4)}  # fmt: skip
    append(args.table, about | measured(args, target, VARIANTS[name], model) | {"commit": git_commit() or "unknown"})


def compare(args: argparse.Namespace, names: list[str]) -> None:
    """Train each variant from the same start on the same text, and measure it."""
    target = target_of(args)
    for name in names:
        variant = VARIANTS[name]
        model, rows = variant.model(target), Rows(target, args.batch, seed=0)
        train = replace(variant.train, steps=args.steps, checkpoint_every=10**9)
        with tempfile.TemporaryDirectory() as scratch:
            seconds = train_spd(model, rows, train, Path(scratch), name, args.half)
        result(args, target, name, model, steps=args.steps, seconds=seconds)


# ----------------------------------------------------------------------------------------------------------- training


def milliseconds(trainer: SPDTrainer, rows: Rows) -> float:
    """Of a step, over ten and more, for five seconds, after three that allocate; `tolist` waits for the device."""
    for _ in range(3):
        trainer.step(next(rows))
    began, steps = time.perf_counter(), 0
    while steps < 10 or (steps < 1000 and time.perf_counter() - began < 5):
        trainer.step(next(rows)).tolist()
        steps += 1
    return 1e3 * (time.perf_counter() - began) / steps


def train(args: argparse.Namespace, name: str) -> None:
    """The decomposition that is shipped, from its start; called again after an interruption, it goes on where it was.

    The first call times a step and writes into plan.json how many fit into the minutes, so that the cosine ends in time:
    for training, of what start-up has left, all but a tenth and a minute for measuring.
    """
    began, target, variant, folder = time.monotonic(), target_of(args), VARIANTS[name], args.output
    if (folder / CONFIG).exists():
        return print(f"{folder} holds a trained decomposition already")
    held_out(target, args.eval_tokens, "tuning")  # or it is refused now, not when training has ended
    model, rows, plan = variant.model(target), Rows(target, args.batch, seed=0), folder / "plan.json"
    size = 2 * sum(own.numel() for own in model.state_dict().values())
    assert size <= LARGEST, f"{size:,} bytes in fp16"
    if not plan.exists():
        trial = SPDTrainer(variant.model(target), replace(variant.train, steps=1000), args.half)
        ms = milliseconds(trial, Rows(target, args.batch, seed=1))
        left = 60 * args.minutes - (time.monotonic() - began) - 60
        steps = min(args.tokens // (args.batch * target.context), int(0.9e3 * left / ms))
        assert steps > 0, f"no step of {ms:.0f} ms fits into {left:.0f} s"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(plan, {"variant": name, "steps": steps, "batch": args.batch, "milliseconds": ms})
    planned = json.loads(plan.read_text())
    assert (planned["variant"], planned["batch"]) == (name, args.batch), f"{plan} is of another training: {planned}"
    steps, config = planned["steps"], replace(variant.train, steps=planned["steps"])
    seconds = train_spd(model, rows, config, folder / "training", f"tiny_{name}", args.half)
    record = TrainingRecord(
        name=f"tiny_spd_{name}_C{variant.components}_n{steps}x{args.batch}_s{config.seed}", target=target.name,
        target_fingerprint=target.fingerprint, train_tokens=steps * args.batch * target.context, train_seconds=seconds,
        seed=config.seed, commit=git_commit(), recipe=f"{variant.gate} {config}",
    )  # fmt: skip
    shutil.copy(folder / "training" / "metrics.jsonl", folder / "spd.jsonl")
    save_checkpoint(folder, model.half(), record)
    shutil.rmtree(folder / "training")
    result(args, target, name, model.float(), steps=steps, seconds=seconds)


# ------------------------------------------------------------------------------------------------------- command line


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--train", choices=VARIANTS, metavar="NAME", help="train this variant for shipping, and compare none")
    add("--steps", type=int, default=400, help="of every variant that is compared")
    add("--batch", type=int, default=32, help="sequences per step")
    add("--tokens", type=int, default=50_000_000, help="--train: at most")
    add("--minutes", type=float, default=20.0, help="--train: of the first call")
    add("--eval-tokens", type=int, default=32_768)
    add("--attacked", type=int, default=64, help="sequences under PGD")
    add("--text", type=Path, default=HERE / "tokens", help="the token folder")
    add("--table", type=Path, default=HERE / "results" / "spd_recipes.csv")
    add("--output", type=Path, default=HERE / "results" / "spd_tiny", help="--train: folder of the checkpoint")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    return parser.parse_args()


def main() -> None:
    errors_in_one_line()
    os.environ["WANDB_MODE"] = "disabled"
    args = settings()
    args.half = bf16_is_fast(torch.device(args.device))
    if args.train:
        return train(args, args.train)
    compare(args, args.only)


if __name__ == "__main__":
    main()
