"""Which causal language models of `transformers` are targets, and is every other one refused in one line?

A small random model of two blocks is made of every architecture whose configuration can be made small; `make_target` proves
or refuses it (`target_models.prove`). Of one that is proven all is asked again from outside: the identity in place of every
MLP changes no logit, every captured input gives the captured output bit by bit, and both other sites are proven or refused.

    python benchmarks/families.py

Writes results/families.csv, a row per architecture, and prints the counts. Some minutes; architectures over 3 million
parameters at the smallest sizes known here, and those that need another package, are left out.
"""

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from logs import write_csv
from patching import capture, patched
from target_loaders import ASSETS, load_tokenizer
from target_models import Loaded, TargetModel, at_site, make_target
from token_stream import DatasetSpec

OUTPUT = Path(__file__).parent / "results" / "families.csv"
SIZES: dict[str, Any] = {
    "vocab_size": 62, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_embd": 16,
    "n_layer": 2, "n_head": 2, "n_positions": 32, "max_position_embeddings": 32, "ffn_dim": 24, "word_embed_proj_dim": 16,
    "d_model": 16, "n_heads": 2, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 32, "num_layers": 2, "num_heads": 2,
    "attention_types": [[["global"], 2]], "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24,
    "attention_heads": 2, "rotary_dim": 4, "num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "is_decoder": True,
}  # fmt: skip
TOKENS = torch.arange(2, 22).view(2, 10)


class Row(NamedTuple):
    family: str
    verdict: str  # proven, refused, failed; or not made: it could not be made small
    said: str


class TooSlow(Exception):
    """Raised by the clock: some configurations make a model of billions of parameters."""


def too_slow(*_: object) -> None:
    raise TooSlow


def small_model(config: type[transformers.PretrainedConfig], architecture: Any) -> torch.nn.Module:
    """A random model of the sizes above, as far as the configuration knows them, that has run once."""
    torch.manual_seed(0)
    default = config()
    model = (
        architecture(config(**{name: value for name, value in SIZES.items() if hasattr(default, name)})).float().eval()
    )
    size = sum(p.numel() for p in model.parameters())
    if size > 3_000_000:
        raise ValueError(f"{size:,} parameters")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model(TOKENS[:1])
    return model  # type: ignore[no-any-return]


@torch.inference_mode()
def wrong(target: TargetModel) -> str:
    """What does not hold of a target that was proven; empty where all does."""
    layers, original = range(target.n_layers), target.logits(TOKENS)
    with patched(target, {layer: lambda _x, y: y for layer in layers}):
        if not torch.equal(target.logits(TOKENS), original):
            return "the identity changes the logits"
    captured = capture(target, TOKENS, list(layers))
    given = [target.mlp(layer, captured.inputs[layer]) for layer in layers]
    return "" if torch.equal(torch.stack(given), captured.outputs) else "a captured input gives another output"


def sites(target: TargetModel) -> str:
    """Which of the other sites are proven too."""
    found = []
    for site in ("attn_out", "resid"):
        try:
            at_site(target, site)  # type: ignore[arg-type]
            found.append(site)
        except ValueError as refusal:
            found.append(f"no {site} ({refusal})")
    return ", ".join(found)


def verdict(name: str, model: torch.nn.Module) -> Row:
    parts = Loaded(model, load_tokenizer(ASSETS / "tiny" / "tokenizer.json"), 16, DatasetSpec("python"))
    try:
        target = make_target(name, parts, "cpu")
    except ValueError as refusal:
        return Row(name, "failed" if "\n" in str(refusal) else "refused", str(refusal))
    reason = wrong(target)
    return Row(name, "failed" if reason else "proven", reason or sites(target))


def main() -> None:
    os.environ["NN_BF16"] = "off"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, too_slow)
    rows = []
    for config, architecture in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        name = config.__name__.removesuffix("Config")
        signal.alarm(60)
        try:
            model = small_model(config, architecture)
        except Exception as error:  # whatever a configuration says of sizes that do not fit each other
            rows.append(Row(name, "not made", f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"))
            continue
        finally:
            signal.alarm(0)
        rows.append(verdict(name, model))
        write_csv(OUTPUT, Row._fields, rows)
    print(", ".join(f"{count} {what}" for what, count in Counter(row.verdict for row in rows).items()))


if __name__ == "__main__":
    main()
