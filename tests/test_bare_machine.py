"""A machine with a GPU may lack half of the requirements: what trains, decomposes and measures works without them.

einops is not among what may be absent: every module that splits axes imports it, and its wheel of pure Python can be carried
to a machine where nothing can be installed (benchmarks/README.md).
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPT = """
import os, sys
from importlib.machinery import PathFinder
from pathlib import Path

ABSENT = {"wandb", "datasets", "transformer_lens", "tyro", "typeguard", "beartype"}

find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] in ABSENT else find(name, *rest)
)
os.environ["WANDB_MODE"] = "disabled"
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path[:0] = [str(root), str(root / "tests")]
for module in sorted(file.stem for file in root.glob("*.py")):
    __import__(module)

import dataclasses
import torch
from conftest import make_small_target
import baselines, evaluation, measure, recipes
from coder_replacements import as_replacements
from config import BatchTopK
from spd_replacement import spd_replacements
from token_stream import DatasetSpec

torch.set_num_threads(1)
baselines.BASELINE_TOKENS = 8192
tokens = DatasetSpec(str(folder), tokenised=True, val_split="val")
target = dataclasses.replace(make_small_target(folder), data=tokens)
makers = (recipes.transcoder_configs, recipes.sae_configs, recipes.clt_configs)
configs = [config for make in makers for config in make(target, layers=(0, 1), rules=[BatchTopK(4)], d_dict=32)]
trained = recipes.train_coders(configs, target, tokens=1024, batch=128, seed=0, folder=folder / "checkpoints")
recipe = recipes.SPDRecipe(components=8, gate_hidden=4, steps=2, batch=2)
spd = recipes.train_decomposition(target, recipe, layers=(0, 1), folder=folder / "checkpoints")
replacements = as_replacements(trained) + baselines.baselines(target, (0, 1), (4,))
replacements += spd_replacements(target, spd, (0, 1))
measured = evaluation.evaluate(target, replacements, evaluation.held_out(target, 256))
measure.load_target = lambda name, device: target
measure.main((trained[0].path,), tokens=256, protocols=("free",), device="cpu", points=folder / "points.csv")
assert not ABSENT & set(sys.modules), ABSENT & set(sys.modules)
assert "torch._dynamo" not in sys.modules, "4 s of every job: an optimiser, or a decorator, loads torch's compiler"
print(len(measured.points), "rows measured without", len(ABSENT), "packages")
"""


@pytest.mark.slow
def test_coders_and_decompositions_are_trained_and_measured_on_a_bare_machine(tmp_path: Path) -> None:
    """Every module is imported; text comes from a token folder; nothing asks for a package that is absent."""
    generator = np.random.default_rng(0)
    for split, documents in (("train", 600), ("val", 150)):
        rows = [[0, *generator.integers(2, 62, n)] for n in generator.integers(5, 60, documents)]
        np.save(tmp_path / f"{split}.npy", np.concatenate(rows).astype(np.uint16))
    call = [sys.executable, "-c", SCRIPT, str(REPOSITORY), str(tmp_path)]
    run = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "65 rows measured without 6 packages"
