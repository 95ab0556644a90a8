"""Experiment 000, in miniature: what is exported is what was trained, and its card says what it measured."""

import asyncio
import email
import json
import runpy
import sys
from pathlib import Path

import pytest

import python_corpus
import target_loaders
import target_models
import token_stream
from python_corpus import SourceFile, Split

SCRIPT = Path(__file__).parents[1] / "experiments" / "exp_000_train_tiny_target" / "train_tiny_target.py"
SMALL = "--layers 1 --tokens 4096 --batch 4 --vocab 300 --tokenizer-files 4 --device cpu".split()


def few_files(split: Split) -> list[SourceFile]:
    package = asyncio if split == "train" else email
    files = sorted(Path(str(package.__file__)).parent.glob("*.py"))[: 6 if split == "train" else 2]
    return [SourceFile(i, file.name, str(file)) for i, file in enumerate(files)]


def test_the_exported_target_is_the_trained_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (python_corpus, token_stream):
        monkeypatch.setattr(module, "environment_corpus", few_files)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    folders = [part for name in ("state", "model", "output") for part in (f"--{name}", str(tmp_path / name))]
    folders[3] = str(tmp_path / "assets" / "tiny")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, *folders])
    script = runpy.run_path(str(SCRIPT), run_name="__main__")

    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert {f.name for f in (tmp_path / "output").iterdir()} == {
        "README.md",
        "curve.png",
        "results.json",
        "settings.json",
    }
    committed = SCRIPT.parent / "output" / "README.md"
    assert (tmp_path / "output" / "README.md").read_text() == committed.read_text()
    assert f"{results['bits_per_byte']:.3f}" in (tmp_path / "assets" / "tiny" / "README.md").read_text()
    monkeypatch.setattr(target_loaders, "ASSETS", tmp_path / "assets")
    target = target_models.load_target("tiny", "cpu")
    assert target.n_layers == 1 and target.vocab_size == 300
    held_out, _ = script["tokenise"](tmp_path / "state" / "tokenizer.json", ("tuning", "test"))
    assert script["held_out_nats"](target.model, held_out, 10**9) == pytest.approx(results["nats_per_token"], abs=2e-3)
