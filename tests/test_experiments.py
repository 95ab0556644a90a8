"""Every experiment runs offline through its command line, at a miniature size, and leaves a table and a figure."""

import dataclasses
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import worker_processes
from small import make_small_target, write_corpus

import baselines
import recipes
import study
import target_models
from pareto import read_points
from recipes import SPDRecipe
from spd_variants import VARIANTS
from target_models import TargetModel

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
EXP_011 = "exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py"
INTERP_PARTS = ("autointerp", "intruder", "predictability", "faithfulness")
SMALL = "--target tiny --d-dict 64 --tokens 4096 --batch 2048 --eval-tokens 1024".split()
BASELINES = {"neurons", "neurons-joint", "affine", "identity", "zero", "mean"}
MORE = {
    "../main.py": {"features.html"},
    EXP_011: {"additivity.csv"},
    "exp_004_train_spd_gpt2/train_spd_gpt2.py": {
        "importances.csv",
        "mean_importances.png",
        "importance_histograms.png",
    },
}
SCRIPTS = {
    "exp_001_train_transcoder_pile/train_transcoder_pile.py": (SMALL, {"transcoder"}),
    "exp_002_train_transcoder_ss/train_transcoder_ss.py": (SMALL, {"transcoder"}),
    "exp_003_train_clt_pile/train_clt_pile.py": (SMALL, {"clt"}),
    "exp_004_train_spd_gpt2/train_spd_gpt2.py": (
        "--target tiny --components 8 --gate-hidden 4 --steps 2 --batch 2 --eval-tokens 1024".split(),
        {"spd", "spd-delta", "spd-0.5", "spd-delta-0.5", *(f"spd-{name}" for name in VARIANTS)},
    ),
    "exp_005_pareto_gpt2/pareto_gpt2.py": (
        [*SMALL, "--l0", "2", "8"],
        {"transcoder", "transcoder-topk", "transcoder-joint", "spd-topk", "spd-c_fc-topk", "spd-down_proj-topk"},
    ),
    "exp_006_pareto_pile/pareto_pile.py": ([*SMALL, "--l0", "2", "8"], {"transcoder", "transcoder-topk", "spd-topk"}),
    "exp_007_pareto_pile_all_layers/pareto_pile_all_layers.py": (
        [*SMALL, "--l0", "2", "8"],
        {"transcoder-topk", "transcoder-joint", "clt-topk", "clt-joint", "spd-topk"},
    ),
    "exp_010_train_transcoder_pile_sweep/train_transcoder_pile_sweep.py": (
        [*SMALL, "--layers", "1", "2", "--top-k", "4", "6", "8", "--other-k", "4"],
        {f"transcoder{rule}" for rule in ("", "-by_layer", "-per_token", "-relu", "-jumprelu", "-gated", "-skip")},
    ),
    EXP_011: (
        [
            *SMALL,
            "--top-k",
            "4",
            "6",
            "8",
            "--clt-top-k",
            "8",
            "--sae-top-k",
            "8",
            *"--tuned-k 8 --tune-tokens 512 --longer 512 --n-seeds 1".split(),
        ],
        {
            "transcoder",
            "transcoder-by_layer",
            "clt",
            "clt-joint",
            "sae",
            "sae-joint",
            "spd",
            "spd-0.5",
            "spd-delta",
            *(f"{kind}-{further}" for kind in ("transcoder", "clt", "sae") for further in ("kl-free", "longer")),
        },
    ),
    "exp_014_sae_sites/sae_sites.py": ([*SMALL, "--top-k", "8"], {"sae", "sae-attn_out", "sae-resid"}),
    "../main.py": (
        [
            *SMALL[2:],
            "--retrain-spd",
            "--spd-steps",
            "1",
            "--transcoder-k",
            "8",
            "--clt-k",
            "8",
            "--tune-tokens",
            "2048",
        ],
        {"transcoder", "clt", "transcoder-kl-mixed", "clt-kl-mixed", "spd", "spd-0.5"},
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
    recipe = SPDRecipe(components=8, gate_hidden=4, steps=1, batch=2)
    recipes.train_decomposition(target, recipe, layers=range(4), folder=folder / target.name)
    return folder


@pytest.fixture
def call(target: TargetModel, checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """Run a script as its command line does, with the small target in the place of `tiny`."""
    monkeypatch.setattr("checkpoints.CHECKPOINTS", checkpoints)
    monkeypatch.setattr(baselines, "BASELINE_TOKENS", 8192)
    monkeypatch.setattr(target_models, "load_target", lambda name, device: target)
    monkeypatch.setattr(
        worker_processes, "run_jobs", lambda jobs, devices: [job.function(*job.args, devices[0]) for job in jobs]
    )

    def run(script: str, arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXPERIMENTS / script), run_name="__main__")

    return run


@pytest.mark.parametrize(
    "script", [script if "main" in script else pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS]
)
def test_it_runs_from_its_command_line(
    script: str,
    call: Callable[[str, list[str]], None],
    checkpoints: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, methods = SCRIPTS[script]
    if script.endswith("main.py"):
        arguments = [*arguments, "--checkpoints", str(checkpoints / "main")]
    call(script, [*arguments, "--output", str(tmp_path)])
    names = {file.name for file in tmp_path.iterdir()}
    expected_files = {"points.csv", "layers.csv", "pairs.csv", "pareto.png", "settings.json", "README.md"}
    assert names == expected_files | MORE.get(script, set())
    assert json.loads((tmp_path / "settings.json").read_text())["settings"]["eval_tokens"] == 1024
    points = read_points(tmp_path / "points.csv")
    absent = {"neurons", "neurons-joint"} if "sae_sites" in script else set()  # other sites have no neurons
    expected = methods | BASELINES - absent
    assert expected <= {p.method for p in points}, f"{expected - {p.method for p in points}} are missing"
    assert all(p.ce_degradation == 0 for p in points if p.method == "identity")
    assert all(p.tokens == 1024 - 1024 // 16 for p in points)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    free = [p for p in points if p.protocol == "free"]
    assert len(printed) == 2 + len(free or points) and all(line.count("|") <= 6 for line in printed)


def committed_reports() -> dict[Path, str]:
    """Output folder → the script that wrote its README. Those of 008, which has several parts, and 012 are written by hand."""
    interp = "exp_008_interp_pile"
    reports = {(EXPERIMENTS / script).parent / "output": script for script in SCRIPTS if "exp_" in script}
    reports |= {EXPERIMENTS.parent / "output" / "main": "../main.py"}
    reports |= {EXPERIMENTS / "exp_011_pareto_trained_all_layers" / "output" / "smollm2": EXP_011}
    own = "exp_015_objective_by_protocol"
    reports |= {EXPERIMENTS / own / part: f"{own}/objective_by_protocol.py" for part in ("output", "output/smollm2")}
    reports |= {EXPERIMENTS / interp / "output" / part: f"{interp}/{part}.py" for part in INTERP_PARTS}
    for script in ("exp_009_diagnose_tail/diagnose_tail.py", "exp_013_spd_mask_leak/spd_mask_leak.py"):
        reports[(EXPERIMENTS / script).parent / "output"] = script
    return reports


@pytest.mark.parametrize("folder", committed_reports(), ids=lambda f: str(f.relative_to(EXPERIMENTS.parent)))
def test_a_committed_report_is_what_its_script_draws_without_model_or_data(
    folder: Path, call: Callable[[str, list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in folder.iterdir():
        if file.suffix == ".csv" or file.name == "notes.md":
            shutil.copy(file, tmp_path)
    script = committed_reports()[folder]
    monkeypatch.syspath_prepend(str((EXPERIMENTS / script).parent))
    monkeypatch.setattr(target_models, "load_target", None)
    call(script, ["--target", "tiny", "--replot", "--output", str(tmp_path)])
    drawn, committed = ((where / "README.md").read_text() for where in (tmp_path, folder))
    if "interp" in script:  # its tables are bootstrapped again, and the last digit of an interval is the processor's
        drawn, committed = (text.partition("\n| ")[0] for text in (drawn, committed))
    assert drawn == committed
    figures = {file.name for file in folder.glob("*.png")}
    assert figures and figures == {file.name for file in tmp_path.glob("*.png")}


@pytest.mark.parametrize("named", [["--target=tiny"], ["--target", "tiny"], ["--seed", "0", "--target=tiny"]])
def test_a_preset_is_the_targets_however_it_is_named(named: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    large = study.CoderStudySettings(target="pile", output=Path("large"))
    small = dataclasses.replace(large, target="tiny", d_dict=7, output=Path("small"), device="cpu")
    monkeypatch.setattr(sys, "argv", ["script", *named])
    assert study.settings_for([large, small], "") == small
    monkeypatch.setattr(sys, "argv", ["script", "--seed", "0"])
    assert study.settings_for([large, small], "") == large


def test_a_target_without_sizes_is_refused_in_one_line(call: Callable[[str, list[str]], None], tmp_path: Path) -> None:
    for named in (["--target", "gpt2"], ["--target=gpt2"]):
        with pytest.raises(
            ValueError, match="^this experiment has no sizes for target 'gpt2': use one of pile, tiny, smol"
        ):
            call(EXP_011, [*named, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_that_cannot_be_meant_is_refused_before_anything_is_loaded(
    script: str, call: Callable[[str, list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_models, "load_target", None)
    arguments = SCRIPTS[script][0]
    options = [
        option for option in arguments if option.startswith("--") and option not in ("--target", "--retrain-spd")
    ]
    assert "--eval-tokens" in options
    for option in options:
        for value, least in (("0", 1), ("-5", 1)) if option not in ("--layers", "--tune-tokens") else (("-1", 0),):
            with pytest.raises(ValueError, match=f"^{option} {value} cannot be meant: ask for {least} or more$"):
                call(script, [*arguments, option, value, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "option", "message"),
    [
        ("exp_003_train_clt_pile/train_clt_pile.py", ["--layers", "0", "9"], r"layer \[9\] is not among"),
        ("exp_004_train_spd_gpt2/train_spd_gpt2.py", ["--layers", "9"], r"layer \[9\] is not among"),
        ("exp_005_pareto_gpt2/pareto_gpt2.py", ["--layer", "9"], r"layer \[9\] is not among"),
        ("exp_005_pareto_gpt2/pareto_gpt2.py", ["--l0", "2", "999"], "--l0 999 is more than the 512 neurons"),
        ("exp_007_pareto_pile_all_layers/pareto_pile_all_layers.py", ["--layers", "9"], r"layer \[9\] is not among"),
        ("exp_010_train_transcoder_pile_sweep/train_transcoder_pile_sweep.py", ["--layers", "9"], r"layer \[9\] is not"),
        ("exp_011_pareto_trained_all_layers/pareto_trained_all_layers.py", ["--neurons", "999"], "--neurons 999 is more"),
        ("exp_014_sae_sites/sae_sites.py", ["--layers", "4"], r"layer \[4\] is not among"),
        ("../main.py", ["--layers", "0", "9"], r"layer \[9\] is not among"),
        ("../main.py", ["--neuron-k", "999"], "--neuron-k 999 is more than the 512 neurons in a layer of 'small'"),
        ("../main.py", ["--transcoder-k", "--clt-k"], "no coder was asked for"),
    ],
)  # fmt: skip
def test_what_the_target_has_not_is_refused_before_anything_is_trained(
    script: str, option: list[str], message: str, call: Callable[[str, list[str]], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for training in ("train_group", "train_spd"):
        monkeypatch.setattr(recipes, training, None)
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        call(script, ["--target", "tiny", *option, "--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_layer_that_is_examined_must_be_trained(target: TargetModel) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings(study.CoderStudySettings):
        layer: int
        layers: tuple[int, ...]

    fits = Settings(target="tiny", output=Path("output"), layer=3, layers=(2, 3))
    study.check_fits(fits, target)
    with pytest.raises(ValueError, match="^--layer 1 is none of --layers 2 3: name it there too$"):
        study.check_fits(dataclasses.replace(fits, layer=1), target)


def test_a_single_preset_serves_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script", "--target=hf:org/name"])
    only = study.StudySettings(target="tiny", output=Path("output"))
    assert study.settings_for([only], "") == dataclasses.replace(only, target="hf:org/name")


def test_every_experiment_is_tested() -> None:
    """Here, or in a test file of its own that runs a script of its folder."""
    tested = {script.split("/")[0] for script in SCRIPTS}
    for file in Path(__file__).parent.glob("test_exp_*.py"):
        tested |= {folder.name for folder in EXPERIMENTS.glob("exp_*") if folder.name in file.read_text()}
    assert {folder.name for folder in EXPERIMENTS.glob("exp_*")} <= tested


def test_no_script_is_over_150_lines() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in EXPERIMENTS.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 150} == {}


def test_the_table_of_experiments_is_what_its_script_writes() -> None:
    readme = (EXPERIMENTS / "README.md").read_text()
    assert runpy.run_path(str(EXPERIMENTS / "table.py"))["with_table"](readme) == readme
