"""Export a trained target model and write its card: what it saw, how well it predicts, what it writes."""

import dataclasses
import hashlib
import lzma
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import yaml
from safetensors.torch import save_file

from devices import device_name
from llama_simple_mlp import LlamaSimpleMLP
from logs import atomic_path, write_json
from python_corpus import HELD_OUT, environment_corpus, read_source
from target_loaders import load_tokenizer

PROMPT = "import numpy as np\n\n\ndef "


class HeldOut(NamedTuple):
    """What the model makes of the whole validation split."""

    nats: float  # mean cross-entropy per token
    tokens: int
    bytes: int


def export(
    model: LlamaSimpleMLP, log: list[dict[str, float]], held_out: HeldOut, *, tokenizer_file: Path, train_bytes: int,
    device: str, folder: Path, output: Path,
) -> None:  # fmt: skip
    """Write weights, tokenizer and card into `folder`; results, the curve and a README that links the card into `output`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.cpu().state_dict().items() if k != "lm_head.weight"}
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    config = {"model_type": "LlamaSimpleMLP", "use_grouped_query_attention": True} | dataclasses.asdict(model.config)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    text = "".join(read_source(f.path) for split in HELD_OUT for f in environment_corpus(split)).encode()
    train = environment_corpus("train")
    results = {
        "bits_per_byte": held_out.nats / math.log(2) * held_out.tokens / held_out.bytes,
        "nats_per_token": held_out.nats,
        "held_out_bytes": held_out.bytes,
        "held_out_tokens": held_out.tokens,
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
        "train_tokens": log[-1]["tokens"],
        "train_seconds": log[-1]["seconds"],
        "corpus_files": len(train),
        "corpus_bytes": train_bytes,
        "corpus_fingerprint": hashlib.sha256("\n".join(f.name for f in train).encode()).hexdigest()[:16],
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": device_name(device),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results | {"log": log})
    plot(log, held_out.nats, output)
    (folder / "README.md").write_text(card(model, results, folder))
    (output / "README.md").write_text(
        "# The embedded target\n\nCard: [assets/tiny](../../../assets/tiny/README.md)\n\n![curve](curve.png)\n"
    )


def plot(log: list[dict[str, float]], nats: float, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([r["tokens"] / 1e6 for r in log], [r["loss"] for r in log], lw=0.8, color="0.5", label="training batch")
    axes.axhline(nats, color="C3", ls="--", label=f"held out, all files, at the end: {nats:.3f}")
    axes.set(xlabel="training tokens (millions)", ylabel="cross-entropy (nats per token)", ylim=(2, 5))
    axes.legend(frameon=False)
    figure.savefig(output / "curve.png", dpi=150)
    plt.close(figure)


@torch.inference_mode()
def sample(model: LlamaSimpleMLP, tokenizer_file: Path, length: int) -> str:
    """Text continued from PROMPT at temperature 0.7."""
    tokenizer = load_tokenizer(tokenizer_file)
    tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer(PROMPT)["input_ids"]]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(length):
        logits = model(tokens[:, -model.config.block_size :])[0][0, -1] / 0.7
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]], dim=1)
    return tokenizer.decode(tokens[0, 1:], skip_special_tokens=True)


def card(model: LlamaSimpleMLP, r: dict[str, float], folder: Path) -> str:
    c = model.config
    bytes_per_token = r["held_out_bytes"] / r["held_out_tokens"]
    met = "met" if r["bits_per_byte"] <= 1.25 else "NOT met"
    return f"""# tiny

A LlamaSimpleMLP ({c.n_layer} layers, n_embd {c.n_embd}, n_intermediate {c.n_intermediate}, {c.n_head} heads,
context {c.block_size}, vocabulary {c.vocab_size},
{r["parameters"]:,} parameters) trained by `experiments/exp_000_train_tiny_target` on Python sources.

| | |
|---|---|
| held-out bits per byte | **{r["bits_per_byte"]:.3f}** over {r["held_out_bytes"]:,} bytes (bar: ≤ 1.25, {met}) |
| `xz -9` on the same bytes | {r["xz_bits_per_byte"]:.3f} bits per byte |
| held-out cross-entropy | {r["nats_per_token"]:.3f} nats per token of {bytes_per_token:.2f} bytes |
| training | {r["train_tokens"]:,} tokens, each seen once; {r["train_seconds"] / 60:.0f} minutes on {r["device"]} |
| corpus | {r["corpus_files"]:,} files, {r["corpus_bytes"]:,} bytes; fingerprint of the file names {r["corpus_fingerprint"]} |

The corpus is the standard library and site-packages of the environment that `requirements.txt` made, de-duplicated; one file in
50, by a hash of its path, is held out. On another machine the files may differ a little, the held-out ones stay held out.

![curve](../../experiments/exp_000_train_tiny_target/output/curve.png)

A sample at temperature 0.7, from the prompt `{PROMPT.strip().splitlines()[0]}` … `def`:

```python
{sample(model, folder / "tokenizer.json", 250)}
```
"""
