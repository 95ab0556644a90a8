"""What each library computes of its files, restated plainly: (activations, ŷ) of raw inputs, with no code of the readers.

Each function reads a folder's files anew and takes absent keys for what the library takes them. What a library would
refuse is not looked at here: the readers refuse it first.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def config_of(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8-sig")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """As float64, without the prefixes of compiled and distributed modules."""
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor.double() for name, tensor in state.items()}


def top(pre: Tensor, k: int) -> Tensor:
    largest = pre.relu().topk(k)
    return torch.zeros_like(pre).scatter(1, largest.indices, largest.values)


def upstream(folder: Path, x: Tensor) -> Pair:
    t, cfg = tensors_of(folder / "encoder.pt"), config_of(folder / "config.json")

    def act(pre: Tensor, name: str) -> Tensor:
        kind = cfg["encoder_type"]
        return (
            top(pre, cfg["top_k"])
            if "topk" in kind
            else pre.relu() * (pre > (t[name].exp() if kind == "jumprelu" else 0))
        )

    if cfg.get("layers") is None:
        a = act(x @ t["W_enc"] + t["b_enc"], "jumprelu.log_threshold")
        return a, a @ t["W_dec"] + t["b_dec"]
    n = len(x)
    acts = [act(x[i] @ t[f"W_enc.{i}"] + t[f"b_enc.{i}"], f"jumprelu_log_thresholds.{i}") for i in range(n)]
    y = [sum(acts[i] @ t[f"W_dec.{i}"][j - i] for i in range(j + 1)) + t[f"b_dec.{j}"] for j in range(n)]
    return torch.stack(acts), torch.stack(y)


def saelens(folder: Path, x: Tensor) -> Pair:
    t, cfg = tensors_of(folder / "sae_weights.safetensors"), config_of(folder / "cfg.json")
    z = x - t["b_dec"] if cfg.get("apply_b_dec_to_input", True) and "transcoder" not in cfg["architecture"] else x
    rows = t["W_dec"]
    if cfg["architecture"] == "gated":
        gate = z @ t["W_enc"] + t["b_gate"] > 0
        a = gate * (z @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    else:
        pre = z @ t["W_enc"] + t["b_enc"]
        if cfg["architecture"] == "topk":
            if cfg.get("rescale_acts_by_decoder_norm", False):
                norm = rows.norm(dim=1)
                pre, rows = pre * norm, torch.where(norm[:, None] > 0, rows / norm[:, None], 0.0)  # of 0/0 it makes NaN
            a = top(pre, cfg["k"])
        else:
            a = pre.relu() * (pre > t.get("threshold", torch.zeros(())))
    return a, a @ rows + t["b_dec"] + (x @ t["W_skip"].T if "W_skip" in t else 0.0)


def sparsify(folder: Path, x: Tensor) -> Pair:
    """Where `transcode` is absent b_dec is subtracted, by the library of that age and by 1.3.3 alike."""
    t, cfg = tensors_of(folder / "sae.safetensors"), config_of(folder / "cfg.json")
    pre = (x if cfg.get("transcode") else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    a = top(pre, cfg["k"])
    return a, a @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if cfg.get("skip_connection") else 0.0)


def dictionary_learning(folder: Path, x: Tensor) -> Pair:
    t, cfg = tensors_of(folder / "ae.pt"), config_of(folder / "config.json")["trainer"]
    if cfg["dict_class"] == "JumpReluAutoEncoder":
        pre = x @ t["W_enc"] + t["b_enc"]
        a = (pre * (pre > t["threshold"])).relu()
        return a, a @ t["W_dec"] + t["b_dec"]
    bias = t["bias"] if cfg["dict_class"] == "AutoEncoder" else t["b_dec"]
    a = ((x - bias) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    if cfg["dict_class"] == "AutoEncoderTopK":
        a = top(a, int(t["k"]) if "k" in t else cfg["k"])
    if cfg["dict_class"] == "BatchTopKSAE":
        a = a * (a > t["threshold"])
    return a, a @ t["decoder.weight"].T + bias


def circuit_tracer(folder: Path, x: Tensor) -> Pair:
    """Its JumpReLU is x · [x > θ], not rectified."""
    if config_of(folder / "config.yaml")["model_kind"] == "transcoder_set":
        pairs = []
        for i, own in enumerate(x):
            t = tensors_of(folder / f"layer_{i}.safetensors")
            pre = own @ t["W_enc"].T + t["b_enc"]
            theta = t.get("activation_function.threshold")
            a = pre.relu() if theta is None else pre * (pre > theta)
            pairs.append((a, a @ t["W_dec"] + t["b_dec"] + (own @ t["W_skip"].T if "W_skip" in t else 0.0)))
        acts, y = zip(*pairs)
        return torch.stack(acts), torch.stack(y)
    t = {name: value for path in folder.glob("W_*_*.safetensors") for name, value in tensors_of(path).items()}
    pre = [own @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"] for i, own in enumerate(x)]
    jump = [p * (p > t[f"threshold_{i}"]) if f"threshold_{i}" in t else p.relu() for i, p in enumerate(pre)]
    y_hat = [t[f"b_dec_{j}"] + sum(jump[i] @ t[f"W_dec_{i}"][:, j - i] for i in range(j + 1)) for j in range(len(x))]
    return torch.stack(jump), torch.stack(y_hat)


def crosslayer_coding(folder: Path, x: Tensor) -> Pair:
    """Every decoder's bias is added to its target."""
    t, cfg = tensors_of(next(folder.glob("*.safetensors"))), config_of(folder / "cfg.json")
    encoders = [
        (t[f"encoder_module.encoders.{i}.weight"], t[f"encoder_module.encoders.{i}.bias_param"]) for i in range(len(x))
    ]
    pre = [own @ W.T + b for own, (W, b) in zip(x, encoders)]
    theta = t["theta_manager.log_threshold"].exp() if cfg["activation_fn"] == "jumprelu" else torch.zeros(len(x), 1)
    acts = [p * (p > theta[i]) for i, p in enumerate(pre)]
    arrow = "decoder_module.decoders.{}->{}.{}"
    y = [
        sum(
            acts[i] @ t[arrow.format(i, j, "weight")].T + t.get(arrow.format(i, j, "bias_param"), 0.0)
            for i in range(j + 1)
        )
        for j in range(len(x))
    ]
    return torch.stack(acts), torch.stack(y)


def nn_decompositions(folder: Path, x: Tensor) -> Pair:
    """Our own checkpoints: equations of sae.py, transcoder.py and clt.py."""
    t, cfg = tensors_of(folder / "encoder.pt"), json.loads((folder / "config.json").read_text("utf-8-sig"))["config"]

    def act(pre: Tensor, at: str) -> Tensor:
        match cfg["rule"]["class"]:
            case "TopK":
                return top(pre, cfg["rule"]["k"])
            case "Relu":
                return pre.relu()
            case "Gated":
                magnitude = t[f"{at}.r_mag"].exp() * (pre - t[f"{at}.b_enc"]) + t[f"{at}.b_mag"]
                return (pre > 0) * magnitude.relu()
            case "BatchTopK":
                return pre.relu() * (pre > t[f"{at}.threshold"])
            case "JumpReLU":
                return pre * (pre > t[f"{at}.log_theta"].exp())
        raise AssertionError(cfg["rule"])

    def pre(x: Tensor, at: str) -> Tensor:
        return x @ t[f"{at}.W_enc"].T + t[f"{at}.b_enc"]

    if cfg["class"] == "SAEConfig":
        a = act(pre(x * t["x_scale"] - t["b_dec"], "encoder"), "encoder")
        return a, (a @ t["W_dec"] + t["b_dec"]) / t["x_scale"]
    if cfg["class"] == "EncoderConfig":
        a = act(pre(x * t["x_scale"], "encoder"), "encoder")
        skip = x * t["x_scale"] @ t["W_skip"].T if cfg["skip"] else 0.0
        return a, (a @ t["W_dec"] + t["b_dec"] + skip) / t["y_scale"]
    n, d = len(x), x.shape[-1]
    acts = [act(pre(x[i] * t["x_scale"][i], f"encoders.{i}"), f"encoders.{i}") for i in range(n)]
    wide = [a @ t[f"W_dec.{i}"] for i, a in enumerate(acts)]
    y = [
        (sum(wide[i][:, (j - i) * d : (j - i + 1) * d] for i in range(j + 1)) + t["b_dec"][j]) / t["y_scale"][j]
        for j in range(n)
    ]
    return torch.stack(acts), torch.stack(y)


RESTATED: dict[str, Callable[[Path, Tensor], Pair]] = {
    "upstream": upstream,
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "circuit-tracer": circuit_tracer,
    "crosslayer-coding": crosslayer_coding,
    "nn_decompositions": nn_decompositions,
}
