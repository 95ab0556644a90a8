"""Does memory stay flat while coders train on the stream for half an hour?

A child process trains small SAEs, transcoders and a CLT of `tiny` by `train_group`, with a state saved every few seconds;
this one reads the child's resident memory from outside, all of it (VmRSS) and what belongs to no file (RssAnon: arrays and
Python's objects, without the libraries), and ends it after `--minutes`. What counts is what comes after the warm-up, when
every buffer has had its first use:

    spread = (largest − smallest) / median        growth = median of the last fifth / median of the first fifth − 1

    python benchmarks/soak.py --minutes 30

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
    minutes: float = 30.0
    warm_up: float = 3.0  # minutes at the beginning that do not count
    every: float = 5.0  # seconds between two readings
    d_dict: int = 256  # latents per layer
    output: Path = Path(__file__).parent / "results" / "soak.csv"


class Reading(NamedTuple):
    minutes: float  # since training began
    rss_mib: float  # resident memory of the training process
    anonymous_mib: float  # of it, what is no part of a file
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
    config = TrainConfig(tokens=10**9, lr=1e-3, anneal=1e-4, dead_after=20_000, checkpoint_every=100)
    train_group([new_coder(c, 0) for c in configs], target, data=data, config=config, folder=folder)


def resident_mib(pid: int) -> tuple[float, float]:
    """Resident memory of a process and the anonymous part of it, as the kernel tells them."""
    lines = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    kib = {words[0]: int(words[1]) for words in lines if words[0] in ("VmRSS:", "RssAnon:")}
    return round(kib["VmRSS:"] / 1024, 2), round(kib["RssAnon:"] / 1024, 2)


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
    began, readings = time.monotonic(), []
    while (minutes := (time.monotonic() - began) / 60) < s.minutes:
        if not child.is_alive():
            raise RuntimeError(f"training ended by itself after {minutes:.1f} minutes (exit code {child.exitcode})")
        readings.append(Reading(round(minutes, 3), *resident_mib(child.pid or 0), last_step(folder)))
        time.sleep(s.every)
    child.kill()
    child.join()
    return readings


def flatness(rss: list[float]) -> Flatness:
    fifth = max(1, len(rss) // 5)
    growth = statistics.median(rss[-fifth:]) / statistics.median(rss[:fifth]) - 1
    return Flatness((max(rss) - min(rss)) / statistics.median(rss), growth)


def draw(s: Settings, readings: list[Reading], said: str, file: Path) -> None:
    minutes, rss, anonymous, _ = zip(*readings)
    figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(minutes, rss, linewidth=1, label="resident")
    axes.plot(minutes, anonymous, linewidth=1, label="of it, part of no file")
    axes.axvspan(0, s.warm_up, color="0.9")
    axes.set(xlabel="minutes of training (grey: warm-up)", ylabel="MiB", ylim=(0, 1.1 * max(rss)))
    axes.set_title(said, fontsize=9)
    axes.legend(fontsize=8)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        readings = watch(s, Path(folder))
    counted = [r for r in readings if r.minutes >= s.warm_up]
    all_, anonymous = (flatness(list(column)) for column in list(zip(*counted))[1:3])
    said = (
        f"{readings[-1].step:,} steps: spread {all_.spread:.2%}, growth {all_.growth:+.2%}; "
        f"of what is part of no file {anonymous.spread:.2%} and {anonymous.growth:+.2%}"
    )
    write_csv(s.output, Reading._fields, readings)
    draw(s, readings, said, s.output.with_suffix(".png"))
    print(said)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
