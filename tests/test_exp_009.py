"""Experiment 009: nothing cut is the ruler's own SPD, or the target itself; a cut keeps what it says."""

import asyncio
import dataclasses
import email
import json
import runpy
import sys
from pathlib import Path

import pytest

import target_models
from pareto import read_points
from token_stream import DatasetSpec

SCRIPT = Path(__file__).parent.parent / "experiments" / "exp_009_diagnose_tail" / "diagnose_tail.py"
SMALL = "--target tiny --kept 8 2000 --rank-tokens 512 --eval-tokens 512".split()


@pytest.mark.slow
def test_it_runs_from_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, package in (("train", asyncio), ("val", email)):
        files = sorted(Path(package.__file__).parent.glob("*.py"))
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": f.read_text()}) + "\n" for f in files))
    corpus = DatasetSpec(str(tmp_path), val_split="val")
    target = dataclasses.replace(target_models.load_target("tiny", "cpu"), data=corpus)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    output = tmp_path / "output"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    points = {(p.method, p.k): p for p in read_points(output / "points.csv")}
    assert len(points) == 9 and all(p.tokens == 2 * 255 for p in points.values())
    assert points["spd-open-delta", 768].ce_degradation == pytest.approx(0, abs=1e-3), "all and Δ is the target"
    assert points["spd-open", 8].l0 == 8 and points["spd-open", 768].l0 == 768
    assert points["spd-gated", 8].l0 <= min(8, points["spd-gated", 768].l0)
    assert {f.name for f in output.iterdir()} == {
        "README.md",
        "components.csv",
        "points.csv",
        "settings.json",
        "tail.png",
    }

    (output / "tail.png").unlink()
    monkeypatch.setattr(target_models, "load_target", None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--target", "tiny", "--replot", "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert (output / "tail.png").exists()
