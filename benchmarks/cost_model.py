"""What a training costs each of N processes that share out data, coders or latents: arithmetic, and what two processes took.

    python benchmarks/cost_model.py                      # table and figure from the rates and times in results/
    python benchmarks/cost_model.py --part measure       # minutes: rates and steps of one process …
    torchrun --standalone --nproc-per-node 2 benchmarks/cost_model.py --part measure    # … and of two

Per step and process, with B tokens a batch, L transcoders of d → d, D latents, k active, N processes; P parameters of the
target. Share of the tokens b, of the coders c, of the latents w: 1/N for what is shared out, else 1.

    product     2 b B d · c L · w D operations           dense, bf16 or float32
    selection   PASSES · 2 bytes · b B · c L · w D       passes over the bounds
    sums        SUMS · 4 bytes · k b B · c L · w d       rows gathered for values, decoder and gradients
    Adam        28 bytes · c L · w 2 d D                 parameter, gradient, two moments read; three written
    target      2 P · B / N operations                   each makes its part of the forwards
    on the wire data: 2 (N−1)/N · 4 bytes · L 2 d D      ring all-reduce of all gradients
                coders, latents: (N−1)/N · B L 2 d 2 bytes          activations from those that made them
                latents also: L (4 (N−1) k B + 2 (N−1)/N · 4 B d)   candidates to all; ŷ summed
    memory      12 bytes · c L · w 2 d D + 4 bytes of the largest coder's gradient · w + buffer + 2 P bytes

and the latency of each exchange: of gradients and counters, or of candidates, ŷ, penalty, L0 and the norm. A time is the sum of
all these over their rates, nothing overlaps. Gradients exist for one coder at a time, as in `group_step`.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from floors import PEAKS

from activation_store import ActivationsStore, DataConfig
from config import EncoderConfig, TopK, TrainConfig
from logs import read_csv, write_csv
from parallel import World, _joined, joined, summed, wait, world
from recipes import new_coder
from target_models import load_target
from training import group_step, start_run

RESULTS = Path(__file__).parent / "results"
FORMS = ("data", "coders", "latents")
PASSES, SUMS = 4, 6
EXCHANGES = {"data": 2, "coders": 0, "latents": 5}  # of a coder's step, one after another
LAYERS, D, LATENTS, K, BATCH = 4, 192, 1536, 16, 2048  # what is measured: transcoders of all layers of `tiny`
TURNS = 12


class Rates(NamedTuple):
    """What a process can do in a second."""

    product: float  # operations of dense products
    memory: float  # bytes streamed
    gather: float  # bytes of gathered rows
    wire: float  # bytes to and from other processes
    latency: float  # seconds of an exchange, however short


class Job(NamedTuple):
    d: int
    latents: int
    k: int
    layers: int
    batch: int
    parameters: float  # of the target
    buffer: int  # tokens


class Cost(NamedTuple):
    """Of one process and one step."""

    step: float  # seconds of the coders' own work
    harvest: float  # seconds of the target's forwards
    wire: float  # seconds of exchange
    gib: float  # memory

    @property
    def seconds(self) -> float:
        return self.step + self.harvest + self.wire


def cost(job: Job, form: str, n: int, rates: Rates) -> Cost:
    b, c, w = ((1 / n if form == own else 1.0) for own in FORMS)
    c = max(c, 1 / job.layers)  # a coder is not divided among those who share out coders
    tokens, entries = b * job.batch, b * job.batch * c * job.layers * w * job.latents
    parameters = c * job.layers * w * 2 * job.d * job.latents
    work = 2 * job.d * entries / rates.product + (PASSES * 2 * entries + 28 * parameters) / rates.memory
    work += SUMS * 4 * job.k * tokens * c * job.layers * w * job.d / rates.gather
    activations = job.layers * 2 * job.d * 2  # bytes a token
    ring = 2 * (n - 1) / n
    sent = ring * 4 * job.layers * 2 * job.d * job.latents if form == "data" else ring / 2 * job.batch * activations
    if form == "latents":
        sent += job.layers * (4 * (n - 1) * job.k * job.batch + ring * 4 * job.batch * job.d)
    gradient = 4 * w * 2 * job.d * job.latents
    memory = 12 * parameters + gradient + b * job.buffer * activations + 2 * job.parameters
    wire = sent / rates.wire + EXCHANGES[form] * job.layers * rates.latency * (n > 1)
    return Cost(work, 2 * job.parameters * job.batch / n / rates.product, wire, memory / 2**30)


# ------------------------------------------------------------------------------------------------------- measurement


def least(call: Callable[[], object], turns: int = TURNS, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of so many calls, in milliseconds: the machine is shared."""
    times = []
    for _ in range(turns):
        wait()
        began = clock()
        call()
        times.append(clock() - began)
    return 1e3 * min(times)


def measure() -> None:
    """Appends rows (processes, form, what, ms) of this number of processes."""
    rows, data = [], DataConfig(layers=tuple(range(LAYERS)), batch_tokens=BATCH)
    target, config = load_target("tiny", "cpu"), TrainConfig(tokens=10**6, lr=1e-3)
    for form in FORMS if world().size > 1 else ("alone",):
        _joined.append(World(world().rank, world().size, form if form != "alone" else "data"))  # type: ignore[arg-type]
        store = ActivationsStore(target, data, shared=True)
        configs = [EncoderConfig(layer=i, d_in=D, d_out=D, d_dict=LATENTS, rule=TopK(K)) for i in range(LAYERS)]
        own = configs[world().rank :: world().size] if form == "coders" else configs
        runs = [
            start_run("", new_coder(c, 0), store=store, config=config, folder=Path(tempfile.mkdtemp())) for c in own
        ]
        batch = next(store)
        step = lambda: group_step(runs, batch, config=config, factor=1.0)  # noqa: B023, E731
        ms, of_core = least(step), least(step, clock=time.process_time)
        forwards = -(-BATCH // store.harvested[2])
        harvest = least(lambda: store._harvest(max(1, store.harvesters)), 4)  # noqa: B023
        made = store.harvested[2] * (store.harvesters if form != "data" else world().size)
        rows += [(world().size, form, "step", ms), (world().size, form, "step, core time", of_core)]
        rows += [(world().size, form, "harvest", harvest * BATCH / made)]
        if form in ("coders", "latents"):
            store.harvesters = 1
            repeated = least(lambda: store._harvest(1), 4) * BATCH / store.harvested[2]  # noqa: B023
            rows.append((world().size, form, "harvest repeated", repeated))
        assert forwards >= 1
    if world().size > 1:
        big = torch.zeros(LAYERS * 2 * D * LATENTS)
        rows.append((world().size, "any", "all-reduce of all gradients", least(lambda: summed([big]))))
        began = time.perf_counter()
        for _ in range(100):
            summed([big[:1]])
        rows.append((world().size, "any", "a short all-reduce, mean", 10 * (time.perf_counter() - began)))
    else:
        rows += [(1, "rate", name, value) for name, value in own_rates()._asdict().items() if value]
    if world().leads:
        file = RESULTS / "cost_model_measured.csv"
        old = [tuple(row.values()) for row in read_csv(file)] if file.exists() else []
        kept = [row for row in old if int(row[0]) != world().size]
        write_csv(file, ("processes", "form", "what", "value"), [*kept, *rows])


def own_rates() -> Rates:
    """Of one core of this machine, each from the kind of call that a step makes."""
    x, W = torch.randn(BATCH, D), torch.randn(LATENTS, D)
    low = (x.bfloat16(), W.bfloat16())
    product = 2 * BATCH * D * LATENTS / min(least(lambda: x @ W.T), least(lambda: low[0] @ low[1].T)) * 1e3
    big, other = torch.randn(8 << 20), torch.randn(8 << 20)
    memory = 3 * big.nbytes / least(lambda: big.add_(other)) * 1e3
    rows, starts = torch.randint(LATENTS, (BATCH * K,)), torch.arange(0, BATCH * K + 1, K)
    weights = torch.rand(BATCH * K)
    bag = least(
        lambda: torch.nn.functional.embedding_bag(
            rows, W, starts, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
    )
    return Rates(product, memory, 4 * BATCH * K * D / bag * 1e3, 0.0, 0.0)


# ----------------------------------------------------------------------------------------------------------- answers


def compare() -> list[tuple[object, ...]]:
    """Predicted and measured milliseconds; of two processes, what is predicted for one is first brought to what it took."""
    rows = read_csv(RESULTS / "cost_model_measured.csv")
    found = {(int(row["processes"]), row["form"], row["what"]): float(row["value"]) for row in rows}
    gradients = LAYERS * 2 * D * LATENTS * 4
    wire = gradients / found[2, "any", "all-reduce of all gradients"] * 1e3
    latency = found[2, "any", "a short all-reduce, mean"] / 1e3
    rates = Rates(*(found[1, "rate", name] for name in ("product", "memory", "gather")), wire, latency)
    job = Job(D, LATENTS, K, LAYERS, BATCH, 0.0, 65_536)
    alone, of_core = (found[1, "alone", what] for what in ("step", "step, core time"))
    one = cost(job, "data", 1, rates)
    slower = of_core / (1e3 * one.step)  # than its rates, in caches of its own, let expect
    answers: list[tuple[object, ...]] = [(1, "alone", "", "", round(of_core, 1), round(alone, 1))]
    for form in FORMS:
        own, step = cost(job, form, 2, rates), found[2, form, "step"]
        exchanged = own.wire if form != "coders" else 0.0  # activations are sent in the harvest
        predicted = (round(1e3 * own.step * slower, 1), round(1e3 * (own.step * slower + exchanged), 1))
        answers.append((2, form, *predicted, round(found[2, form, "step, core time"], 1), round(step, 1)))
    return answers


H100 = PEAKS["H100"]
WITHIN, ACROSS = 360e9, 40e9  # bytes a second of a GPU: NVLink, and 400 Gb/s InfiniBand, four fifths of their peaks
LATENCY = 30e-6
BIG = Job(4096, 2**20, 32, 32, 32_768, 6.7e9, 16_384)


def answer() -> list[tuple[object, ...]]:
    """1M latents in each of 32 layers at d 4,096, for a target of 6.7B parameters."""
    rows = []
    for n in (8, 64):
        rates = Rates(0.6 * H100.bf16, 0.7 * H100.memory, 0.7 * H100.memory, WITHIN if n == 8 else ACROSS, LATENCY)
        for form in FORMS:
            own = cost(BIG, form, n, rates)
            fits = own.gib <= 0.95 * 80e9 / 2**30
            speed = BIG.batch / own.seconds if fits else None
            parts = (round(own.step, 3), round(own.harvest, 3), round(own.wire, 3))
            rows.append((n, form, round(own.gib), fits, *parts, None if speed is None else round(speed)))
    return rows


def draw() -> None:
    from matplotlib import pyplot as plt

    counts, shapes = [1, 2, 4, 8, 16, 32, 64, 128, 256], {"data": "o-", "coders": "s--", "latents": "^-."}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for form in FORMS:
        costs = [
            cost(
                BIG,
                form,
                n,
                Rates(0.6 * H100.bf16, 0.7 * H100.memory, 0.7 * H100.memory, WITHIN if n <= 8 else ACROSS, LATENCY),
            )
            for n in counts
        ]
        left.plot(counts, [c.gib for c in costs], shapes[form], label=form)
        right.plot(counts, [BIG.batch / c.seconds for c in costs], shapes[form], label=form)
    left.axhline(80e9 / 2**30, color="grey", lw=1)
    left.annotate("an H100", (1, 80e9 / 2**30), textcoords="offset points", xytext=(0, 4), color="grey")
    left.set(xlabel="GPUs", ylabel="GiB on each", xscale="log", yscale="log", title="memory")
    right.set(xlabel="GPUs", ylabel="tokens a second", xscale="log", yscale="log", title="speed, if it fitted")
    for axes in (left, right):
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.minorticks_off()
        axes.legend(title="shared out")
    figure.suptitle("32 transcoders of 1,048,576 latents at d 4,096: predicted")
    figure.tight_layout()
    figure.savefig(RESULTS / "cost_model.png", dpi=130)


@dataclass(frozen=True)
class Settings:
    part: Literal["measure", "draw"] = "draw"


def main(s: Settings) -> None:
    if s.part == "measure":
        with joined("cpu", "data"):
            measure()
        return
    headings = ("processes", "form", "predicted_core_ms", "predicted_ms", "measured_core_ms", "measured_ms")
    write_csv(RESULTS / "cost_model_two.csv", headings, compare())
    headings = ("gpus", "form", "gib", "fits", "step_s", "harvest_s", "wire_s", "tokens_per_second")
    write_csv(RESULTS / "cost_model_big.csv", headings, answer())
    draw()
    for file in ("cost_model_two.csv", "cost_model_big.csv"):
        print((RESULTS / file).read_text())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
