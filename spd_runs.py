"""Finding and reading SPD decompositions: those that this project saved, and the runs of Goodfire's repository.

A run is a folder, or `wandb:entity/project/runs/id`: `final_config.yaml`, `model_{step}.pth` (the highest step counts).

    state dict: target_model.*, _components.<path, . → ->.{V, U, bias}, [ci_fn.]_ci_fns.<path, . → ->.layers.<i>.{W, b}
    global gates: [ci_fn.]_global_ci_fn.{layers.<i>.{W, b} | _input_projector, _blocks.<n>.…, _output_head}
    legacy keys:  _gates. → _ci_fns.,  patched_model. → target_model.,  .original.weight → .weight,
                  target_model.<path>.components.{V, U} → _components.<path, . → ->.{V, U};  _orig_mod. and module. are dropped

A run's tensors say which modules are decomposed, each C, and every width of the gates; the configuration is asked only
for what tensors cannot say: the number of heads of a transformer gate, its rotary embedding's base, the sigmoid. It names
the gate's kind too, which must be that of the tensors. No code of that repository is needed.

Neither says whether a transformer gate RMS-norms each module's input before it reads it. The repository's did not from
2026-02-02 to 02-06, and did at commit 85c6b702 (02-25), from which the runs in `NORMED` were launched; of any other run the user
has to say it (`GateInputs`). A run read wrongly shows in its L0: s-55ea3f9b has about 16 active components a matrix.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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
from logs import cache_folder, check_named, download_run_files, plain_names
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
    r"(?:target_model\.)?(.+)\.components\.([VU]|bias)"
)  # older runs: components inside the module they decompose
BUFFERS = re.compile(r"rotary|\.(cos|sin|inv_freq)$|\.attn\.(masked_)?bias$")  # of targets: constants, not weights
TRANSFORMER = "simple_transformer_ci_cfg"  # the section of final_config.yaml on a transformer gate
SIGMOIDS = ("leaky_hard", "hard")  # both are clamp(z, 0, 1)

GateInputs = Literal["normed", "raw"]  # how a transformer gate reads the inputs of modules
NORMED = ("s-b2b37c4e", "s-55ea3f9b", "s-266cb440", "s-d3834f54")  # the published runs, whose gates norm them


def is_run(reference: str) -> bool:
    return reference.startswith("wandb:") or (Path(reference) / SETTINGS).exists()


def is_decomposition(reference: str) -> bool:
    """Whether a reference names an SPD, ours or a run of Goodfire's, and not a dictionary."""
    return is_run(reference) or is_spd(reference)


def load_decomposition(
    reference: str, target: TargetModel, *, unproven: bool = False, gate_inputs: GateInputs | None = None
) -> Decomposition:
    """A decomposition of `target` by this project or by Goodfire's, in fp32 on its device.

    Raises ValueError where it is of another model, or cannot prove that it is of this one and `unproven` is False.
    """
    if not is_run(reference):
        return Decomposition(*load_spd(reference, target))
    model = load_spd_run(reference, target.model, unproven=unproven, gate_inputs=gate_inputs)
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
        return set(_paths(_state(latest_checkpoint(folder)), model).values())
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


def _state(file: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by their current names."""
    return canonical(check_named(file, load_tensors(file, "cpu")))


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Current names for legacy and development ones, and for those of a compiled or distributed model.

    Raises ValueError where two tensors would have one name.
    """
    out: dict[str, Tensor] = {}
    for old, value in plain_names(state).items():
        key = old.replace("_orig_mod.", "")
        for pattern, replacement in RENAMED:
            key = re.sub(pattern, replacement, key)
        if inside := INSIDE.fullmatch(key):
            key = f"_components.{dashed(inside[1])}.{inside[2]}"
        if key in out:
            raise ValueError(f"the run holds {key!r} twice, as {old!r} too: which one counts is not known")
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


def _section(value: Any, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    """What a section of final_config.yaml says; raises ValueError for a missing one, and for a key not known here."""
    if not isinstance(value, dict):
        raise ValueError(f"final_config.yaml: {name} is {value!r}, not a section: what it describes is not known")
    said = {key: own for key, own in value.items() if own is not None}
    if unknown := sorted(map(str, said.keys() - {*known})):
        raise ValueError(f"final_config.yaml: unknown key {unknown[0]!r} in {name}: it could change what gates compute")
    return said


def _width(state: dict[str, Tensor], key: str) -> int:
    """The number of columns of a matrix."""
    if key not in state or state[key].ndim != 2:
        raise ValueError(f"tensor {key!r} of the run is missing, or no matrix")
    return state[key].shape[1]


def _gate_config(state: dict[str, Tensor], raw: dict[str, Any], run: str, inputs: GateInputs | None) -> GateConfig:
    """What the gates are; raises ValueError where tensors, configuration and `inputs`, the user's word, do not tell or differ."""
    legacy = {"fn_type": raw.get("ci_fn_type", raw.get("gate_type"))}
    said = _section(raw.get("ci_config", legacy), "ci_config", ("mode", "fn_type", "hidden_dims", TRANSFORMER))
    sigmoid = raw.get("sigmoid_type", SIGMOIDS[0])
    if sigmoid not in SIGMOIDS:
        raise ValueError(
            f"final_config.yaml: sigmoid_type is {sigmoid!r}: only {' and '.join(SIGMOIDS)} are known here"
        )
    if "_global_ci_fn._input_projector.W" in state:
        gate = _transformer(state, said.get(TRANSFORMER), run, inputs)
    elif inputs is not None:
        raise ValueError(f"{run} has no transformer gate: --gate-inputs {inputs} says nothing of it")
    else:
        gate = _mlp_gate(state)
    if said.get("fn_type", gate.kind) != gate.kind:
        raise ValueError(
            f"final_config.yaml: fn_type is {said['fn_type']!r}, but the tensors are those of {gate.kind!r}"
        )
    return gate


def _transformer(state: dict[str, Tensor], section: Any, run: str, inputs: GateInputs | None) -> GateConfig:
    said = _section(section, TRANSFORMER, ("d_model", "n_blocks", "mlp_hidden_dim", "attn_config"))
    attention = _section(said.get("attn_config"), "attn_config", ("n_heads", "max_len", "rope_base"))
    heads, base = attention.get("n_heads"), attention.get("rope_base", 10_000)
    d_model = _width(state, "_global_ci_fn._input_projector.W")
    if type(heads) is not int or heads < 1 or d_model % (2 * heads):
        raise ValueError(
            f"final_config.yaml: n_heads is {heads!r}: the gate's width {d_model} has no so many even heads"
        )
    if base != 10_000:
        raise ValueError(f"final_config.yaml: rope_base is {base!r}: only 10000 is known here")
    inputs = inputs or ("normed" if run.endswith(NORMED) else None)
    if inputs is None:
        raise ValueError(
            f"nothing in {run} says whether its gate norms what it reads: give --gate-inputs normed (as spd 85c6b702) or raw"
        )
    return GateConfig(
        kind="global_shared_transformer",
        hidden=(_width(state, "_global_ci_fn._blocks.0.mlp.0.W"),),
        d_model=d_model,
        blocks=len({m[1] for key in state if (m := re.match(r"_global_ci_fn\._blocks\.(\d+)\.", key))}),
        heads=heads,
        causal=False,
        norm_inputs=inputs == "normed",
    )


def _mlp_gate(state: dict[str, Tensor]) -> GateConfig:
    scope = "_global_ci_fn." if any(key.startswith("_global_ci_fn.") for key in state) else "_ci_fns."
    first = next((key for key in state if key.startswith(scope)), None)
    if first is None:
        raise ValueError("the checkpoint holds no gates (_ci_fns.* or _global_ci_fn.*)")
    stem = scope if scope == "_global_ci_fn." else ".".join(first.split(".")[:2]) + "."
    maps = sorted((int(m[1]), state[k]) for k in state if (m := re.fullmatch(re.escape(stem) + r"layers\.(\d+)\.W", k)))
    if not maps or any(W.ndim not in (2, 3) for _, W in maps):
        raise ValueError(f"tensor {first!r} belongs to a kind of gate this project does not know (reverse residual?)")
    hidden, first_W = tuple(W.shape[-1] for _, W in maps[:-1]), maps[0][1]
    if scope == "_global_ci_fn.":
        return GateConfig(kind="global_shared_mlp", hidden=hidden)
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


def load_spd_run(
    reference: str, target_model: nn.Module, *, unproven: bool = False, gate_inputs: GateInputs | None = None
) -> ComponentModel:
    """The decomposition of a Goodfire run, in eval mode, on the target given.

    Raises ValueError in one line for a folder that is no run, a damaged file, an unknown kind of gate, a target that differs
    from the run's or, unless `unproven`, whose weights the run does not hold, a transformer gate of which neither its
    run nor `gate_inputs` says how it reads, and for tensors that do not fit.
    """
    folder = run_folder(reference)
    state, raw = _state(latest_checkpoint(folder)), _settings(folder / SETTINGS)
    paths = _paths(state, target_model)
    _check_target(state, target_model, raw.get("pretrained_model_name"), reference, unproven)
    sizes = {path: _width(state, f"_components.{name}.V") for name, path in paths.items()}
    gate = _gate_config(state, raw, folder.resolve().name, gate_inputs)
    model = ComponentModel(target_model, SPDConfig(components=tuple(sizes.items()), gate=gate), torch.Generator())
    biases = {
        key: value for key, value in model.state_dict().items() if key.endswith(".bias")
    }  # legacy: the target's alone
    own = {key: value.float() for key, value in state.items() if not key.startswith("target_model.")}
    load_state(model, biases | own, reference)
    return model.eval()


def _check_target(
    state: dict[str, Tensor], model: nn.Module, named: str | None, reference: str, unproven: bool
) -> None:
    """Raises ValueError where a weight that the run holds is not the target's, or it lacks one and `unproven` is False.

    `named`: what the run's configuration calls its target.
    """
    weights, own = model.state_dict(), f"load its own target{f', {named}' if named else ''}"
    stored = {
        name: value.float()
        for key, value in state.items()
        if key.startswith("target_model.") and not BUFFERS.search(name := key.removeprefix("target_model."))
    }
    for name in sorted(stored):
        if name not in weights:
            raise ValueError(
                f"{reference} decomposes a model with {name!r}, which the given target does not have: {own}"
            )
        given = weights[name].float().cpu()
        if given.shape != stored[name].shape or not torch.allclose(given, stored[name], atol=1e-3):
            raise ValueError(f"{reference} decomposes a model whose {name!r} differs from the given target's: {own}")
    if missing := [name for name, _ in model.named_parameters() if name not in stored]:
        doubt = f"{reference} holds no {missing[0]!r} of its target: it cannot prove that it decomposes this model"
        if not unproven:
            raise ValueError(f"{doubt}; --unproven-target takes your word for it")
        print(doubt, file=sys.stderr)
