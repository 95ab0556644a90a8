"""Reading files that others wrote: every name, shape and value is checked before it is used.

Only safetensors and torch files of plain tensors are opened, and what is wrong is said in one line. A reader writes down
the keys it understands (`Keys`): any other key of a configuration is refused, since nobody here knows what it changes.
Layer and site of a dictionary are read from the hook point or module path that its file names.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from coder import Coder
from config import CLTConfig, CoderConfig, EncoderConfig, SAEConfig, Site
from folding import FoldedLayer, build, fold
from patching import patched
from target_loaders import TARGETS
from target_models import TargetModel, Written, at_site, equal_but_for_rounding, written

Tensors = dict[str, Tensor]


def read_blob(path: Path) -> dict[str, Any]:
    """A JSON or YAML object, with or without a byte-order mark; ValueError in one line for anything else."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: check the path")
    try:
        text = path.read_text("utf-8-sig")
        blob = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError):  # ValueError: of JSON, of UTF-8, of a date in YAML
        raise ValueError(f"{path} is truncated or not {path.suffix[1:].upper()}: fetch it again") from None
    if not isinstance(blob, dict):
        raise ValueError(f"{path} holds a {type(blob).__name__}, not a configuration")
    return blob


def check(source: Path, state: Tensors, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """float32 copies; ValueError naming the first tensor that is missing, unexpected, misshapen or not finite.

    Only a number alone may be whole: quantised weights would need a scale that nobody reads.
    """
    for name in sorted(state.keys() ^ shapes.keys()):
        raise ValueError(f"{source}: tensor {name!r} is {'not expected' if name in state else 'missing'}")
    floats = {}
    for name, shape in shapes.items():
        tensor = state[name]
        if tensor.shape != shape:
            raise ValueError(f"{source}: tensor {name!r} has shape {tuple(tensor.shape)}, expected {shape}")
        whole = shape == () and not tensor.is_complex() and tensor.dtype != torch.bool
        if tensor.layout != torch.strided or not (tensor.is_floating_point() or whole):
            raise ValueError(f"{source}: tensor {name!r} is of {tensor.dtype}: save it as float32")
        floats[name] = tensor.to(torch.float32)
        if not floats[name].isfinite().all():
            raise ValueError(f"{source}: tensor {name!r} holds NaN or infinity")
    return floats


class Only(NamedTuple):
    """The values that a key may have; the first is what the format means where the key is absent."""

    values: tuple[Any, ...]
    remedy: str  # what to do about any other value


class Keys(NamedTuple):
    """What a reader understands of a configuration."""

    read: str  # keys that the reader looks at itself
    only: dict[str, Only]
    harmless: str  # keys that say how it was trained or where it comes from, not what it computes


def understood(source: Path, blob: dict[str, Any], keys: Keys) -> dict[str, Any]:
    """The configuration, with the format's defaults in place of absent keys.

    Raises ValueError naming the first key that is unknown and not null, or whose value is none of those accepted.
    """
    for name in sorted(map(str, blob.keys() - {*keys.read.split(), *keys.only, *keys.harmless.split()})):
        if blob.get(name, name) is not None:
            raise ValueError(
                f"{source}: unknown key {name!r}, which may change what the dictionary computes: delete it if it does not"
            )
    defaults = {name: accepted.values[0] for name, accepted in keys.only.items()}
    for name, accepted in keys.only.items():
        require_one_of(source, defaults | blob, name, allowed=accepted.values, remedy=accepted.remedy)
    return defaults | blob


def require_positive_int(source: Path, blob: dict[str, Any], name: str) -> int:
    """A positive whole number of a configuration."""
    value = blob.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{source}: {name} is {value!r}, not a positive whole number")
    return value


def require_one_of(source: Path, blob: dict[str, Any], name: str, *, allowed: Sequence[Any], remedy: str) -> Any:
    """The value of `name`, which must be one of `allowed`, and of its type: 0 is not False."""
    value = blob.get(name)
    if not any(type(value) is type(option) and value == option for option in allowed):
        raise ValueError(f"{source}: {name} is {value!r}: {remedy}")
    return value


def require_section(source: Path, blob: dict[str, Any], name: str, *, otherwise: str) -> dict[str, Any]:
    """An object inside the configuration."""
    section = blob.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{source} has no {name}: {otherwise}")
    return section


def read_text(source: Path, blob: dict[str, Any], name: str) -> str:
    """A text of a configuration, "" where it is absent or null."""
    value = blob.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{source}: {name} is {value!r}, not a text")
    return value or ""


def read_layer(source: Path, blob: dict[str, Any], name: str) -> int | None:
    """The number of a layer; None where it is absent."""
    value = blob.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise ValueError(f"{source}: {name} is {value!r}, not the number of one: name it with --layer")
    return value


class Place(NamedTuple):
    """Where a dictionary sits in its target; None: as the file says."""

    layer: int | None = None
    site: Site | None = None
    alone: bool = True  # False: one of several, whose layer must not be another than its file says


class NoSite(ValueError):
    """Of a dictionary that reads what this project does not measure; beside others it is passed over."""


SITE_PATTERNS: tuple[tuple[str, Site, int], ...] = (  # hook point or module path → site, and the layer's offset
    (r"(hook_)?resid_post(_layer_\d+)?|(layers|h|blocks)\.\d+", "resid", 0),
    (r"(hook_)?resid_pre(_layer_\d+)?", "resid", -1),
    (r"(hook_)?mlp_out(_layer_\d+)?|mlp|mlp\.hook_out", "mlp_out", 0),
    (r"(hook_)?attn_out(_layer_\d+)?|(self_)?attn|(self_)?attention|attn\.hook_out", "attn_out", 0),
)


def find_layer(source: Path, hook: str, given: Place, said: int | None = None) -> int:
    """The layer's number in a hook point or module path, or the one that the file says, unless it is given."""
    number = re.search(r"(?<![^\W_])\d+(?![^\W_])", hook)
    found = {said} - {None} | ({int(number.group())} if number else set())
    if given.layer is not None:
        if other := set() if given.alone else found - {given.layer}:
            raise ValueError(
                f"--layer {given.layer} was named, and {source} is of layer {other.pop()}: leave --layer out"
            )
        return given.layer
    if not found:
        raise ValueError(f"{source} does not say which layer it belongs to: name it with --layer")
    if len(found) > 1:
        raise ValueError(f"{source} says layer {said} and {hook!r}: name the right one with --layer")
    return found.pop()  # type: ignore[return-value]


def find_place(source: Path, hook: str, given: Place, said: int | None = None) -> tuple[int, Site]:
    """Layer and site of an SAE; raises NoSite for one of the embedding, of heads, of a norm."""
    if given.site is not None:
        return find_layer(source, hook, given, said), given.site
    matches = [(site, shift) for pattern, site, shift in SITE_PATTERNS if re.fullmatch(rf"(.*\.)?({pattern})", hook)]
    if not matches:
        raise NoSite(f"{source}: {hook!r} is no site known here: name it with --site")
    site, shift = matches[0]
    layer = find_layer(source, hook, given, said) + (shift if given.layer is None else 0)
    if layer < 0:
        raise NoSite(f"{source}: {hook!r} is the embedding, which no layer writes")
    return layer, site


NORMALISED = "ln2.hook_normalized"  # the norm's output without its gain and bias, which `fitted` folds in
INPUT_HOOKS = r"(mlp\.hook_in|ln2\.hook_out|ln2\.hook_normalized)"  # the norm's output: what our transcoders read
OUTPUT_HOOKS = r"(hook_mlp_out|mlp\.hook_out)"


def check_transcoder_hooks(source: Path, reads: str, writes: str, *, prefix: str) -> None:
    """Raises ValueError for a transcoder that does not say, or reads and writes other tensors than one layer's MLP.

    `prefix` is a pattern of what comes before a hook's own name; its group is the layer.
    """
    read, written = re.fullmatch(prefix + INPUT_HOOKS, reads), re.fullmatch(prefix + OUTPUT_HOOKS, writes)
    if read is None:
        raise ValueError(f"{source} reads {reads!r}: only transcoders of the MLP's own input, mlp.hook_in, fit")
    if written is None or written[1] != read[1]:
        raise ValueError(f"{source} reads {reads!r} and writes {writes!r}: only hook_mlp_out of the same layer fits")


def named_hooks(given: Place, *hooks: str) -> tuple[str, ...]:
    """Those that a file names, each once, at the given layer."""
    block = r"\g<0>" if given.layer is None else f"blocks.{given.layer}"
    return tuple(dict.fromkeys(re.sub(r"^blocks\.\d+", block, hook) for hook in hooks if hook))


def hook_points(config: CoderConfig) -> tuple[str, ...]:
    """Names of all TransformerLens hook points that a coder reads and writes, each once."""
    if isinstance(config, CLTConfig):
        return tuple(f"blocks.{layer}.{hook}" for layer in config.layers for hook in ("mlp.hook_in", "hook_mlp_out"))
    return tuple(dict.fromkeys(hooks(config)))


def hooks(config: SAEConfig | EncoderConfig) -> tuple[str, str]:
    """Names of the TransformerLens hook points that the coder of one layer reads and writes."""
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


KNOWN_HOOKS = (
    "mlp.hook_in", "ln2.hook_out", "ln2.hook_normalized", "hook_mlp_out", "mlp.hook_out", "hook_attn_out",
    "attn.hook_out", "hook_resid_post", "hook_resid_pre",
)  # fmt: skip


class HookScale(NamedTuple):
    """From what a hook of TransformerLens holds to what the project reads there: x = gain ⊙ held + bias."""

    gain: Float[Tensor, "d"]
    bias: Float[Tensor, "d"]


def same_site(target: TargetModel, hook: str) -> HookScale | None:
    """Whether TransformerLens' hook of that name holds, for this target, the very tensor that the project reads or writes.

    None where it does, a scale that `fitted` folds into the dictionary where the two differ by a norm's gain and bias
    (`ln2.hook_normalized`), ValueError in one line where they differ otherwise: `hook_mlp_out` and `hook_attn_out` come
    behind the norm or the factor that Gemma 2 and Granite have after the module. Decided by comparing tensors, in the
    layer that the name gives (`blocks.3.hook_mlp_out`) or in every one. A name without a hook is a module's own path.
    ValueError also for a hook elsewhere, such as `hook_mlp_in`, which comes before the norm.
    """
    assert target.site == "mlp_out", f"{target.site=}: ask of the target itself"
    number = re.search(r"(?<![^\W_])\d+(?![^\W_])", hook)
    layers = range(target.n_layers) if number is None else [int(number[0])]
    if outside := [layer for layer in layers if not 0 <= layer < target.n_layers]:
        raise ValueError(f"{hook!r} is of layer {outside[0]}: {target.name!r} has {target.n_layers} from 0 on")
    if "hook_" in hook and not hook.endswith(KNOWN_HOOKS):
        raise ValueError(f"{hook!r} is no place that the project reads or writes: {', '.join(KNOWN_HOOKS)} are")
    if hook.endswith(NORMALISED):
        scales = [_norm_scale(target, layer, hook) for layer in layers]
        if any(not torch.equal(a, b) for scale in scales[1:] for a, b in zip(scale, scales[0])):
            raise ValueError(f"{hook!r} differs from what the MLPs read by another gain in every layer: name the layer")
        return scales[0]
    if hook.endswith(("hook_mlp_out", "hook_attn_out")):
        rows = _attention_written(target) if hook.endswith("hook_attn_out") else written(target)
        if any(
            not equal_but_for_rounding(rows[i].added, rows[i].y, rows[i].stream.abs() + rows[i].y.abs()) for i in layers
        ):
            raise ValueError(
                f"{hook!r} of {target.name!r} holds what comes behind a norm or factor, not what the module writes: "
                "dictionaries of it are not supported on this target"
            )
    return None


def _attention_written(target: TargetModel) -> list[Written]:
    """What every attention writes, with every MLP zeroed: the rest of a block's output is then the stream alone."""
    zero = {layer: lambda _x, y: torch.zeros_like(y) for layer in range(target.n_layers)}
    with patched(target, zero):
        return written(at_site(target, "attn_out"))


def _norm_scale(target: TargetModel, layer: int, hook: str) -> HookScale:
    """Gain and bias of the norm before an MLP, told from what it makes of a few inputs: RMSNorm or LayerNorm."""
    norm = target.model.get_submodule(target.mlps[layer].read)
    x = 64 * torch.randn(4, target.d_model, generator=torch.Generator().manual_seed(0)).to(target.device)  # ≫ its ε
    with torch.inference_mode():
        bias, normed = norm(torch.zeros_like(x)), norm(x)
    for centred in (x, x - x.mean(-1, keepdim=True)):
        unit = centred / centred.square().mean(-1, keepdim=True).sqrt()
        gain = ((normed - bias) * unit).sum(0) / unit.square().sum(0)
        if torch.allclose(normed, gain * unit + bias, rtol=1e-3, atol=1e-4 * normed.abs().max().item()):
            return HookScale(gain.clone(), bias[0].clone())
    raise ValueError(f"{hook!r}: {target.mlps[layer].read} of {target.name!r} is no norm with a gain: not supported")


@torch.no_grad()
def fitted(coder: Coder, named: Sequence[str], target: TargetModel) -> Coder:
    """The coder as it is of the target's own tensors, x, where it was trained on what TransformerLens' hooks of these names hold.

    Where that is h with x = gain ⊙ h + bias (`ln2.hook_normalized`), for W h + b is (W / gain) (x − bias) + b:

        W_enc ← W_enc / gain,   b_enc ← b_enc − W_enc bias,   W_skip ← W_skip / gain,   b_dec ← b_dec − W_skip bias

    Raises ValueError where a hook holds another tensor (`same_site`), or where a gain is zero: h is not in x then.
    """
    scales = {find_layer(Path(hook), hook, Place()): scale for hook in named if (scale := same_site(target, hook))}
    if not scales:
        return coder
    parts = [
        part if layer not in scales else _read_through(part, scales[layer], layer)
        for layer, part in zip(coder.config.layers, fold(coder), strict=True)
    ]
    return build(coder.config, parts)


def _read_through(part: FoldedLayer, scale: HookScale, layer: int) -> FoldedLayer:
    if zeros := int((scale.gain == 0).sum()):
        raise ValueError(
            f"{zeros} gains of the norm before layer {layer}'s MLP are 0: what it normalised is lost there"
        )
    gain, bias = (value.to(part.W_enc.device) for value in scale)
    W_enc, W_skip = part.W_enc / gain, None if part.W_skip is None else part.W_skip / gain
    b_dec = part.b_dec if W_skip is None else part.b_dec - W_skip @ bias
    return part._replace(W_enc=W_enc, b_enc=part.b_enc - W_enc @ bias, W_skip=W_skip, b_dec=b_dec)
