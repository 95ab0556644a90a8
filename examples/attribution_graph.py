"""Attribution graphs of circuit-tracer through our transcoders, and a picture of one; for the environment of `.ci/interop`.

    bash .ci/interop python examples/attribution_graph.py FOLDER PICTURE NAME…

FOLDER/model is what hf_folder.py wrote, FOLDER/points.csv what measure.py found, and FOLDER/NAME/circuit-tracer what interop.py
exported of FOLDER/NAME/checkpoints. Prints, for each name, circuit-tracer's replacement and completeness scores (means
over `PROMPTS`, and their range) beside our ΔCE; draws the graphs of the first prompt.
"""

import csv
import json
import sys
from pathlib import Path

import circuit_tracer.utils.hf_utils as hub
import matplotlib.pyplot as plt
import torch
import yaml
from circuit_tracer import attribute
from circuit_tracer.graph import Graph, compute_graph_scores, prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from matplotlib.axes import Axes
from safetensors.torch import load_file
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

START = "<|endoftext|>"
PROMPTS = [
    "class Point:\n    def __init__(self, width, height):\n        self.width =",
    "import os\nimport numpy as",
    "def mean(values):\n    return sum(values) / len(",
    "for i in range(10):\n    if i % 2 ==",
    "try:\n    value = int(text)\nexcept",
    "with open(path) as file:\n    for line in",
]


def model_weights(folder: Path, c: dict) -> dict[str, torch.Tensor]:
    """The folder's tensors under TransformerLens' names; biases, of which it has none, are left out."""
    t, heads = load_file(folder / "model.safetensors"), c["num_attention_heads"]
    named = {"embed.W_E": t["model.embed_tokens.weight"], "ln_final.w": t["model.norm.weight"]}
    named["unembed.W_U"] = t["model.embed_tokens.weight"].T
    for i in range(c["num_hidden_layers"]):
        own = {name.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): value for name, value in t.items()}
        named |= {f"blocks.{i}.ln1.w": own["input_layernorm"], f"blocks.{i}.ln2.w": own["post_attention_layernorm"]}
        named |= {f"blocks.{i}.mlp.W_in": own["mlp.up_proj"].T, f"blocks.{i}.mlp.W_out": own["mlp.down_proj"].T}
        for name in "qkv":
            W = own[f"self_attn.{name}_proj"]
            named[f"blocks.{i}.attn.W_{name.upper()}"] = W.view(heads, -1, W.shape[1]).mT
        named[f"blocks.{i}.attn.W_O"] = own["self_attn.o_proj"].T.reshape(heads, -1, c["hidden_size"])
    return named


def replacement_model(folder: Path, export: Path) -> TransformerLensReplacementModel:
    """The model with our transcoders beside its MLPs, from two folders and without a network."""
    c = json.loads((folder / "config.json").read_text())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=START)
    config = HookedTransformerConfig(
        n_layers=c["num_hidden_layers"], d_model=c["hidden_size"], n_heads=c["num_attention_heads"],
        d_head=c["hidden_size"] // c["num_attention_heads"], d_mlp=c["intermediate_size"], d_vocab=c["vocab_size"],
        n_ctx=c["max_position_embeddings"], act_fn="gelu_new", normalization_type="RMS", eps=c["rms_norm_eps"],
        positional_embedding_type="rotary", rotary_dim=c["hidden_size"] // c["num_attention_heads"], device="cpu",
        model_name="tiny", default_prepend_bos=False,
    )  # fmt: skip
    hub.snapshot_download = lambda *_args, **_kw: str(export)  # the library opens folders of the hub alone
    settings = yaml.safe_load((export / "config.yaml").read_text()) | {"repo_id": "our/export", "scan": "our/export"}
    transcoders = hub.load_transcoders(settings, torch.device("cpu"), torch.float32, lazy_decoder=False)
    model = TransformerLensReplacementModel.from_config(config, transcoders, tokenizer=tokenizer)
    own = {
        name.replace("old_mlp.", "").replace("old_unembed.", ""): value for name, value in model.state_dict().items()
    }
    named = model_weights(folder, c)
    assert not named.keys() - own.keys(), f"{named.keys() - own.keys()}"
    for name, value in named.items():
        own[name].copy_(value)
    return model


def change_in_loss(folder: Path, name: str, protocol: str) -> float:
    rows = [
        row for row in csv.DictReader((folder / "points.csv").open()) if f"/{name}/checkpoints/" in row["checkpoint"]
    ]
    (row,) = [row for row in rows if row["protocol"] == protocol]
    return float(row["ce_degradation"])


def shown(text: str) -> str:
    return text.replace("\n", "↵").replace(" ", "·")


def draw(ax: Axes, graph: Graph, model: TransformerLensReplacementModel, title: str) -> None:
    """Tokens from left to right, layers from below; an edge is blue where it raises what it leads to, red where it lowers it."""
    kept = prune_graph(graph, node_threshold=0.6, edge_threshold=0.8)
    features, n, layers = (
        graph.active_features[graph.selected_features].tolist(),
        len(graph.input_tokens),
        graph.cfg.n_layers,
    )
    places = [(position, layer + 1) for layer, position, _ in features]
    places += [(position, layer + 1) for layer in range(layers) for position in range(n)]  # errors
    places += [(position, 0) for position in range(n)]
    places += [(n - 1, layers + 1 + 0.3 * k) for k in range(len(graph.logit_targets))]
    crowd: dict[tuple[float, float], list[int]] = {}
    for i in kept.node_mask.nonzero()[:, 0].tolist():
        crowd.setdefault(places[i], []).append(i)
    at = {
        i: (x + 0.8 * ((k + 0.5) / len(own) - 0.5), y + 0.36 * ((k + 0.5) / len(own) - 0.5) * (len(own) > 1))
        for (x, y), own in crowd.items()
        for k, i in enumerate(own)
    }
    weights = graph.adjacency_matrix * kept.edge_mask
    for target, source in kept.edge_mask.nonzero().tolist():
        if target in at and source in at:
            weight = weights[target, source].item() / weights[target].abs().sum().item()
            color, strength = "#2166ac" if weight > 0 else "#b2182b", abs(weight)
            line = {"lw": 0.4 + 2.5 * strength, "alpha": 0.12 + 0.6 * strength, "zorder": 1}
            ax.plot(*zip(at[source], at[target]), color=color, **line)
    ends_of_errors = len(features) + layers * n
    words = [shown(model.tokenizer.decode([t])) for t in graph.input_tokens]
    for i, (x, y) in at.items():
        if i < len(features):
            ax.scatter(x, y, s=26, color="#e08214", edgecolor="white", lw=0.6, zorder=3)
        elif i < ends_of_errors:
            ax.scatter(x, y, s=20, marker="D", color="#bbbbbb", edgecolor="white", lw=0.6, zorder=2)
    for k, (target, p) in enumerate(zip(graph.logit_targets, graph.logit_probabilities)):
        i = len(places) - len(graph.logit_targets) + k
        if i in at:
            ax.annotate(
                f"{shown(target.token_str)} {p:.0%}", at[i], (6, 0), textcoords="offset points", va="center", fontsize=8
            )
    ax.set_yticks(range(layers + 2), ["tokens", *(f"layer {i}" for i in range(layers)), "output"])
    ax.set_xticks(range(n), words, rotation=60, ha="right", family="monospace", fontsize=7)
    ax.set_xlim(-0.6, n + 1)
    ax.set_ylim(-0.3, layers + 1.9)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title(title, fontsize=10, loc="left")


def main(folder: Path, picture: Path, names: list[str]) -> None:
    figure, axes = plt.subplots(len(names), 1, figsize=(10, 4.6 * len(names)), squeeze=False, layout="constrained")
    print("dictionary | replacement score | completeness | ΔCE frozen | ΔCE free")
    for ax, name in zip(axes[:, 0], names):
        model = replacement_model(folder / "model", folder / name / "circuit-tracer")
        graphs = [attribute(START + prompt, model, max_n_logits=3) for prompt in PROMPTS]
        scores = torch.tensor([compute_graph_scores(graph) for graph in graphs])
        said = [f"{s.mean():.2f} [{s.min():.2f}, {s.max():.2f}]" for s in scores.T]
        losses = [f"{change_in_loss(folder, name, protocol):.3f}" for protocol in ("frozen", "free")]
        print(" | ".join([name, *said, *losses]))
        title = f"{name}: replacement score {scores[0, 0]:.2f} on this prompt, ΔCE {losses[1]} with all MLPs replaced"
        draw(ax, graphs[0], model, title)
    figure.savefig(picture, dpi=130)
    print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
