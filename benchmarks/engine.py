"""What one optimiser step costs: ours, other libraries', dense twins', and the encoder product no coder can avoid.

A step is forward, backward, clipping and fused Adam on Gaussian activations. All trainers of a size are in one process
and take turns; medians count. `peers` needs the other libraries, in an environment of their own; `group` and `main_job`
run on activations of the embedded model. Minutes; two threads.

    bash .ci/interop python benchmarks/engine.py --parts peers
    python benchmarks/engine.py --parts memory clt clt_growth group main_job draw

results/engine.csv holds ratios alone: `speed` is tokens/s over those of one float32 encoder product, `ours` how many
times our step is faster. What sparsify trains is a TopK transcoder; SAELens and dictionary_learning train
autoencoders of that shape; a dense twin is our coder with dense matrix products, straight-through autograd and all.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))  # the peers' environment does not hold this project

import torch
import tyro
from torch import Tensor

from activation_store import ActivationBatch
from clt import CrossLayerTranscoder
from coder import ActivationStats
from config import BatchTopK, CLTConfig, EncoderConfig, TopK, TrainConfig
from devices import keep_freed_memory
from logs import read_csv, write_csv
from sparse_encode import dense_encode_batch_topk, dense_encode_topk
from training import CoderRun, group_step
from transcoder import build_transcoder

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # as sparsify asks for on a processor without CUDA
RESULTS = Path(__file__).parent / "results"
Part = Literal["peers", "memory", "clt", "clt_growth", "group", "main_job", "draw"]
Step = Callable[[], object]
SIDE_BY_SIDE = "ours, side by side"  # a quarter of the time of four coders at once


class Size(NamedTuple):
    d: int
    d_dict: int
    k: int
    batch: int


SIZES = (Size(768, 4096, 32, 4096), Size(768, 16384, 32, 4096), Size(192, 1536, 16, 2048), Size(192, 3072, 16, 2048))


class Row(NamedTuple):
    part: str
    d: int
    d_dict: int
    k: int
    batch: int
    rule: str
    what: str
    speed: str  # one over (median step / median float32 encoder product)
    ours: str  # median step of `what` / median step of ours


@dataclass(frozen=True)
class Settings:
    parts: tuple[Part, ...] = ("peers", "memory", "clt", "clt_growth", "group", "main_job", "draw")
    sizes: tuple[int, ...] = (0, 1, 2, 3)  # of SIZES, for `peers`
    repeats: int = 3
    threads: int = 2
    output: Path = RESULTS / "engine.csv"
    memory_of: str = ""  # internal: the trainer whose memory this process measures


def medians(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Seconds of each, in alternating turns after two unmeasured ones; fewer for what takes seconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-2, repeats):
        for name, step in steps.items():
            slow = times[name][-1] if times[name] else 0.0
            if turn == -1 and slow > 1 or turn > 0 and slow > 4 or turn > 1 and slow > 2:
                continue
            begin = time.perf_counter()
            step()
            last = time.perf_counter() - begin
            times[name] = [*times[name], last] if turn > 0 else [last]  # what came before was the warm-up
    return {name: statistics.median(own) for name, own in times.items()}


def adam(parameters: list[Tensor], loss: Callable[[], Tensor]) -> Step:
    optimiser = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def run_of(coder) -> CoderRun:  # type: ignore[no-untyped-def]
    """A coder with targets of variance d."""
    coder.train()
    optimiser = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    rows, d = list(coder.config.layers), coder.config.d_in
    n = len(rows)
    means, ones = torch.zeros(n, d), torch.ones(n)
    variance = coder.variance(ActivationStats(means, ones, means, ones, d * ones, n_tokens=1))
    return CoderRun("", coder, rows, variance, optimiser, None, 1e-4)  # type: ignore[arg-type]


def our_step(runs: Sequence[CoderRun], x: Tensor, y: Tensor) -> Step:
    """One step of all runs, side by side; x, y: (layer, batch, d)."""
    batch, config = ActivationBatch(x, y), TrainConfig(tokens=1, lr=1e-4)
    return lambda: group_step(runs, batch, config=config, factor=1.0)


def coder_of(size: Size, rule: TopK | BatchTopK, layer: int = 0):  # type: ignore[no-untyped-def]
    coder = build_transcoder(
        EncoderConfig(layer=layer, d_in=size.d, d_out=size.d, d_dict=size.d_dict, rule=rule),
        torch.Generator().manual_seed(0),
    )
    torch.nn.init.normal_(coder.W_dec, std=0.01)
    return coder


def dense_step(size: Size, rule: TopK | BatchTopK, x: Tensor, y: Tensor) -> Step:
    coder = coder_of(size, rule)
    encode = dense_encode_topk if isinstance(rule, TopK) else dense_encode_batch_topk

    def loss() -> Tensor:
        acts = encode(x, coder.encoder.W_enc, coder.encoder.b_enc, size.k)
        return (acts @ coder.W_dec + coder.b_dec - y).square().mean()

    return adam([coder.encoder.W_enc, coder.encoder.b_enc, coder.W_dec, coder.b_dec], loss)


def peer_steps(size: Size, x: Tensor, y: Tensor) -> dict[tuple[str, str], Step]:
    """(rule, library) → step."""
    import dictionary_learning.trainers.batch_top_k as dl_batch
    import dictionary_learning.trainers.top_k as dl_topk
    import sae_lens
    import sparsify
    from sae_lens.saes.sae import TrainStepInput

    d, d_dict, k, _ = size
    coder = sparsify.SparseCoder(d, sparsify.SparseCoderConfig(num_latents=d_dict, k=k, transcode=True))
    steps = {("TopK", "sparsify"): adam(list(coder.parameters()), lambda: coder(x, y).fvu)}
    for rule in ("TopK", "BatchTopK"):
        config = getattr(sae_lens, f"{rule}TrainingSAEConfig")(d_in=d, d_sae=d_dict, k=k)
        sae = getattr(sae_lens, f"{rule}TrainingSAE")(config)
        given = TrainStepInput(x, {}, torch.zeros(d_dict, dtype=torch.bool), 0, False)
        loss = lambda sae=sae, given=given: sae.training_forward_pass(given).loss  # noqa: E731
        steps[rule, "SAELens"] = adam(list(sae.parameters()), loss)
        cls = dl_topk.TopKTrainer if rule == "TopK" else dl_batch.BatchTopKTrainer
        trainer = cls(steps=1000, activation_dim=d, dict_size=d_dict, k=k, layer=0, lm_name="", lr=1e-4, device="cpu",
                      warmup_steps=1)  # fmt: skip
        steps[rule, "dictionary_learning"] = lambda trainer=trainer: trainer.update(1, x)
    return steps


def peers(s: Settings) -> list[Row]:
    rows: list[Row] = []
    for size in (SIZES[i] for i in s.sizes):
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(2, size.batch, size.d, generator=g)
        W = torch.randn(size.d_dict, size.d, generator=g)
        x_low, W_low = x.bfloat16(), W.bfloat16()
        steps = {("", "encoder product, float32"): lambda x=x, W=W: x @ W.T,
                 ("", "encoder product, bf16"): lambda x=x_low, W=W_low: x @ W.T}  # fmt: skip
        for rule in (TopK(size.k), BatchTopK(size.k)):
            name = type(rule).__name__
            steps[name, "ours"] = our_step([run_of(coder_of(size, rule))], x[None], y[None])
            steps[name, SIDE_BY_SIDE] = our_step([run_of(coder_of(size, rule)) for _ in range(4)], x[None], y[None])
            steps[name, "dense twin"] = dense_step(size, rule, x, y)
        steps |= peer_steps(size, x, y)
        names = {f"{rule}|{what}": step for (rule, what), step in steps.items()}
        seconds = medians(names, s.repeats)
        product = seconds["|encoder product, float32"]
        for (rule, what), _ in steps.items():
            own, ours = seconds[f"{rule}|{what}"], seconds[f"{rule or 'BatchTopK'}|ours"]
            own = own / 4 if what == SIDE_BY_SIDE else own
            rows.append(Row("step", *size, rule, what, f"{product / own:.3f}", f"{own / ours:.2f}"))
            print(*rows[-1], flush=True)
    return rows


def clt_coder(n: int, size: Size) -> CrossLayerTranscoder:
    coder = CrossLayerTranscoder(
        CLTConfig(layers=tuple(range(n)), d_in=size.d, d_out=size.d, d_dict=size.d_dict, rule=BatchTopK(size.k)),
        torch.Generator().manual_seed(0),
    )
    for W in coder.W_dec:
        torch.nn.init.normal_(W, std=0.01)
    return coder


def dense_clt_step(size: Size, x: Tensor, y: Tensor) -> Step:
    twin = clt_coder(len(x), size)

    def loss() -> Tensor:
        wide = [
            dense_encode_batch_topk(x[i], e.W_enc, e.b_enc, size.k) @ twin.W_dec[i] for i, e in enumerate(twin.encoders)
        ]
        return (twin._gather(wide) + twin.b_dec[:, None] - y).square().mean()

    return adam(list(twin.parameters()), loss)


def clt(s: Settings) -> list[Row]:
    """4 layers against upstream's dense step: dense encoders, and a dense decoder from every layer to every later one."""
    size, n = Size(768, 4096, 16, 4096), 4
    x, y = torch.randn(2, n, size.batch, size.d, generator=torch.Generator().manual_seed(1))
    ours = clt_coder(n, size)
    product = {"product": lambda: x[0] @ ours.encoders[0].W_enc.detach().T}
    steps = {"ours": our_step([run_of(ours)], x, y), "dense twin": dense_clt_step(size, x, y)}
    seconds = medians(product | steps, s.repeats)
    return [
        Row("clt, 4 layers", *size, "BatchTopK", name, f"{seconds['product'] / seconds[name]:.3f}",
            f"{seconds[name] / seconds['ours']:.2f}") for name in steps
    ]  # fmt: skip


def clt_growth(s: Settings) -> list[Row]:
    """Encoders alone, and decoders with their backward pass, of 2, 4, 8 and 12 layers; `ours` = over those of two."""
    size, rows, first = Size(768, 2048, 16, 2048), [], {}
    for n in (2, 4, 8, 12):
        coder = clt_coder(n, size).train()
        x, y = torch.randn(2, n, size.batch, size.d, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            codes = coder.encode(x)
            coder.update_statistics(codes)

        def encode(coder: CrossLayerTranscoder = coder, x: Tensor = x) -> None:
            with torch.no_grad():
                coder.encode(x)

        def decode(coder=coder, y: Tensor = y, codes=codes) -> None:  # type: ignore[no-untyped-def]
            fresh = tuple(c._replace(values=c.values.detach().requires_grad_()) for c in codes)
            (coder.decode(fresh) - y).square().mean().backward()
            coder.zero_grad(set_to_none=True)

        seconds = medians({"encoders": encode, "decoders": decode}, s.repeats)
        for name, own in seconds.items():
            first.setdefault(name, own)
            rows.append(Row("clt growth", *size, "BatchTopK", f"{n} layers, {name}", "", f"{own / first[name]:.2f}"))
            print(*rows[-1], flush=True)
    return rows


def tiny_harvest(batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """One forward of the embedded model on a batch of random tokens: MLP inputs and outputs, (layer, batch, d)."""
    from patching import capture
    from target_models import load_target

    target = load_target("tiny", "cpu")
    tokens = torch.randint(target.vocab_size, (batch // 128, 128), generator=torch.Generator().manual_seed(0))

    def harvest() -> tuple[Tensor, Tensor]:
        inputs, outputs, _ = capture(target, tokens, tuple(range(target.n_layers)))
        return inputs.flatten(1, 2).clone(), outputs.flatten(1, 2).clone()

    return harvest


def main_job(s: Settings) -> list[Row]:
    """One step of each coder that main.py trains, and the harvest they share: with the engine and with dense twins."""
    harvest = tiny_harvest(2048)
    x, y = harvest()
    runs, twins = [], []
    for i, k in [(i, k) for i in range(len(x)) for k in (8, 32)]:
        size = Size(x.shape[-1], 1536, k, 2048)
        runs.append(run_of(coder_of(size, BatchTopK(k), i)))
        twins.append(dense_step(size, BatchTopK(k), x[i], y[i]))
    size = size._replace(k=16)
    runs.append(run_of(clt_coder(len(x), size)))
    twins.append(dense_clt_step(size, x, y))
    ours = {"side by side": [our_step(runs, x, y)], "one by one": [our_step([s], x, y) for s in runs]}

    def together(steps: list[Step]) -> Step:
        return lambda: (harvest(), [step() for step in steps])

    seconds = medians({name: together(steps) for name, steps in (ours | {"dense twins": twins}).items()}, s.repeats + 2)
    return [
        Row("main.py", *size._replace(k=0), "BatchTopK", f"one step of its {len(runs)} coders, {name}", "",
            f"{own / seconds['side by side']:.2f}") for name, own in seconds.items()
    ]  # fmt: skip


def group(s: Settings) -> list[Row]:
    """16 coders on one forward of the target; `ours` = over the sum of their steps and that one forward."""
    harvest = tiny_harvest(2048)
    x, y = harvest()
    size = Size(x.shape[-1], 1536, 0, 2048)
    runs = [run_of(coder_of(size, BatchTopK(k), i)) for i in range(len(x)) for k in (4, 8, 16, 32)]
    alone = {str(i): our_step([run], x, y) for i, run in enumerate(runs)}
    all_of_them = our_step(runs, x, y)
    seconds = medians(alone | {"forward": harvest, "together": lambda: (harvest(), all_of_them())}, s.repeats + 2)
    apart, n = sum(seconds[name] for name in alone), len(alone)
    one = seconds["together"] / (apart + seconds["forward"])
    many = (apart + n * seconds["forward"]) / seconds["together"]
    shape = (size.d, size.d_dict, 0, size.batch, "BatchTopK")
    return [
        Row("group", *shape, f"{n} coders together / (sum of steps + one forward)", "", f"{one:.2f}"),
        Row("group", *shape, f"{n} coders apart, a forward each / together", "", f"{many:.2f}"),
    ]


def peak_memory(of: str) -> int:
    """Bytes by which a step's peak exceeds what was resident before it (Linux), parameters and Adam's moments excepted."""
    size = SIZES[1]
    x, y = torch.randn(2, size.batch, size.d, generator=torch.Generator().manual_seed(1))
    rule, what = of.split("|")
    kind = {"TopK": TopK, "BatchTopK": BatchTopK}[rule](size.k)
    ours = what == "ours"
    step = our_step([run_of(coder_of(size, kind))], x[None], y[None]) if ours else dense_step(size, kind, x, y)
    step()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    step()
    return status("VmHWM") - before


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(s: Settings) -> list[Row]:
    names = [f"{rule}|{what}" for rule in ("TopK", "BatchTopK") for what in ("ours", "dense twin")]
    peaks = {}
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }  # what is freed goes
    for name in names:
        call = [sys.executable, __file__, "--memory-of", name, "--threads", str(s.threads)]
        peaks[name] = int(
            subprocess.run(call, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1]
        )
    return [
        Row("memory", *SIZES[1], *name.split("|"), f"{peak / 2**20:.0f} MiB", f"{peak / peaks[name.split('|')[0] + '|ours']:.2f}")
        for name, peak in peaks.items()
    ]  # fmt: skip


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colours = {"ours": "#0072b2", SIDE_BY_SIDE: "#56b4e9",
               "sparsify": "#d55e00", "SAELens": "#009e73", "dictionary_learning": "#cc79a7",
               "dense twin": "#777777", "encoder product, bf16": "#000000", "encoder product, float32": "#000000"}  # fmt: skip
    for panel, d in zip(panels, (768, 192)):
        own = [row for row in rows if row.part == "step" and int(row.d) == d]
        labels: list[tuple[float, str, str]] = []
        for rule, what in dict.fromkeys((row.rule, row.what) for row in own):
            points = sorted((int(row.d_dict), float(row.speed)) for row in own if (row.rule, row.what) == (rule, what))
            style = "--" if rule == "TopK" else ":" if what.endswith("float32") else "-"
            panel.plot(*zip(*points), style, color=colours[what], marker=None if not rule else "o", ms=4)
            labels.append((points[-1][1], f"{what} {rule}".strip(), colours[what]))
        height = 0.0
        for speed, text, colour in sorted(labels):  # labels keep their distance
            height = max(speed, height * 1.16)
            panel.annotate(text, (points[-1][0], height), (5, 0), textcoords="offset points", fontsize=7, color=colour)
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="latents (d_dict)",
            title=f"d = {d}, k = {own[0].k}, batch {own[0].batch}",
        )
        ticks = sorted({int(row.d_dict) for row in own})
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
        panel.set_xlim(ticks[0] * 0.93, ticks[0] * (ticks[1] / ticks[0]) ** 1.85)
        panel.set_ylim(0.8 * min(float(row.speed) for row in rows if row.part == "step"), 1.8)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("tokens/s of a step,\nover those of one float32 encoder product")
    figure.savefig(path, dpi=150)


def main(s: Settings) -> None:
    torch.set_num_threads(s.threads)
    if s.memory_of:
        print(peak_memory(s.memory_of))
        return
    keep_freed_memory()  # as our trainers do; here it holds for everyone
    makers = {"peers": peers, "memory": memory, "clt": clt, "clt_growth": clt_growth, "group": group,
              "main_job": main_job}  # fmt: skip
    rows = [Row(**line) for line in read_csv(s.output)] if s.output.exists() else []
    for part in s.parts:
        if part == "draw":
            draw(rows, s.output.with_suffix(".png"))
            continue
        new = makers[part](s)
        print(*new, sep="\n")
        again = {(row.part, str(row.d_dict)) for row in new}
        rows = [row for row in rows if (row.part, str(row.d_dict)) not in again] + new
        write_csv(s.output, Row._fields, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
