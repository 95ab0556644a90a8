"""Run folders of Goodfire's SPD repository, written in every layout of names that it has used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def prefixed(prefix: str, names: Callable[[ComponentModel], State]) -> Callable[[ComponentModel], State]:
    return lambda model: {f"{prefix}{k}": v for k, v in names(model).items()}


def dev(model: ComponentModel) -> State:
    return current(model, "ci_fn.")


LAYOUTS: dict[str, Callable[[ComponentModel], State]] = {
    "main": current,
    "dev": dev,
    "legacy": legacy,
    "inside": inside,
    "compiled": prefixed("_orig_mod.", dev),
    "distributed": prefixed("module.", dev),
    "both": prefixed("module._orig_mod.", dev),
    "distributed legacy": prefixed("module.", inside),
    "compiled target": lambda m: {k.replace("target_model.", "target_model._orig_mod."): v for k, v in dev(m).items()},
}


def settings(gate: GateConfig) -> dict[str, Any]:
    """Of a final_config.yaml, what a reader needs; a section that does not apply is null there."""
    ci: dict[str, Any] = {"mode": "layerwise" if gate.local else "global", "fn_type": gate.kind}
    ci |= {"hidden_dims": list(gate.hidden), "simple_transformer_ci_cfg": None}
    if gate.kind == "global_shared_transformer":
        attention = {"n_heads": gate.heads, "max_len": 512, "rope_base": 10000.0}
        sizes = {"d_model": gate.d_model, "n_blocks": gate.blocks, "mlp_hidden_dim": list(gate.hidden)}
        ci |= {"hidden_dims": None, "simple_transformer_ci_cfg": sizes | {"attn_config": attention}}
    target = {"pretrained_model_name": "wandb:goodfire/spd/runs/t-9d2b8f02", "pretrained_model_output_attr": "idx_0"}
    return {"seed": 0, "sigmoid_type": "leaky_hard", "use_delta_component": True, "ci_config": ci} | target


def legacy_settings(gate: GateConfig) -> dict[str, Any]:
    """Of a final_config.yaml from before there was a section on gates."""
    return {"seed": 0, "C": 6, "gate_type": gate.kind, "gate_hidden_dims": list(gate.hidden)}


def write_run(
    folder: Path, state: State, gate: GateConfig, step: int = 400, said: dict[str, Any] | None = None
) -> Path:
    """`said`: what final_config.yaml holds in place of `settings`."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "final_config.yaml").write_text(yaml.safe_dump(settings(gate) if said is None else said))
    torch.save(state, folder / f"model_{step}.pth")
    return folder
