"""The GPU benchmark: in miniature on a CPU, without the packages that a machine with a GPU may lack (einops is carried there
as a wheel, and so is not among them); and its guards."""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import write_corpus
from transformers import PreTrainedTokenizerFast

from target_loaders import ASSETS, load_tokenizer
from token_stream import DatasetSpec, TokenStream

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
from floors import PEAKS, Size, gather_work, product_work, step_work  # noqa: E402
from gpu_bench import Bench, Row  # noqa: E402

ON_A_BARE_MACHINE = f"""
import runpy, sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in ("wandb", "datasets", "transformer_lens", "tyro", "typeguard")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, {str(BENCHMARKS)!r})
for _ in range(2):
    runpy.run_path({str(BENCHMARKS / "gpu.py")!r}, run_name="__main__")
"""


def read_rows(folder: Path) -> list[Row]:
    with (folder / "gpu.csv").open() as file:
        return [Row(*line) for line in list(csv.reader(file))[1:]]


def small_text(folder: Path) -> tuple[DatasetSpec, PreTrainedTokenizerFast]:
    (folder / "text").mkdir()
    text = DatasetSpec(str(write_corpus(folder / "text", 800)), val_split="val")
    return text, load_tokenizer(ASSETS / "tiny" / "tokenizer.json")


@pytest.mark.slow
def test_every_part_runs_in_miniature_and_the_next_call_goes_on(tmp_path: Path) -> None:
    output, tokens = tmp_path / "output", tmp_path / "tokens"
    gpu.prepare(tokens, 20_000, *small_text(tmp_path))
    arguments = ["--device", "cpu", "--miniature", "--output", output, "--tokens", tokens, "--wheels", tmp_path]
    call = [sys.executable, "-c", ON_A_BARE_MACHINE, *map(str, arguments)]
    without_git = os.environ | {"PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}  # other tests have the other cores
    done = subprocess.run(call, cwd=tmp_path, env=without_git, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read_rows(output)
    assert not [row for row in rows if "failed" in row.note], (output / "gpu.log").read_text()
    whole = [row.part for row in rows if row.what == "whole part" and row.note == "ok"]
    assert whole == [*gpu.PARTS, "spd"] and done.stdout.count("already measured") == len(gpu.PARTS) - 1
    assert sum(row.part == "steps" and "dense twin" in row.what for row in rows) == 16, "4 kinds of coder under 4 rules"
    skipped = {row.what: row.note for row in rows if not row.median_ms and row.part != "device"}
    without_cuda = {"pytest -m cuda", "product, tf32", "pieces of the selection"}
    assert skipped.keys() == without_cuda | {"TopK: sparsify"} and all(skipped.values())
    files = [file for file in output.rglob("*") if file.is_file()]
    assert len(files) <= 8 and all(file.stat().st_size < 16 * 2**20 for file in files), f"{files=}"
    record = json.loads((output / "spd" / "config.json").read_text())["record"]
    assert record["train_tokens"] == 2 * 3 * 256, "two steps of three sequences; the second call finds it there"


def test_every_piece_of_a_selection_is_a_call_and_the_whole_is_proven() -> None:
    pytest.importorskip("triton")
    from emulated_cuda import emulated_cuda

    if torch.cuda.is_available():
        pytest.skip("gpu.py itself runs them here")
    with emulated_cuda():
        size = Size(24, 1024, 8, 16)
        notes = [gpu.unproven(piece()) for _, _, piece in gpu.pieces(size, torch.randn(16, 24).to("cuda"))]
    assert len(notes) == 9 and notes[:-2] == [""] * 7 and notes[-2:] == ["0 of 16 tokens unproven"] * 2


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    settings = argparse.Namespace(device="cpu", miniature=True, minutes=1.0, output=tmp_path / "output")
    return Bench(settings, tmp_path)


def test_a_failure_costs_its_own_measurement_alone_and_is_tried_again(bench: Bench) -> None:
    def part(bench: Bench) -> None:
        with bench.guarded("first"):
            raise RuntimeError("broken")
        bench.row("second", ms=2.0, reference=1.0)

    bench.run("half", part, 60)
    bench.run("sound", lambda bench: bench.row("third"), 60)
    notes = {(row.part, row.what): row.note for row in read_rows(bench.output)}
    assert notes["half", "first"] == "failed: RuntimeError: broken" and ("half", "second") in notes
    assert notes["half", "whole part"] == "1 failed: see gpu.log" and notes["sound", "whole part"] == "ok"
    assert "Traceback" in (bench.output / "gpu.log").read_text()
    assert bench.is_finished("sound") and not bench.is_finished("half")
    bench.code = "of other sources"
    assert not bench.is_finished("sound")


def test_a_part_ends_when_its_seconds_are_over(bench: Bench) -> None:
    def part(bench: Bench) -> None:
        with bench.guarded("endless"):
            time.sleep(60)

    began = time.monotonic()
    bench.run("slow", part, 1)
    assert time.monotonic() - began < 30
    assert [row.note for row in bench.rows] == ["failed: its 1 s were over", "1 failed: see gpu.log"]


def test_a_token_folder_holds_what_its_text_streams(tmp_path: Path) -> None:
    (text, tokenizer), folder = small_text(tmp_path), tmp_path / "tokens"
    gpu.prepare(folder, 10_000, text, tokenizer)
    for name, split in (("train", "train"), ("val", "test")):
        stream = TokenStream(text, tokenizer, split, 1, gpu.ROW)
        written = np.load(folder / f"{name}.npy")
        assert len(written) and written.tolist() == [
            i for _ in range(len(written) // gpu.ROW) for i in next(stream)[0].tolist()
        ]


def test_the_readme_states_the_floors_that_the_table_is_measured_against() -> None:
    size, readme = Size(768, 32_768, 32, 8192), (BENCHMARKS / "README.md").read_text()
    for name, peak in PEAKS.items():
        floors = [product_work(size, 0).floor_ms(peak, precision) for precision in ("bf16", "tf32", "fp32")]
        floors += [
            step_work(size).bytes / peak.memory * 1e3,
            gather_work(size).floor_ms(peak),
            step_work(size).floor_ms(peak),
        ]
        row = f"| {name} | {' | '.join(f'{ms:.2f}' for ms in floors)} |"
        assert row in readme, row
