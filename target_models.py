"""Target models: where the MLPs of any model read and write, found and proven, and its tokenizer and text.

A `TargetModel` names, for each layer, the module whose output the MLP reads (the norm before it), the module whose output
is the MLP's output, and the linear map whose input is the hidden activation h. They are found by structure and proven by
a few forward passes on four tokens (`prove`). Nothing else knows one architecture from another.

`at_site(target, "resid")` is the same target, read and written elsewhere: each layer's input and output are then both the
value of the residual stream after the block (or what its attention wrote), and all that is built on a target follows.
"""

import contextlib
import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from config import Site
from devices import check_device
from patching import MLPFunction, MLPPaths, after, before, block_outputs, patched
from python_corpus import Split
from target_loaders import TARGETS, target_spec
from token_stream import DatasetSpec, TokenStream

NORMS = (
    "rms_2",
    "ln_2",
    "ln2",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "final_layer_norm",
    "input_layernorm",
    "ln_1",
)
MLPS = ("mlp", "feed_forward", "fc2")
ATTENTIONS = ("attn", "self_attn", "attention", "self_attention")
UNSUPPORTED = "this block's layout is not supported"
DOWNS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "out", "w2")


@dataclass(frozen=True)
class TargetModel:
    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    mlps: tuple[MLPPaths, ...]
    d_model: int
    d_mlp: int
    vocab_size: int
    context: int  # tokens per sequence used for training and evaluation
    data: DatasetSpec
    fingerprint: str  # hash of the weights
    site: Site = "mlp_out"  # where it is read and written: see `at_site`

    @property
    def n_layers(self) -> int:
        return len(self.mlps)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        out = self.model(tokens)
        return out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.logits

    def stream(self, split: Split, batch: int, seed: int = 0, part: tuple[int, int] = (0, 1)) -> TokenStream:
        """Rows of the target's own text, as long as its context, `batch` at a time; `part` is as in `TokenStream`."""
        return TokenStream(self.data, self.tokenizer, split, batch, self.context, seed, self.vocab_size, part)

    def mlp(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The MLP of one layer on given inputs."""
        paths = self._paths(layer)
        if paths.write != paths.down:
            return self.model.get_submodule(paths.write).forward(x)  # past its own hooks: `patched` may be active
        return self.model.get_submodule(paths.down).forward(self.hidden(layer, x))

    def hidden(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_mlp"]:
        """h, the input of the down projection, on given MLP inputs."""
        paths = self._paths(layer)
        if paths.write == paths.down:  # OPT keeps its two linear maps in the block itself
            block = self.model.get_submodule(paths.down.rpartition(".")[0])
            return block.activation_fn(block.fc1(x))  # type: ignore[operator,no-any-return]
        seen: list[Tensor] = []
        with before(self.model.get_submodule(paths.down), lambda args: seen.append(args[0])):
            self.model.get_submodule(paths.write).forward(x)
        return seen[0]

    def down_weight(self, layer: int) -> Float[Tensor, "d_out d_mlp"]:
        down = self.model.get_submodule(self._paths(layer).down)
        return down.weight if isinstance(down, nn.Linear) else down.weight.T  # transformers' Conv1D is transposed

    def _paths(self, layer: int) -> MLPPaths:
        if self.site != "mlp_out":
            raise ValueError(f"{self.name!r} is read at {self.site}, which has no MLP: load the target itself")
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"layer {layer} is not among the layers 0…{self.n_layers - 1} of {self.name!r}")
        return self.mlps[layer]


def at_site(target: TargetModel, site: Site) -> TargetModel:
    """The target, read and written at `site`: "resid", the stream after a block, or "attn_out", what its attention wrote.

    There x and y of a layer are one value, the output of one module, for `capture`, `patched`, the store and the ruler.
    "mlp_out" gives the target as it is. Raises ValueError where a block has no attention of a known name, or where a forward
    pass does not bear out what the site is (`_prove_stream`, `_prove_attention`).
    """
    if site == "mlp_out":
        return target
    assert target.site == "mlp_out", f"{target.site=}: take another site of the target itself"
    places = []
    for own in target.mlps:
        path = own.read.rpartition(".")[0]
        if site == "attn_out":
            children = dict(target.model.get_submodule(path).named_children())
            name = next((n for n in ATTENTIONS if n in children), None)
            if name is None:
                raise ValueError(f"{path} of {target.name!r} has none of {ATTENTIONS}: its attention cannot be told")
            path = f"{path}.{name}"
        places.append(MLPPaths(path, path, ""))
    view = replace(target, mlps=tuple(places), site=site)
    streams = _prove_stream(target)
    if site == "attn_out":
        with patched(target, {layer: lambda _x, y: torch.zeros_like(y) for layer in range(target.n_layers)}):
            _prove_attention(view, streams[0])
    return view


def mlp_matrices(target: TargetModel, layer: int) -> tuple[str, ...]:
    """Paths of the linear maps of one layer's MLP, the down projection last."""
    paths = target._paths(layer)
    if paths.write == paths.down:
        return (paths.down.removesuffix("fc2") + "fc1", paths.down)
    mlp, down = (target.model.get_submodule(path) for path in (paths.write, paths.down))
    maps = [n for n, m in mlp.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not down]
    return (*(f"{paths.write}.{n}" for n in maps), paths.down)


def writer_parameters(target: TargetModel, layer: int) -> int:
    """Weights at work where a layer's output is computed: its MLP's, its attention's or its whole block's; biases don't count."""
    module = target.model.get_submodule(target.mlps[layer].write)
    if target.site == "mlp_out":
        return sum(target.model.get_submodule(path).weight.numel() for path in mlp_matrices(target, layer))
    return sum(p.numel() for p in module.parameters() if p.ndim >= 2)


# ----------------------------------------------------------------------------------------------------- finding MLPs


def find_mlps(model: nn.Module) -> tuple[MLPPaths, ...]:
    """The MLP of every block, found by the names of the block's children; `prove` says whether they are right."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and _blocks(m)]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no stack of blocks with an MLP after a norm that this project knows"
        )
    name, blocks = max(stacks, key=lambda item: len(item[1]))
    return tuple(_mlp_paths(f"{name}.{i}", block) for i, block in enumerate(blocks))


def _blocks(stack: nn.ModuleList) -> bool:
    children = [dict(block.named_children()) for block in stack]
    return all(any(n in c for n in MLPS) and any(n in c for n in NORMS) for c in children)


def _mlp_paths(path: str, block: nn.Module) -> MLPPaths:
    children = dict(block.named_children())
    read, write = (next(n for n in names if n in children) for names in (NORMS, MLPS))
    inner = dict(children[write].named_children())
    if write == "fc2":
        return MLPPaths(f"{path}.{read}", f"{path}.fc2", f"{path}.fc2")
    down = next((n for n in DOWNS if n in inner), None)
    if down is None:
        raise ValueError(f"{path}.{write} has none of {DOWNS}: its down projection cannot be told")
    wrapped = "._original_component" if "_original_component" in dict(inner[down].named_children()) else ""  # by "tl:"
    return MLPPaths(f"{path}.{read}", f"{path}.{write}", f"{path}.{write}.{down}{wrapped}")


class Written(NamedTuple):
    """What one layer wrote at a target's site on a few tokens, and what came of it."""

    x: Float[Tensor, "batch seq d_in"]  # what it read
    y: Float[Tensor, "batch seq d_out"]
    stream: Float[Tensor, "batch seq d_model"]  # the block's output
    added: Float[Tensor, "batch seq d_model"]  # by how much that falls where 0 is written in place of y


def written(target: TargetModel) -> list[Written]:
    """What every layer writes on four tokens, all layers at once; each is zeroed with the others' work as it was."""
    tokens, seen = few_tokens(target), {}

    def keep(layer: int) -> MLPFunction:
        def note(x: Tensor, y: Tensor) -> Tensor:
            seen[layer] = (x.clone(), y.clone())
            return y

        return note

    layers = range(target.n_layers)
    with patched(target, {layer: keep(layer) for layer in layers}):
        streams = block_outputs(target, tokens)
    zeroed = _streams_with(target, [torch.zeros_like(seen[layer][1]) for layer in layers], streams)
    return [Written(*seen[i], streams[i], streams[i] - zeroed[i]) for i in layers]


def few_tokens(target: TargetModel) -> Int[Tensor, "1 seq"]:
    return torch.arange(4, device=target.device)[None]


def _streams_with(target: TargetModel, values: Sequence[Tensor], streams: Sequence[Tensor]) -> list[Tensor]:
    """Every block's output where `values` are written at the target's site and the blocks before it wrote `streams`."""
    with patched(target, {layer: lambda _x, _y, value=value: value.clone() for layer, value in enumerate(values)}):
        return block_outputs(target, few_tokens(target), streams)


def equal_but_for_rounding(
    a: Float[Tensor, "*batch d"], b: Float[Tensor, "*batch d"], of: Float[Tensor, "*batch d"]
) -> bool:
    """Whether a is b up to the rounding of sums of numbers as large as the largest of `of` at the same position."""
    return bool(((a - b).abs() <= 64 * torch.finfo(a.dtype).eps * of.abs().amax(-1, keepdim=True)).all())


def prove(target: TargetModel) -> None:
    """Raises ValueError unless every MLP is what the target's paths say, all layers at once, on a few tokens:

    its module is given x, what the norm gave, and nothing else (BLOOM's is given the stream too, and returns the sum);
    mlp(x) is what it writes, y; with y put in its own place the block's output is what it was; with the y of other positions
    there it changes by f(y) of those positions. f is the identity, or a norm or factor that the block has behind its MLP.
    """
    _prove_inputs(target)
    layers = written(target)
    for i, (paths, (x, y, _, _)) in enumerate(zip(target.mlps, layers)):
        with torch.inference_mode():
            if not equal_but_for_rounding(target.mlp(i, x), y, y):
                raise ValueError(f"{paths.write} does not write a function of what it reads: {UNSUPPORTED}")
    _prove_added(target, layers)


def _prove_added(target: TargetModel, layers: Sequence[Written]) -> None:
    """Raises ValueError unless every block adds f(y) to its stream, position by position, of whatever y stands at the site."""
    streams = [layer.stream for layer in layers]
    same = _streams_with(target, [layer.y for layer in layers], streams)
    moved = _streams_with(target, [layer.y.roll(1, dims=1) for layer in layers], streams)
    for i, (paths, (_, _, stream, added)) in enumerate(zip(target.mlps, layers)):
        sizes = stream.abs() + added.abs() + added.roll(1, dims=1).abs()
        as_expected = equal_but_for_rounding(moved[i], stream - added + added.roll(1, dims=1), sizes)
        if not as_expected or not equal_but_for_rounding(same[i], stream, stream):
            raise ValueError(f"{paths.write} does not add what it writes to the residual stream: {UNSUPPORTED}")


def _prove_attention(view: TargetModel, embedded: Float[Tensor, "batch seq d_model"]) -> None:
    """Raises ValueError unless attention is all that every block adds to its stream where its MLP is zeroed, as it must be here:

    with y zeroed too the block hands on what it was given (BLOOM's attention returns the sum with the stream, so that nothing
    would be left), and f(y) is added of whatever stands in y's place (`_prove_added`).
    """
    layers = written(view)
    _prove_added(view, layers)
    given = [embedded, *(layer.stream for layer in layers)]
    for paths, own, (_, _, stream, added) in zip(view.mlps, given, layers):
        if not equal_but_for_rounding(stream - added, own, stream.abs() + added.abs()):
            raise ValueError(f"{paths.write} does not write what its block adds to the residual stream: {UNSUPPORTED}")


def _prove_stream(target: TargetModel) -> list[Tensor]:
    """What each block is given; raises ValueError unless that is, from the second on, what the block before it wrote."""
    given: list[Tensor] = []
    blocks = [paths.read.rpartition(".")[0] for paths in target.mlps]
    with contextlib.ExitStack() as stack:
        for block in blocks:
            module = target.model.get_submodule(block)
            stack.enter_context(before(module, lambda args: given.extend(arg.clone() for arg in args[:1])))
        streams = block_outputs(target, few_tokens(target))
    as_written = [torch.equal(own, wrote) for own, wrote in zip(given[1:], streams)]
    if len(given) != len(blocks) or not all(as_written):
        block = blocks[as_written.index(False) + 1] if False in as_written else blocks[0]
        raise ValueError(f"{block} is not given what the block before it writes: {UNSUPPORTED}")
    return given


def _prove_inputs(target: TargetModel) -> None:
    """Raises ValueError where an MLP is given anything else than what its norm gave."""
    gave: dict[int, Tensor] = {}
    got: dict[int, tuple[Any, ...]] = {}
    with contextlib.ExitStack() as stack:
        for i, paths in enumerate(target.mlps):
            entry = paths.write if paths.write != paths.down else paths.down.removesuffix("fc2") + "fc1"
            read, module = target.model.get_submodule(paths.read), target.model.get_submodule(entry)
            stack.enter_context(after(read, lambda _a, out, i=i: gave.__setitem__(i, out.clone())))
            stack.enter_context(before(module, lambda args, i=i: got.__setitem__(i, args)))
        block_outputs(target, few_tokens(target))
    for i, paths in enumerate(target.mlps):
        if len(got.get(i, ())) != 1 or not torch.equal(got[i][0].flatten(), gave[i].flatten()):
            raise ValueError(f"{paths.write} does not read the output of {paths.read} alone: {UNSUPPORTED}")


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any bit of any weight, and with nothing else: name, type, shape and bytes are hashed."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- the target


class Loaded(NamedTuple):
    """A model with its tokenizer, the context length it is used at, and its text: what `make_target` makes a target of."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    context: int
    data: DatasetSpec


def load_target(name: str, device: str) -> TargetModel:
    """The named target, frozen, in eval mode. Raises ValueError for an unknown name or a device that is not there."""
    check_device(device)
    spec = target_spec(name)
    model, tokenizer = spec.load()
    context = spec.context if name in TARGETS else int(min(spec.context, positions(model)))
    return make_target(name, Loaded(model, tokenizer, context, spec.text), device)


def positions(model: nn.Module) -> float:
    """The longest sequence that a model of `transformers`, bridged or not, has positions for; infinite where it does not say."""
    config = getattr(model, "original_model", model).config
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_ctx", "max_seq_len"))
    return min((value for value in named if isinstance(value, int)), default=float("inf"))


def make_target(name: str, parts: Loaded, device: str) -> TargetModel:
    model = parts.model.to(device).eval().requires_grad_(False)
    assert "tokens" in inspect.signature(model.forward).parameters or hasattr(model, "config"), f"{type(model)}"
    mlps = find_mlps(model)
    down = model.get_submodule(mlps[0].down).weight
    d_out, d_mlp = down.shape if isinstance(model.get_submodule(mlps[0].down), nn.Linear) else down.T.shape
    vocab = (
        model.get_input_embeddings().num_embeddings
        if hasattr(model, "get_input_embeddings")
        else model.config.vocab_size
    )
    fingerprint = weights_fingerprint(model)
    target = TargetModel(
        name, model, parts.tokenizer, mlps, d_out, d_mlp, vocab, parts.context, parts.data, fingerprint
    )  # fmt: skip
    prove(target)
    return target
