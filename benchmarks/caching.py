"""What does a cache of activations save a second training, how large is it, and what does int8 cost?

The same transcoders of all layers of `tiny`, trained without a cache, and twice with one of each form: the first training
fills it, the second reads it. Other seeds, of weights and text, are trained without a cache and with int8.
Writes results/activation_cache.csv; minutes of one core.

    python benchmarks/caching.py
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from activation_cache import Cache
from activation_store import ActivationsStore, DataConfig, Harvest
from coder_replacements import as_replacement
from config import BatchTopK
from evaluation import evaluate, held_out
from logs import write_csv
from recipes import train_coders, transcoder_configs
from target_models import load_target

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("seed", "cache", "training", "cached_tokens", "mb_per_100k_tokens", "training_cpu_seconds", "store_cpu_seconds",
           "protocol", "fvu", "ce_degradation", "ce_low", "ce_high", "tokens", "eval_tokens")  # fmt: skip
RUNS: tuple[tuple[Cache, str], ...] = (
    ("none", "first"), ("fp16", "first"), ("fp16", "second"), ("int8", "first"), ("int8", "second"),
)  # fmt: skip
OF_OTHER_SEEDS: tuple[tuple[Cache, str], ...] = (("none", "first"), ("int8", "first"))


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 102_400
    eval_tokens: int = 8_192
    k: int = 16
    d_dict: int = 1536
    batch: int = 2048


def cpu_seconds_of_the_store(s: Settings, data: DataConfig, harvest: Harvest) -> float:
    """Of all threads, for the batches of a training alone; its cache, if it has one, is full by then."""
    target = load_target("tiny", "cpu")
    began = time.process_time()
    store = ActivationsStore(target, data, harvest=harvest)
    for _ in range(s.tokens // s.batch):
        next(store)
    return time.process_time() - began


def shards_of(place: Path, cache: Cache) -> list[Path]:
    """The shards of one form."""

    def form(shard: Path) -> str:
        return str(json.loads((shard.parent / "index.json").read_text())["settings"][0])

    return [shard for shard in place.rglob("*.safetensors") if form(shard) == cache]


def rows_of(s: Settings, cache: Cache, which: str, seed: int, place: Path) -> Iterator[tuple[object, ...]]:
    """A training, and the ruler's word on it under two protocols."""
    target = load_target("tiny", "cpu")
    layers, harvest = tuple(range(target.n_layers)), Harvest(cache=cache)
    configs = transcoder_configs(target, layers=layers, rules=[BatchTopK(s.k)], d_dict=s.d_dict)
    data = DataConfig(layers=layers, batch_tokens=s.batch, seed=seed)
    sizes, began = {"tokens": s.tokens, "batch": s.batch, "seed": seed}, time.process_time()
    trained = train_coders(configs, target, harvest=harvest, folder=place / f"{seed} {cache} {which}", **sizes)
    spent = time.process_time() - began
    of_store = cpu_seconds_of_the_store(s, data, harvest) if cache == "none" or which == "second" else None
    shards = shards_of(place / "activations", cache) if seed == s.seeds[0] else []
    cached = len(shards) * data.model_batch * (target.context - 1)
    size = sum(shard.stat().st_size for shard in shards) / cached / 10 if cached else None
    for p in evaluate(target, [as_replacement(trained)], held_out(target, s.eval_tokens), ["frozen", "free"]).points:
        ce = (p.ce_degradation, p.ce_low, p.ce_high)
        yield seed, cache, which, cached or None, size, spent, of_store, p.protocol, p.fvu, *ce, s.tokens, p.tokens


def main(s: Settings) -> None:
    rows: list[tuple[object, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["NN_CACHE_HOME"] = name
        held_out(load_target("tiny", "cpu"), s.eval_tokens)  # the list of the corpus is made once, and is nobody's time
        for seed in s.seeds:
            for cache, which in RUNS if seed == s.seeds[0] else OF_OTHER_SEEDS:
                rows.extend(rows_of(s, cache, which, seed, Path(name)))
    write_csv(RESULTS / "activation_cache.csv", COLUMNS, rows)
    print((RESULTS / "activation_cache.csv").read_text())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
