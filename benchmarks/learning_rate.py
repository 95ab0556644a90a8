"""Which peak learning rate suits a kind of coder and a run of a given length? Behind `training.default_learning_rate`.

Coders of every kind and rate train on the same batches, with the project's recipe otherwise. What counts is ΔCE with all
layers replaced and reading their own stream (`free`), on the tuning split: no rate is chosen on text that a table reports.
Every kind gets the same rates. Appends to results/learning_rate.csv; `--plot` draws it.

    python benchmarks/learning_rate.py --tokens 1000000 --rates 4e-3 5.7e-3 8e-3 1.13e-2 1.6e-2
    python benchmarks/learning_rate.py --plot
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from tqdm import tqdm

from activation_store import ActivationsStore, DataConfig
from coder_replacements import REPLACEMENTS
from config import BatchTopK, CoderConfig, TrainConfig
from evaluation import evaluate, held_out
from logs import atomic_path, git_commit, read_csv, write_csv
from recipes import clt_configs, new_coder, sae_configs, transcoder_configs
from replacement import Origin
from target_models import TargetModel, load_target
from training import CoderRun, annealed_k, dead_after, default_learning_rate, recorded_step, schedule, start_run

TICKS = (0.003, 0.006, 0.012, 0.024, 0.048)


@dataclass(frozen=True)
class Settings:
    target: str = "tiny"
    tokens: int = 1_000_000
    rates: tuple[float, ...] = (4e-3, 5.7e-3, 8e-3, 1.13e-2, 1.6e-2)
    kinds: tuple[str, ...] = ("sae", "transcoder", "transcoder-skip", "clt")
    k: int = 16
    d_dict: int = 1536
    batch: int = 2048
    eval_tokens: int = 32_768  # of the tuning split
    seed: int = 0
    device: str = "cpu"
    output: Path = Path(__file__).parent / "results" / "learning_rate.csv"
    plot: bool = False  # draw the figure from the table, and stop


class Row(NamedTuple):
    kind: str
    d_dict: int
    k: int
    batch: int
    tokens: int
    seed: int
    rate: float
    free: float  # ΔCE in nats, all layers replaced
    free_low: float  # its 95 % interval over documents
    free_high: float
    fvu: float  # mean over layers, of the same runs
    l0: float
    documents: int
    commit: str


def configs(kind: str, target: TargetModel, s: Settings) -> list[CoderConfig]:
    layers, rules = tuple(range(target.n_layers)), [BatchTopK(s.k)]
    of: dict[str, Callable[[], list[CoderConfig]]] = {
        "sae": lambda: [*sae_configs(target, layers=layers, rules=rules, d_dict=s.d_dict)],
        "transcoder": lambda: [*transcoder_configs(target, layers=layers, rules=rules, d_dict=s.d_dict)],
        "transcoder-skip": lambda: [
            *transcoder_configs(target, layers=layers, rules=rules, d_dict=s.d_dict, skip=True)
        ],
        "clt": lambda: [*clt_configs(target, layers=layers, rules=rules, d_dict=s.d_dict)],
    }
    return of[kind]()


def train(s: Settings, target: TargetModel) -> dict[tuple[str, float], list[CoderRun]]:
    """One set of coders for every kind and rate, all on one stream."""
    data = DataConfig(layers=tuple(range(target.n_layers)), batch_tokens=s.batch, seed=s.seed)
    store = ActivationsStore(target, data)
    config = TrainConfig(tokens=s.tokens, dead_after=dead_after(s.tokens), seed=s.seed)
    with tempfile.TemporaryDirectory() as unused:
        sets = {
            (kind, rate): [
                start_run(
                    "",
                    new_coder(own, s.seed),
                    store=store,
                    config=dataclasses.replace(config, lr=rate),
                    folder=Path(unused),
                )
                for own in configs(kind, target, s)
            ]
            for kind, rate in itertools.product(s.kinds, s.rates)
        }
    train_at_once([(config, run) for runs in sets.values() for run in runs], store, k=s.k)
    return sets


def train_at_once(trials: Sequence[tuple[TrainConfig, CoderRun]], store: ActivationsStore, *, k: int) -> None:
    """Train coders, each with its own configuration, on the same batches, and deploy them; one number of tokens for all."""
    tokens, batch_tokens = trials[0][0].tokens, store.config.batch_tokens
    steps = -(-tokens // batch_tokens)
    for step in tqdm(range(steps), desc=f"{tokens:,} tokens, {len(trials)} coders", mininterval=10):
        batch = next(store)
        for config, run in trials:
            run.coder.set_k(annealed_k(k, step, steps=steps, config=config))
            recorded_step(run, batch, config=config, lr=run.lr * schedule(step, steps, config))
            if config.aux and (step + 1) % config.metrics_every == 0:
                run.count_dead(config.dead_after)
    calibration = list(itertools.islice(store, max(1, trials[0][0].calibration_tokens // batch_tokens)))
    for _, run in trials:
        run.coder.calibrate([run.coder.view(*batch, run.rows)[0] for batch in calibration])
        run.coder.eval().requires_grad_(False)


def main(s: Settings) -> None:
    target = load_target(s.target, s.device)
    sets = train(s, target)
    origin, replacements = Origin(s.seed, s.tokens, 0.0, ""), []
    for runs in sets.values():
        coders = [run.coder for run in runs]
        replacements.append(REPLACEMENTS[type(coders[0].config)](coders, None, "", origin))
    rows = [
        Row(
            kind, s.d_dict, s.k, s.batch, s.tokens, s.seed, rate, p.ce_degradation, p.ce_low, p.ce_high, p.fvu, p.l0,
            p.documents, git_commit() or "",
        )
        for (kind, rate), p in zip(
            sets, evaluate(target, replacements, held_out(target, s.eval_tokens, "tuning"), ("free",)).points, strict=True
        )
    ]  # fmt: skip
    print(*rows, sep="\n")
    earlier = [tuple(row.values()) for row in read_csv(s.output)] if s.output.exists() else []
    write_csv(s.output, Row._fields, [*earlier, *(tuple(map(str, row)) for row in rows)])


def draw(table: Path) -> None:
    """ΔCE free against the rate: a panel per number of tokens; a line, and the default rate as an upright, per kind."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    rows = read_csv(table)
    budgets = sorted({int(row["tokens"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(budgets), figsize=(4.2 * len(budgets), 3.8), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, tokens in zip(axes[0], budgets):
        own = [row for row in rows if int(row["tokens"]) == tokens]
        for i, kind in enumerate(Settings.kinds):
            rows_of = sorted((r for r in own if r["kind"] == kind), key=lambda r: float(r["rate"]))
            columns = {c: [float(r[c]) for r in rows_of] for c in ("rate", "free", "free_low", "free_high")}
            axis.plot(columns["rate"], columns["free"], marker="o", color=f"C{i}", label=kind)
            axis.fill_between(columns["rate"], columns["free_low"], columns["free_high"], color=f"C{i}", alpha=0.12)
            config = configs(kind, load_target("tiny", "cpu"), Settings(d_dict=int(own[0]["d_dict"])))[0]
            axis.axvline(default_learning_rate(tokens, config), color=f"C{i}", linestyle=":")
        axis.set(xscale="log", yscale="log", title=f"{tokens:,} tokens", xlabel="peak learning rate")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes[0][0].set_ylabel("ΔCE, all layers, free (nats; tuning text)")
    axes[0][-1].legend(frameon=False)
    with atomic_path(table.with_suffix(".png")) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    draw(settings.output) if settings.plot else main(settings)
