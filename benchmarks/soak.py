"""Does memory stay flat while coders train on the stream for half an hour?

A child process trains small SAEs, transcoders and a CLT of `tiny` by `train_group`, with a state saved every few seconds;
this one reads from outside, once a minute, the most that was resident since the reading before (VmHWM, which the reader
sets back), and ends it after `--minutes`. Between two peaks memory moves: a refill of the buffer and a saved state make arrays
that the C library gives back at once. What a machine must have is the peak. What counts comes after the warm-up, when every
buffer has had its first use:

    spread = (largest − smallest) / median        growth = median of the last fifth / median of the first fifth − 1

    python benchmarks/soak.py --minutes 31

Writes results/soak.csv and results/soak.png. Linux alone tells resident memory so.
"""

import json
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import tyro

from activation_store import DataConfig
from config import BatchTopK, JumpReLU, TopK, TrainConfig
from logs import atomic_path, write_csv
from recipes import clt_configs, new_coder, sae_configs, transcoder_configs
from target_models import load_target
from training import train_group


@dataclass(frozen=True)
class Settings:
    minutes: float = 31.0
    warm_up: float = 3.0  # minutes at the beginning that do not count
    every: float = 60.0  # seconds between two readings
    d_dict: int = 256  # latents per layer
    output: Path = Path(__file__).parent / "results" / "soak.csv"


class Reading(NamedTuple):
    minutes: float  # since training began
    peak_mib: float  # most memory of the training process that was resident since the reading before
    now_mib: float  # resident as it was read
    step: int  # the last one whose metrics were read


class Flatness(NamedTuple):
    spread: float
    growth: float


def train(d_dict: int, folder: Path) -> None:
    """Train without end, on batches of 1,024 tokens; latents are dead soon, so that AuxK takes part."""
    os.environ["WANDB_MODE"] = "disabled"
    target = load_target("tiny", "cpu")
    layers = tuple(range(target.n_layers))
    configs = [
        *transcoder_configs(target, layers=layers[:2], rules=[BatchTopK(8), JumpReLU(l0=1e-3)], d_dict=d_dict),
        *sae_configs(target, layers=layers[2:], rules=[TopK(8)], d_dict=d_dict),
        *clt_configs(target, layers=layers, rules=[BatchTopK(8)], d_dict=d_dict),
    ]
    data = DataConfig(layers=layers, batch_tokens=1024, buffer_tokens=16_384)
    config = TrainConfig(tokens=10**9, lr=1e-3, anneal=1e-4, dead_after=20_000, checkpoint_every=20)
    train_group([new_coder(c, 0) for c in configs], target, data=data, config=config, folder=folder)


def resident_mib(pid: int) -> tuple[float, float]:
    """The most memory of a process that was resident since the last call, and what is now, as the kernel tells them."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    kib = {words[0]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "VmRSS:")}
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # proc(5): the peak is set back to what is resident now
    return round(kib["VmHWM:"] / 1024, 2), round(kib["VmRSS:"] / 1024, 2)


def last_step(folder: Path) -> int:
    """The last step in any of the metrics, 0 before the first."""
    files = [file for file in folder.glob("*/metrics.jsonl") if file.stat().st_size]
    return max((json.loads(file.read_text().rstrip().splitlines()[-1])["step"] for file in files), default=0)


def watch(s: Settings, folder: Path) -> list[Reading]:
    """Readings of a training until its time is over; raises RuntimeError where it ends by itself."""
    child = mp.get_context("spawn").Process(target=train, args=(s.d_dict, folder))
    child.start()
    while last_step(folder) == 0 and child.is_alive():
        time.sleep(0.5)
    resident_mib(child.pid or 0)
    began, readings = time.monotonic(), []
    while (minutes := (time.monotonic() - began) / 60) < s.minutes:
        if not child.is_alive():
            raise RuntimeError(f"training ended by itself after {minutes:.1f} minutes (exit code {child.exitcode})")
        time.sleep(s.every)
        minutes = (time.monotonic() - began) / 60
        readings.append(Reading(round(minutes, 3), *resident_mib(child.pid or 0), last_step(folder)))
    child.kill()
    child.join()
    return readings


def flatness(mib: list[float]) -> Flatness:
    fifth = max(1, len(mib) // 5)
    growth = statistics.median(mib[-fifth:]) / statistics.median(mib[:fifth]) - 1
    return Flatness((max(mib) - min(mib)) / statistics.median(mib), growth)


def draw(s: Settings, readings: list[Reading], said: str, file: Path) -> None:
    minutes, peak, now, _ = zip(*readings)
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(minutes, peak, linewidth=1.2, label="most since the reading before")
    axes.plot(minutes, now, ".", markersize=3, label="as it was read")
    axes.axvspan(0, s.warm_up, color="0.9")
    axes.set(xlabel="minutes of training (grey: warm-up)", ylabel="MiB", ylim=(0, 1.1 * max(peak)))
    axes.set_title(said, fontsize=9)
    axes.legend(fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        readings = watch(s, Path(folder))
    peaks = flatness([r.peak_mib for r in readings if r.minutes >= s.warm_up])
    said = f"{readings[-1].step:,} steps: peaks by the minute spread {peaks.spread:.2%}, grow {peaks.growth:+.2%}"
    write_csv(s.output, Reading._fields, readings)
    draw(s, readings, said, s.output.with_suffix(".png"))
    print(said)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
