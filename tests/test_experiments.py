"""Every experiment runs offline through its command line, at a miniature size, and leaves a table and a figure."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from small import make_small_target, write_corpus

import baselines
import recipes
import study
import target_models
import workers
from pareto import read_points
from target_models import TargetModel

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SMALL = "--target tiny --d-dict 64 --tokens 4096 --batch 2048 --eval-tokens 1024".split()
BASELINES = {"neurons", "affine", "identity", "zero", "mean"}
SCRIPTS = {
    "exp_001_train_transcoder_pile/train_transcoder_pile.py": (SMALL, {"transcoder"}),
    "exp_002_train_transcoder_ss/train_transcoder_ss.py": (SMALL, {"transcoder"}),
    "exp_003_train_clt_pile/train_clt_pile.py": (SMALL, {"clt"}),
    "exp_004_train_spd_gpt2/train_spd_gpt2.py": (
        "--target tiny --components 8 --gate-hidden 4 --steps 2 --batch 2 --eval-tokens 1024".split(),
        {"spd", "spd-delta", "spd-0.5", "spd-delta-0.5"},
    ),
    "exp_005_pareto_gpt2/pareto_gpt2.py": (
        [*SMALL, "--l0", "2", "8"],
        {"transcoder", "transcoder-topk", "spd-topk", "spd-c_fc-topk", "spd-down_proj-topk"},
    ),
    "exp_006_pareto_pile/pareto_pile.py": ([*SMALL, "--l0", "2", "8"], {"transcoder", "transcoder-topk", "spd-topk"}),
    "exp_007_pareto_pile_all_layers/pareto_pile_all_layers.py": (
        [*SMALL, "--l0", "2", "8"],
        {"transcoder-topk", "clt-topk", "spd-topk"},
    ),
    "exp_010_train_transcoder_pile_sweep/train_transcoder_pile_sweep.py": (
        [*SMALL, "--layers", "1", "--top-k", "4", "8"],
        {"transcoder"},
    ),
    "exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py": (
        [*SMALL, "--top-k", "8", "--clt-top-k", "8"],
        {"transcoder", "clt", "spd", "spd-delta", "spd-0.5", "spd-delta-0.5"},
    ),
    "exp_014_sae_sites/sae_sites.py": ([*SMALL, "--top-k", "8"], {"sae", "sae-attn_out", "sae-resid"}),
    "../main.py": (
        [*SMALL[2:], "--retrain-spd", "--spd-steps", "1", "--transcoder-k", "8", "--clt-k", "8"],
        {"transcoder", "clt", "spd", "spd-0.5"},
    ),
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    """Four layers like `tiny`, of random weights; 512 neurons each, so that every sweep has room."""
    folder = tmp_path_factory.mktemp("corpus")
    return make_small_target(write_corpus(folder, documents=1200), layers=4, d_mlp=512)


@pytest.fixture(scope="module")
def checkpoints(target: TargetModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a decomposition, as after exp_004; the scripts add their coders and find each other's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    recipes.train_decomposition(target, range(4), 8, 4, steps=1, batch=2, seed=0, folder=folder / target.name)
    return folder


@pytest.fixture
def call(target: TargetModel, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """Run a script as its command line does, with the small target in the place of `tiny`."""
    monkeypatch.setattr("checkpoints.CHECKPOINTS", checkpoints)
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)
    monkeypatch.setattr(
        workers, "run_jobs", lambda jobs, devices: [job.function(*job.args, devices[0]) for job in jobs]
    )

    def run(script: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_runs_from_its_command_line(
    script: str, call: Callable[[str, list[str]], None], checkpoints: Path, tmp_path: Path
) -> None:
    arguments, methods = SCRIPTS[script]
    if script.endswith("main.py"):
        arguments = [*arguments, "--checkpoints", str(checkpoints / "main")]
    call(script, [*arguments, "--output", str(tmp_path)])
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"points.csv", "layers.csv", "pareto.png", "settings.json", "README.md"}
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["eval_tokens"] == 1024
    points = read_points(tmp_path / "points.csv")
    expected = methods | BASELINES - ({"neurons"} if "sae_sites" in script else set())  # other sites have no neurons
    assert expected <= {p.method for p in points}, f"{expected - {p.method for p in points}} are missing"
    assert all(p.ce_degradation == 0 for p in points if p.method == "identity")
    assert all(p.tokens == 1024 - 1024 // 16 for p in points)


def test_a_figure_is_drawn_again_without_model_or_data(
    call: Callable[[str, list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py"
    call(script, [*SCRIPTS[script][0], "--output", str(tmp_path)])
    (tmp_path / "pareto.png").unlink()
    monkeypatch.setattr(target_models, "load_target", None)
    call(script, ["--target", "tiny", "--replot", "--output", str(tmp_path)])
    assert (tmp_path / "pareto.png").exists()
    drawn = []
    monkeypatch.setattr(study, "draw", lambda points, path: drawn.append((len(points), path)))
    others = [other for other in SCRIPTS if other not in ("../main.py", "exp_014_sae_sites/sae_sites.py")]
    for other in others:
        call(other, ["--target", "tiny", "--replot", "--output", str(tmp_path)])
    assert drawn == [(len(read_points(tmp_path / "points.csv")), tmp_path / "pareto.png")] * len(others)


def test_every_experiment_is_tested() -> None:
    tested = {script.split("/")[0] for script in SCRIPTS}
    elsewhere = {
        "exp_000_train_tiny_target",
        "exp_008_interp_pile",
        "exp_009_diagnose_tail",
        "exp_012_spd_known_mechanisms",
    }
    elsewhere |= {"exp_013_spd_mask_leak"}
    assert {folder.name for folder in EXPERIMENTS.glob("exp_*")} <= tested | elsewhere
