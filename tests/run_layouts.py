"""Run folders of Goodfire's SPD repository, written in every layout of names that it has used."""

from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from torch import Tensor

from config import GateConfig
from spd_model import ComponentModel

State = dict[str, Tensor]


def current(model: ComponentModel, gates: str = "") -> State:
    """Names of the main branch; with `ci_fn.` before the gates, those of dev."""
    own = {k if k.startswith("_components") else gates + k: v for k, v in model.state_dict().items()}
    return own | {f"target_model.{k}": v for k, v in model.target_model.state_dict().items()}


def legacy(model: ComponentModel) -> State:
    own = {k.replace("_ci_fns.", "_gates."): v for k, v in model.state_dict().items()}
    weights = model.target_model.state_dict().items()
    return own | {f"patched_model.{k.replace('c_fc.weight', 'c_fc.original.weight')}": v for k, v in weights}


def inside(model: ComponentModel) -> State:
    """Components inside the modules that they decompose, which keep their own weights as `original`."""
    state = {k: v for k, v in legacy(model).items() if not k.startswith("_components.")}
    for path, part in model.components.items():
        state |= {f"patched_model.{path}.components.{name}": getattr(part, name).detach() for name in "VU"}
    return state


def prefixed(prefix: str) -> Callable[[ComponentModel], State]:
    return lambda model: {f"{prefix}{k}": v for k, v in current(model, "ci_fn.").items()}


LAYOUTS: dict[str, Callable[[ComponentModel], State]] = {
    "main": current,
    "dev": lambda model: current(model, "ci_fn."),
    "legacy": legacy,
    "inside": inside,
    "compiled": prefixed("_orig_mod."),
    "distributed": prefixed("module."),
    "both": prefixed("module._orig_mod."),
}


def write_run(folder: Path, state: State, gate: GateConfig, step: int = 400) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    ci = {"mode": "global" if not gate.local else "layerwise", "fn_type": gate.kind, "hidden_dims": list(gate.hidden)}
    ci["transformer_cfg"] = {"d_model": gate.d_model, "n_blocks": gate.blocks, "attn_config": {"n_heads": gate.heads}}
    (folder / "final_config.yaml").write_text(yaml.safe_dump({"seed": 0, "ci_config": ci}))
    torch.save(state, folder / f"model_{step}.pth")
    return folder
