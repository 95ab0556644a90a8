"""Experiment 012, in miniature: a toy is decomposed once, and unknown ones are refused."""

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest

import checkpoints
from logs import read_csv
from toy_models import TOYS

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_012_spd_known_mechanisms" / "spd_known_mechanisms.py"
SMALL = "--toys tms_5-2 --scale 0.0005 --seeds 2 --no-compile-gates".split()


def test_a_toy_is_decomposed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setitem(TOYS, "tms_5-2", dataclasses.replace(TOYS["tms_5-2"], steps=20, batch=64))
    output = tmp_path / "output"
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--output", str(output)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "tms_5-2 is in" in capsys.readouterr().err
    rows = read_csv(output / "points.csv")
    assert [(row["toy"], row["seed"], row["steps"]) for row in rows] == [("tms_5-2", "0", "3"), ("tms_5-2", "1", "3")]
    assert all(0 <= float(row[score]) <= 1 for row in rows for score in ("mmcs", "mmcs_null"))
    assert all(float(row["mmcs_null"]) > 0.9 for row in rows)  # twenty directions in a plane
    names = {file.name for file in output.iterdir()}
    assert names == {"points.csv", "settings.json", "importance_tms_5-2.png", "directions_tms_5-2.png"}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--toys", "tms_6-2", "--output", str(output)])
    with pytest.raises(ValueError, match="^unknown toy 'tms_6-2': use tms_5-2, "):
        runpy.run_path(str(SCRIPT), run_name="__main__")
