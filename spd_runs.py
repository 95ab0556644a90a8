"""Finding and reading SPD decompositions: those that this project saved, and the runs of Goodfire's repository.

A run is a folder, or `wandb:entity/project/runs/id`: `final_config.yaml`, `model_{step}.pth` (the highest step counts).

    state dict: target_model.*, _components.<path, . → ->.{V, U, bias}, [ci_fn.]_ci_fns.<path, . → ->.layers.<i>.{W, b}
    global gates: [ci_fn.]_global_ci_fn.{layers.<i>.{W, b} | _input_projector, _blocks.<n>.…, _output_head}
    legacy keys:  _gates. → _ci_fns.,  patched_model. → target_model.,  .original.weight → .weight,
                  target_model.<path>.components.{V, U} → _components.<path, . → ->.{V, U};  _orig_mod. and module. are dropped

A run's tensors say which modules are decomposed, each C, and every width of the gates; the configuration is asked only
for what tensors cannot say: the gate's kind and its number of heads. No code of that repository is needed.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from checkpoints import (
    CONFIG,
    Decomposition,
    TrainingRecord,
    checkpoint_folder,
    is_spd,
    load_spd,
    load_state,
    load_tensors,
    read_config,
)
from config import GateConfig, SPDConfig
from logs import cache_folder, download_run_files
from spd_gates import dashed
from spd_model import ComponentModel
from target_loaders import ASSETS
from target_models import TargetModel, mlp_matrices

SETTINGS = "final_config.yaml"
RENAMED = (
    (r"^patched_model\.", "target_model."),
    (r"^_gates\.|^gates\.", "_ci_fns."),
    (r"^ci_fn\.", ""),
    (r"^_global_ci_fn\._global_ci_fn\.", "_global_ci_fn."),
    (r"\.original\.(weight|bias)$", r".\1"),
    (r"^components\.", "_components."),
)
INSIDE = re.compile(
    r"(?:target_model\.)?(.+)\.components\.([VU])"
)  # older runs: components inside the module they decompose


def is_run(reference: str) -> bool:
    return reference.startswith("wandb:") or (Path(reference) / SETTINGS).exists()


def is_decomposition(reference: str) -> bool:
    """Whether a reference names an SPD, ours or a run of Goodfire's, and not a dictionary."""
    return is_run(reference) or is_spd(reference)


def load_decomposition(reference: str, target: TargetModel, *, unproven: bool = False) -> Decomposition:
    """A decomposition of `target` by this project or by Goodfire's, in fp32 on its device.

    Raises ValueError where it is of another model, or cannot prove that it is of this one and `unproven` is False.
    """
    if not is_run(reference):
        return Decomposition(*load_spd(reference, target))
    model = load_spd_run(reference, target.model, unproven=unproven)
    return Decomposition(model.to(target.device), TrainingRecord.imported(reference, target.name))


def find_spd(target: TargetModel, layers: Sequence[int]) -> Decomposition:
    """The decomposition of these layers: the shipped one of `tiny`, else the one among the target's checkpoints.

    That is what exp_004 left there, or the folder of one of Goodfire's runs. Raises ValueError where there is none, or more
    than one.
    """
    shipped = ASSETS / f"spd_{target.name}"
    if shipped.exists():
        return load_decomposition(str(shipped), target)
    wanted, here = {path for layer in layers for path in mlp_matrices(target, layer)}, checkpoint_folder(target.name)
    folders = sorted(file.parent for name in (f"*_spd_*/{CONFIG}", f"*/{SETTINGS}") for file in here.glob(name))
    found = [folder for folder in folders if wanted <= _decomposed(folder, target.model)]
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found) or "none"
        raise ValueError(
            f"one SPD of layers {list(layers)} of {target.name!r} is needed in {here}, there is {names}: see exp_004"
        )
    return load_decomposition(str(found[0]), target)


def _decomposed(folder: Path, model: nn.Module) -> set[str]:
    """Paths of the modules that are decomposed."""
    if is_run(str(folder)):
        return set(_paths(canonical(load_tensors(latest_checkpoint(folder), "cpu")), model).values())
    return set(dict(read_config(folder)[0].components))


def run_folder(reference: str) -> Path:
    """A local run directory as it is; `wandb:entity/project/runs/id` (or without `runs/`) is fetched once."""
    if not reference.startswith("wandb:"):
        return Path(reference)
    run = reference.removeprefix("wandb:").replace("/runs/", "/")
    return download_run_files(run, ("final_config", "model_"), cache_folder() / "wandb")


def latest_checkpoint(folder: Path) -> Path:
    """The `model_{step}.pth` of the largest number; model_9 comes before model_10."""
    found = {int(m[1]): p for p in folder.glob("model_*.pth") if (m := re.fullmatch(r"model_(\d+)\.pth", p.name))}
    if not found or not (folder / SETTINGS).exists():
        raise ValueError(f"{folder} holds no final_config.yaml with a model_STEP.pth beside it: not an SPD run")
    return found[max(found)]


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Current names for legacy and development ones, and for those of a compiled or distributed model."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    out = {}
    for key, value in state.items():
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        if inside := INSIDE.fullmatch(key):
            key = f"_components.{dashed(inside[1])}.{inside[2]}"
        out[key] = value
    return out


def _settings(file: Path) -> dict[str, Any]:
    """The run's configuration; raises ValueError in one line where the file is damaged."""
    try:
        raw = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML ({' '.join(str(error).split())}): fetch it again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds no settings but {raw!r}: fetch it again")
    return raw


def _gate_section(raw: dict[str, Any]) -> dict[str, Any]:
    """The part of final_config.yaml that describes the gates: its names changed between versions."""
    section = raw.get("ci_config") or raw
    return section if isinstance(section, dict) else raw


def _find(node: Any, names: tuple[str, ...]) -> Any:
    """The first value in a nested configuration whose key is one of `names`; None if there is none."""
    if isinstance(node, dict):
        for name in names:
            if node.get(name) is not None:
                return node[name]
        node = list(node.values())
    if isinstance(node, list):
        return next((found for item in node if (found := _find(item, names)) is not None), None)
    return None


def _gate_config(state: dict[str, Tensor], raw: dict[str, Any]) -> GateConfig:
    section = _gate_section(raw)
    if "_global_ci_fn._input_projector.W" in state:
        blocks = {m[1] for key in state if (m := re.match(r"_global_ci_fn\._blocks\.(\d+)\.", key))}
        heads = _find(section, ("n_heads", "num_heads", "n_head"))
        if heads is None:
            raise ValueError("final_config.yaml names no number of attention heads (n_heads) of the transformer gate")
        d_model = state["_global_ci_fn._input_projector.W"].shape[1]
        hidden = state["_global_ci_fn._blocks.0.mlp.0.W"].shape[1]
        causal = bool(_find(section, ("is_causal", "causal")))  # those runs' gates are bidirectional
        return GateConfig(
            kind="global_shared_transformer",
            hidden=(hidden,),
            d_model=d_model,
            blocks=len(blocks),
            heads=int(heads),
            causal=causal,
        )
    reverse = [key for key in state if key.startswith("_global_ci_fn.") and not key.startswith("_global_ci_fn.layers.")]
    if reverse:
        raise ValueError(
            f"tensor {reverse[0]!r} belongs to a kind of gate this project does not know (reverse residual?)"
        )
    scope = "_global_ci_fn." if any(key.startswith("_global_ci_fn.") for key in state) else ""
    first = next((key for key in state if key.startswith(scope or "_ci_fns.")), None)
    if first is None:
        raise ValueError("the checkpoint holds no gates (_ci_fns.* or _global_ci_fn.*)")
    stem = "_global_ci_fn." if scope else ".".join(first.split(".")[:2]) + "."
    layers = sorted(
        (int(m[1]), state[k]) for k in state if (m := re.fullmatch(re.escape(stem) + r"layers\.(\d+)\.W", k))
    )
    hidden = tuple(W.shape[-1] for _, W in layers[:-1])
    if scope:
        return GateConfig(kind="global_shared_mlp", hidden=hidden)
    first_W = layers[0][1]
    kind = "shared_mlp" if first_W.ndim == 2 else "mlp" if first_W.shape[-2] == 1 else "vector_mlp"
    return GateConfig(kind=kind, hidden=hidden)  # type: ignore[arg-type]


def _paths(state: dict[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Name in the state dict (dots as dashes) → module path, proven to exist in the target."""
    modules = {dashed(name): name for name, _ in model.named_modules() if name}
    names = sorted({key.split(".")[1] for key in state if key.startswith("_components.")})
    missing = [name for name in names if name not in modules]
    if missing:
        raise ValueError(f"the run decomposes {missing[0]!r}, which the given target does not have: wrong target?")
    return {name: modules[name] for name in names}


def load_spd_run(reference: str, target_model: nn.Module, *, unproven: bool = False) -> ComponentModel:
    """The decomposition of a Goodfire run, in eval mode, on the target given.

    Raises ValueError in one line for a folder that is no run, a damaged file, an unknown kind of gate, a target that differs
    from the run's or, unless `unproven`, whose weights the run does not hold, and for tensors that do not fit.
    """
    folder = run_folder(reference)
    file = latest_checkpoint(folder)
    state, raw = canonical(load_tensors(file, "cpu")), _settings(folder / SETTINGS)
    paths = _paths(state, target_model)
    _check_target(state, target_model, reference, unproven)
    sizes = {path: state[f"_components.{name}.V"].shape[1] for name, path in paths.items()}
    config = SPDConfig(components=tuple(sizes.items()), gate=_gate_config(state, raw))
    model = ComponentModel(target_model, config, torch.Generator())
    biases = {
        key: value for key, value in model.state_dict().items() if key.endswith(".bias")
    }  # legacy: the target's alone
    own = {
        key: value.float()
        for key, value in state.items()
        if key.startswith(("_components.", "_ci_fns.", "_global_ci_fn."))
    }
    load_state(model, biases | own, reference)
    return model.eval()


def _check_target(state: dict[str, Tensor], model: nn.Module, reference: str, unproven: bool) -> None:
    """Raises ValueError where a weight that the run holds is not the target's, or it lacks one and `unproven` is False."""
    weights = model.state_dict()
    stored = {
        key.removeprefix("target_model."): value.float()
        for key, value in state.items()
        if key.startswith("target_model.")
    }
    for name in sorted(stored.keys() & weights.keys()):
        own = weights[name].float().cpu()
        if own.shape != stored[name].shape or not torch.allclose(own, stored[name], atol=1e-3):
            raise ValueError(
                f"{reference} decomposes a model whose {name!r} differs from the given target's: load its own target"
            )
    if missing := [name for name, _ in model.named_parameters() if name not in stored]:
        doubt = f"{reference} holds no {missing[0]!r} of its target: it cannot prove that it decomposes this model"
        if not unproven:
            raise ValueError(f"{doubt}; --unproven-target takes your word for it")
        print(doubt, file=sys.stderr)
