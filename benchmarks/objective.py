"""Which rate, which mixture and which weight of the local loss suit training on the model's output, and what does a step cost?

Coders that were trained locally are tuned on the output, each trial from the same start on the same text, with the project's
recipe otherwise. What counts is ΔCE under every protocol on the tuning split: no setting is chosen on text that a table
reports. Appends to results/objective.csv; `cost` writes results/objective_cost.csv.

    python benchmarks/objective.py --part rates --tokens 500000 --rates 1e-4 2e-4 4e-4 8e-4
    python benchmarks/objective.py --part mixtures --tokens 500000     # what share of tokens under which sets of layers
    python benchmarks/objective.py --part weights --tokens 500000      # of the local loss beside the KL
    python benchmarks/objective.py --part cost                         # seconds, minutes to measure; ratios count
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from activation_store import ActivationBatch
from checkpoints import Checkpoint, checkpoint_folder
from coder_replacements import as_replacements
from config import BatchTopK, CoderConfig, Mixed, Output, TrainConfig
from devices import bf16_is_fast, device_name, keep_freed_memory
from evaluation import Protocol, evaluate, held_out
from logs import git_commit, read_csv, write_csv
from metrics import average
from output_objective import frame_of, planned, unembedding
from output_training import OutputGroup, record_after, sequences_of, set_step, train_on_output
from patching import after, capture
from recipes import clt_configs, sae_configs, train_coders, transcoder_configs
from target_models import TargetModel, load_target
from training import dead_after, default_tuning_rate, group_step

PROTOCOLS: tuple[Protocol, ...] = ("single", "frozen", "free")
RESULTS = Path(__file__).parent / "results"
MIXTURES = (
    Mixed(0.25, 0.25, 0.5), Mixed(0.5, 0.0, 0.5), Mixed(0.25, 0.0, 0.5), Mixed(0.5, 0.25, 0.5), Mixed(0.25, 0.5, 0.5),
    Mixed(0.25, 0.25, 1.0), Mixed(0.25, 0.25, 0.0), Mixed(0.0, 0.0, 0.5),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    part: Literal["rates", "mixtures", "weights", "cost"]
    target: str = "tiny"
    kinds: tuple[Literal["sae", "transcoder", "transcoder-skip", "clt"], ...] = ("transcoder",)
    protocols: tuple[Literal["single", "frozen", "free", "mixed"], ...] = ("free", "mixed")  # of `rates` and `weights`
    rates: tuple[float, ...] = (1e-4, 2e-4, 4e-4, 8e-4)
    weights: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0)
    local_tokens: int = 1_000_000  # of the start
    tokens: int = 500_000  # of the tuning
    k: int = 16
    d_dict: int = 1536
    batch: int = 2048
    eval_tokens: int = 32_768  # of the tuning split
    seed: int = 0
    device: str = "cpu"
    repeats: int = 7  # of `cost`


class Trial(NamedTuple):
    objective: Output
    rate: float


class Row(NamedTuple):
    method: str
    k: int
    d_dict: int
    local_tokens: int
    tokens: int
    batch: int
    seed: int
    protocol: str  # trained under; empty: the start
    alone: str  # shares of a mixture
    some: str
    running: str
    weight: str  # of the local loss
    rate: str
    single: float  # ΔCE in nats, mean over layers
    frozen: float
    free: float
    free_low: float  # its 95 % interval over documents
    free_high: float
    l0: float  # free
    seconds: float  # of the tuning
    commit: str


def configs(s: Settings, target: TargetModel) -> list[CoderConfig]:
    sizes = {"layers": tuple(range(target.n_layers)), "rules": [BatchTopK(s.k)], "d_dict": s.d_dict}
    of: dict[str, Callable[[], Sequence[CoderConfig]]] = {
        "sae": lambda: sae_configs(target, **sizes),
        "transcoder": lambda: transcoder_configs(target, **sizes),
        "transcoder-skip": lambda: transcoder_configs(target, skip=True, **sizes),
        "clt": lambda: clt_configs(target, **sizes),
    }
    return [config for kind in s.kinds for config in of[kind]()]


def objective(protocol: str, weight: float = 0.0) -> Output:
    return Output(Mixed() if protocol == "mixed" else protocol, weight)  # type: ignore[arg-type]


def trials(s: Settings) -> list[Trial]:
    match s.part:
        case "rates":
            return [Trial(objective(protocol), rate) for protocol in s.protocols for rate in s.rates]
        case "mixtures":
            return [Trial(Output(mixed), default_tuning_rate(s.tokens)) for mixed in MIXTURES]
        case _:
            pairs = itertools.product(s.protocols, s.weights)
            return [Trial(objective(*pair), default_tuning_rate(s.tokens)) for pair in pairs]


def starts(s: Settings, target: TargetModel) -> list[Checkpoint]:
    folder = checkpoint_folder(s.target) / f"n{s.local_tokens}"
    return train_coders(configs(s, target), target, tokens=s.local_tokens, batch=s.batch, seed=s.seed, folder=folder)


def rows(s: Settings, target: TargetModel, coders: Sequence[Checkpoint], trial: Trial | None) -> list[Row]:
    """One for each set of coders."""
    replacements, found = as_replacements(coders), []
    points = evaluate(target, replacements, held_out(target, s.eval_tokens, "tuning"), PROTOCOLS).points
    for replacement in replacements:
        own = [p for p in points if p.method == replacement.method]
        (frozen,), (free,) = ([p for p in own if p.protocol == name] for name in ("frozen", "free"))
        single = average([p.ce_degradation for p in own if p.protocol == "single"])
        mixed = trial.objective.protocol if trial and isinstance(trial.objective.protocol, Mixed) else None
        shares = tuple(map(str, dataclasses.astuple(mixed))) if mixed else ("", "", "")
        how = (
            (str(trial.objective.protocol), *shares, f"{trial.objective.local:g}", f"{trial.rate:g}")
            if trial
            else ("",) * 6
        )
        found.append(
            Row(
                replacement.method, s.k, s.d_dict, s.local_tokens, s.tokens if trial else 0, s.batch, s.seed, *how, single,
                frozen.ce_degradation, free.ce_degradation, free.ce_low, free.ce_high, free.l0 or 0.0,
                free.train_seconds or 0.0, git_commit() or "",
            )
        )  # fmt: skip
    return found


def measure(s: Settings, target: TargetModel) -> None:
    """The start, and every trial as soon as it is done."""
    begin, output = starts(s, target), RESULTS / "objective.csv"
    for trial in [None, *trials(s)]:
        tuned = begin if trial is None else tuned_by(s, target, begin, trial)
        earlier = [tuple(row.values()) for row in read_csv(output)] if output.exists() else []
        new = rows(s, target, tuned, trial)
        print(*new, sep="\n")
        write_csv(output, Row._fields, [*earlier, *(tuple(map(str, row)) for row in new)])


def tuned_by(s: Settings, target: TargetModel, begin: Sequence[Checkpoint], trial: Trial) -> list[Checkpoint]:
    config = TrainConfig(
        objective=trial.objective, tokens=s.tokens, lr=trial.rate, anneal=0.0, calibration_tokens=32_768, seed=s.seed,
        dead_after=dead_after(s.local_tokens + s.tokens),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return train_on_output(begin, target, batch=s.batch, config=config, folder=Path(folder))


# ------------------------------------------------------------------------------------------------------------ cost


def medians(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, in alternating turns after an unmeasured one."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            spent[name] += [time.perf_counter() - began] * (turn > 0)
    return {name: statistics.median(own) for name, own in spent.items()}


def cost(s: Settings, target: TargetModel) -> None:
    """Of the first set of coders: a batch of local training, of each protocol, and of the bare target."""
    begin, sequences = starts(s, target), sequences_of(target, s.batch)
    config = TrainConfig(objective=Output("free"), tokens=s.tokens, lr=1e-6, anneal=0.0)
    ends = {start: record_after(start, target, batch=s.batch, config=config) for start in begin}
    folder = Path(tempfile.mkdtemp())
    group = OutputGroup([begin], ends, target, unembedding(target), sequences=sequences, config=config, folder=folder)
    tokens = next(group.stream)
    frame = frame_of(target, group.head, tokens, group.layers)
    batch = ActivationBatch(*(side[:, :, 1:].flatten(1, 2).float() for side in frame.clean.activations))
    fast = torch.autocast(target.device.type, torch.bfloat16, enabled=bf16_is_fast(target.device))
    embedding = target.model.get_submodule("wte")

    def bare() -> None:
        """Forward and backward: the embedding's output stands for what training would reach."""
        with after(embedding, lambda _args, out: out.detach().requires_grad_()), fast:
            logits = target.logits(tokens)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    def local() -> None:
        capture(target, tokens, group.layers)
        group_step(group.sets[0].members, batch, config=config, factor=1.0)

    def on_output(protocol: str) -> Callable[[], object]:
        own = dataclasses.replace(config, objective=objective(protocol))

        def step() -> None:
            frame = frame_of(target, group.head, tokens, group.layers)
            plan = planned(own.objective, group.layers, group.generator)  # type: ignore[arg-type]
            set_step(group.sets[0], frame, plan, config=own, factor=1.0)

        return step

    steps = {"bare forward and backward": bare, "local": local}
    steps |= {protocol: on_output(protocol) for protocol in ("single", "frozen", "free", "mixed")}
    keep_freed_memory()
    seconds = medians(steps, s.repeats)
    table = [
        (name, f"{own:.4f}", f"{own / seconds['local']:.2f}", f"{own / seconds['bare forward and backward']:.2f}")
        for name, own in seconds.items()
    ]
    print(device_name(s.device), *table, sep="\n")
    write_csv(
        RESULTS / "objective_cost.csv", ("step", f"seconds per {s.batch} tokens", "over local", "over bare"), table
    )


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    return cost(s, target) if s.part == "cost" else measure(s, target)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
