"""The comparison of SPD recipes, on `tiny` with short sequences: every variant steps, some are measured, one is shipped."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from checkpoints import load_spd
from logs import read_csv, write_json
from spd_training import SPDTrainer
from target_models import TargetModel

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import spd_recipes  # noqa: E402
from gpu_steps import Rows  # noqa: E402


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    ids = np.random.default_rng(0).integers(1, 4096, 20_000).astype(np.uint16)
    ids[::100] = 0
    for split in ("train", "val"):
        np.save(tmp_path / f"{split}.npy", ids)
    short = spd_recipes.target_of
    monkeypatch.setattr(spd_recipes, "target_of", lambda args: replace(short(args), context=32))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return argparse.Namespace(
        device="cpu", half=False, text=tmp_path, table=tmp_path / "table.csv", output=tmp_path / "out", steps=1, batch=4,
        eval_tokens=128, attacked=4, minutes=5.0, tokens=2 * 4 * 32,
    )  # fmt: skip


@pytest.fixture
def target(args: argparse.Namespace) -> TargetModel:
    return spd_recipes.target_of(args)


@pytest.mark.parametrize("name", spd_recipes.VARIANTS)
def test_every_variant_steps_from_its_start_in_bf16(name: str, args: argparse.Namespace, target: TargetModel) -> None:
    variant = spd_recipes.VARIANTS[name]
    trainer = SPDTrainer(variant.model(target), replace(variant.train, steps=10), True)
    trainer.warm_up()
    assert all(trainer.step(next(Rows(target, 4, 0))).isfinite().all() for _ in range(2))
    assert sum(term.coefficient for term in variant.train.recon) == pytest.approx(1)


@pytest.mark.slow
def test_variants_are_measured_one_row_each(args: argparse.Namespace) -> None:
    spd_recipes.compare(args, ["base", "causal"])
    spd_recipes.compare(args, ["all"])
    rows = read_csv(args.table)
    assert [row["variant"] for row in rows] == ["base", "causal", "all"]
    assert [int(row["components"]) for row in rows] == [512, 512, 768]
    for row in rows:
        assert int(row["tokens"]) == 4 * 32 and 0 < float(row["kl_frozen"]) < float(row["kl_free"]) < 20
        assert 0 < float(row["l0_frozen"]) < 768 and float(row["kl_pgd20"]) > 0
        assert abs(int(row["gate_parameters"]) / 1.5e6 - 1) < 0.2, "variants' gates are of like size"


@pytest.mark.slow
def test_what_is_shipped_fits_its_file_and_is_trained_as_planned(
    args: argparse.Namespace, target: TargetModel, capsys: pytest.CaptureFixture[str]
) -> None:
    spd_recipes.train(args, "all")
    plan = json.loads((args.output / "plan.json").read_text())
    assert plan["steps"] == 2, "all the tokens, where minutes are left"
    model, record = load_spd(str(args.output), target)
    assert record.train_tokens == args.tokens and set(model.sizes.values()) == {768}
    assert (args.output / "encoder.pt").stat().st_size <= 15e6 and (args.output / "spd.jsonl").exists()
    assert len(read_csv(args.table)) == 1
    spd_recipes.train(args, "all")
    assert "already" in capsys.readouterr().out
    (args.output / "config.json").unlink()
    write_json(args.output / "plan.json", plan | {"steps": 3})
    spd_recipes.train(args, "all")
    assert load_spd(str(args.output), target)[1].train_tokens == 3 * 4 * 32, (
        "a second call keeps to the first one's plan"
    )
    with pytest.raises(AssertionError, match="another training"):
        (args.output / "config.json").unlink()
        spd_recipes.train(args, "base")
