"""Reading files that others wrote: every name, shape and value is checked before it is used.

Only safetensors and torch files of plain tensors are opened, and what is wrong is said in one line. Layer and site of a
dictionary are read from the hook point or module path that its file names.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import load_tensors
from config import EncoderConfig, SAEConfig, Site
from target_models import TARGETS

Tensors = dict[str, Tensor]


def read_blob(path: Path) -> dict[str, Any]:
    """A JSON or YAML object; ValueError in one line for anything else."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    try:
        blob = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (json.JSONDecodeError, yaml.YAMLError, UnicodeDecodeError):
        raise ValueError(f"{path} is truncated or not {path.suffix[1:].upper()}: fetch it again") from None
    if not isinstance(blob, dict):
        raise ValueError(f"{path} holds a {type(blob).__name__}, not a configuration")
    return blob


def read_tensors(path: Path) -> Tensors:
    """Named tensors of a safetensors or torch file, on the CPU; nothing is unpickled but tensors."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    kind = "safetensors" if path.suffix == ".safetensors" else "torch"
    try:
        state: Any = load_file(path) if kind == "safetensors" else load_tensors(path, "cpu")
    except (SafetensorError, RuntimeError):  # the latter: a zip archive that torch did not write
        raise ValueError(f"{path} is truncated or no {kind} file: fetch it again") from None
    named = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not named:
        raise ValueError(f"{path} holds something other than named tensors: it is not opened")
    return state  # type: ignore[no-any-return]


def check(source: Path, state: Tensors, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """float32 copies; ValueError naming the first tensor that is missing, unexpected, misshapen or not finite."""
    for name in sorted(state.keys() ^ shapes.keys()):
        raise ValueError(f"{source}: tensor {name!r} is {'not expected' if name in state else 'missing'}")
    floats = {name: tensor.to(torch.float32) for name, tensor in state.items()}
    for name, shape in shapes.items():
        if floats[name].shape != shape:
            raise ValueError(f"{source}: tensor {name!r} has shape {tuple(floats[name].shape)}, expected {shape}")
        if not floats[name].isfinite().all():
            raise ValueError(f"{source}: tensor {name!r} holds NaN or infinity")
    return floats


def require_positive_int(source: Path, blob: dict[str, Any], name: str) -> int:
    """A positive whole number of a configuration."""
    value = blob.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{source}: {name} is {value!r}, not a positive whole number")
    return value


def require_one_of(source: Path, blob: dict[str, Any], name: str, *, allowed: Sequence[Any], remedy: str) -> Any:
    """The value of `name`, which must be one of `allowed`."""
    if blob.get(name) not in allowed:
        raise ValueError(f"{source}: {name} is {blob.get(name)!r}: {remedy}")
    return blob.get(name)


class Place(NamedTuple):
    """Where a dictionary sits in its target; None: as the file says."""

    layer: int | None = None
    site: Site | None = None


INPUT_HOOKS = ("mlp.hook_in", "ln2.hook_out", "ln2.hook_normalized")  # the norm's output: what our transcoders read
SITE_PATTERNS: tuple[tuple[str, Site, int], ...] = (  # hook point or module path → site, and the layer's offset
    (r"hook_resid_post$|resid_post|(layers|h|blocks)\.\d+$", "resid", 0),
    (r"hook_resid_pre$|resid_pre", "resid", -1),
    (r"mlp_out|\.mlp$|mlp\.hook_out$", "mlp_out", 0),
    (r"attn_out|\.(self_)?attn$|\.attention$", "attn_out", 0),
)


def find_layer(source: Path, hook: str, given: Place) -> int:
    """The layer's number in a hook point or module path, unless it is given."""
    number = re.search(r"(?<![^\W_])\d+(?![^\W_])", hook)
    if given.layer is None and number is None:
        raise ValueError(f"{source} does not say which layer it belongs to: name it with --layer")
    return given.layer if given.layer is not None else int(number.group())  # type: ignore[union-attr]


def find_place(source: Path, hook: str, given: Place) -> tuple[int, Site]:
    """Layer and site of an SAE."""
    matches = [(site, shift) for pattern, site, shift in SITE_PATTERNS if re.search(pattern, hook)]
    if given.site is not None:
        return find_layer(source, hook, given), given.site
    if not matches:
        raise ValueError(f"{source}: {hook!r} is no site known here: name it with --site")
    site, shift = matches[0]
    layer = find_layer(source, hook, given) + (shift if given.layer is None else 0)
    if layer < 0:
        raise ValueError(f"{source}: {hook!r} is the embedding, which no layer writes")
    return layer, site


def check_input_hook(source: Path, hook: str | None) -> None:
    """Raises ValueError for a transcoder that reads something else than the MLP does."""
    if hook is not None and not hook.endswith(INPUT_HOOKS):
        raise ValueError(f"{source} reads {hook!r}: only transcoders of the MLP's own input, {INPUT_HOOKS[0]}, fit")


def hooks(config: SAEConfig | EncoderConfig) -> tuple[str, str]:
    """Names of the TransformerLens hook points a coder reads and writes."""
    if isinstance(config, EncoderConfig):
        return f"blocks.{config.layer}.mlp.hook_in", f"blocks.{config.layer}.hook_mlp_out"
    name = {"resid": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out"}[config.site]
    return f"blocks.{config.layer}.{name}", f"blocks.{config.layer}.{name}"


def model_name(target: str) -> str:
    """Under which other libraries find the target's model."""
    if target not in TARGETS:
        return target.removeprefix("hf:").removeprefix("tl:")
    spec = TARGETS[target]
    return spec.exported_as or spec.hub or target


def hub_text(target: str) -> tuple[str | None, int]:
    """(dataset on the hub, tokens per sequence) that a target's coders are trained on; None: its text is not on the hub."""
    if target not in TARGETS:
        return None, 256
    text, context = TARGETS[target].text, TARGETS[target].context
    return (text.path if "/" in text.path else None), context


def neuronpedia_id(target: str, config: SAEConfig | EncoderConfig) -> str:
    """{model}/{layer}-{set}, in Neuronpedia's words for the sites; no two coders of one width share it."""
    model = "gpt2-small" if target == "gpt2" else model_name(target).split("/")[-1]
    kind = "transcoder"
    if isinstance(config, SAEConfig):
        kind = {"resid": "res", "mlp_out": "mlp", "attn_out": "att"}[config.site]
    return f"{model}/{config.layer}-nnd-{kind}-{config.d_dict}"
