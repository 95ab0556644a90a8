"""Dictionaries in the field's formats: a reader and a writer of each, as pure functions of named tensors.

Everything passes through `FoldedLayer` (folding.py). A BatchTopK coder leaves as a JumpReLU with one threshold for
all latents: the same function of a token. A format that cannot say what a coder computes refuses it.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoints import CONFIG, ENCODER, resolve
from coder import Coder
from config import (
    BatchTopK,
    CLTConfig,
    CoderConfig,
    EncoderConfig,
    Gated,
    JumpReLU,
    Relu,
    Rule,
    SAEConfig,
    TopK,
)
from folding import FoldedLayer, Magnitude, build, fold
from foreign_files import (
    Place,
    Tensors,
    check,
    check_input_hook,
    find_layer,
    find_place,
    hooks,
    hub_text,
    model_name,
    neuronpedia_id,
    read_blob,
    read_tensors,
    require_one_of,
    require_positive_int,
)
from sparsity import log_threshold


class Dictionary(NamedTuple):
    name: str
    target: str  # the model's name in the foreign file, "" where it has none
    coder: Coder


Files = dict[str, Any]  # relative path → Tensors (.safetensors, .pt) or a JSON value; configurations last
RELU, JUMPRELU, GATED = Relu(l1=0.0), JumpReLU(l0=0.0), Gated(l1=0.0)  # as read: no file says what penalty trained it


class Format(NamedTuple):
    marker: str  # the file that tells a dictionary's folder
    read: Callable[[Path, Place], list[Dictionary]]  # of one folder that holds the marker
    write: Callable[[Sequence[Dictionary]], Files] | None  # None: import only


def without_none(tensors: dict[str, torch.Tensor | None]) -> Tensors:
    """Without the entries that this coder has not."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def refuse(format_name: str, config: CoderConfig, allowed: str) -> ValueError:
    """What to raise for a coder that a format cannot say, or may not be able to: one of a rule unknown here, too."""
    kind = {"sae": "SAE", "clt": "cross-layer transcoder"}.get(config.kind, config.kind)
    kind = f"skip {kind}" if config.variant == "skip" else kind
    return ValueError(f"{format_name} has no {type(config.rule).__name__} {kind}: it takes {allowed}")


# ------------------------------------------------------------------------ nn_decompositions (bartbussmann), PLT and CLT

UPSTREAM_KINDS = ("vanilla", "topk", "batchtopk", "jumprelu")
UPSTREAM_KEYS = (
    "input_size output_size dict_size encoder_type seed batch_size lr num_tokens l1_coeff beta1 beta2 max_grad_norm "
    "device dtype n_batches_to_dead input_unit_norm pre_enc_bias top_k top_k_aux aux_penalty bandwidth run_name "
    "wandb_project perf_log_freq checkpoint_freq n_eval_seqs layers"
).split()


def upstream_log_threshold(at: str) -> str:
    return f"jumprelu_log_thresholds{at}" if at else "jumprelu.log_threshold"


def read_upstream(folder: Path, given: Place) -> list[Dictionary]:
    """encoder.pt + config.json; b_enc is honoured, the saved device is not. A CLT names its layers, a PLT none."""
    source = folder / CONFIG
    blob = read_blob(source)
    for name in sorted(blob.keys() - set(UPSTREAM_KEYS)):
        raise ValueError(f"{source}: unknown key {name!r}: written by another version, or already a checkpoint of ours")
    require_one_of(
        source,
        blob,
        "input_unit_norm",
        allowed=(None, False),
        remedy="it rescales outputs by the target's own statistics, an oracle",
    )
    require_one_of(
        source,
        blob,
        "pre_enc_bias",
        allowed=(None, False),
        remedy="it takes the output's bias from the input, as no coder here does",
    )
    kind = require_one_of(
        source, blob, "encoder_type", allowed=UPSTREAM_KINDS, remedy=f"use one of {', '.join(UPSTREAM_KINDS)}"
    )
    d_in, d_out, f = (require_positive_int(source, blob, name) for name in ("input_size", "output_size", "dict_size"))
    if kind == "batchtopk":
        print(f"{source}: upstream stores no threshold, so BatchTopK becomes TopK: the same L0, and no neighbours")
    rule: Rule = (
        RELU
        if kind == "vanilla"
        else JUMPRELU
        if kind == "jumprelu"
        else TopK(require_positive_int(source, blob, "top_k"))
    )
    layers = tuple(int(layer) for layer in re.findall(r"\d+", str(blob.get("layers", ""))))
    if "layers" in blob and (not layers or list(layers) != sorted(set(layers))):
        raise ValueError(f"{source}: layers is {blob['layers']!r}, not ascending numbers")
    n, ats = (len(layers), [f".{i}" for i in range(len(layers))]) if "layers" in blob else (1, [""])
    shapes: dict[str, tuple[int, ...]] = {}
    for i, at in enumerate(ats):
        W_dec = (n - i, f, d_out) if at else (f, d_out)
        shapes |= {f"W_enc{at}": (d_in, f), f"b_enc{at}": (f,), f"W_dec{at}": W_dec, f"b_dec{at}": (d_out,)}
        shapes |= {upstream_log_threshold(at): (f,)} if rule == JUMPRELU else {}
    t = check(folder / ENCODER, read_tensors(folder / ENCODER), shapes)
    parts = []
    for i, at in enumerate(ats):
        W_dec = t[f"W_dec{at}"].view(n - i, f, d_out).transpose(0, 1).reshape(f, -1)
        theta = t[upstream_log_threshold(at)].exp() if rule == JUMPRELU else None
        parts.append(FoldedLayer(t[f"W_enc{at}"].T, t[f"b_enc{at}"], W_dec, t[f"b_dec{at}"], None, theta))
    config: CoderConfig
    if "layers" in blob:
        config = CLTConfig(layers=layers, d_in=d_in, d_out=d_out, d_dict=f, rule=rule)
    else:
        config = EncoderConfig(layer=find_layer(source, "", given), d_in=d_in, d_out=d_out, d_dict=f, rule=rule)
    return [Dictionary(folder.resolve().name, "", build(config, parts))]


def write_upstream(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for name, _, coder in dictionaries:
        config, parts, refusal = (
            coder.config,
            fold(coder),
            "transcoders without a skip, and CLTs, of the first four rules",
        )
        if config.kind == "sae" or config.variant:
            raise refuse("upstream", config, refusal)
        match config.rule:
            case Relu(l1):
                kind, own = "vanilla", {"l1_coeff": l1}
            case TopK(k):
                kind, own = "topk", {"top_k": k}
            case BatchTopK(k):
                kind, own = "jumprelu", {"top_k": k}
            case JumpReLU(bandwidth=bandwidth):
                kind, own = "jumprelu", {"bandwidth": bandwidth}
            case _:
                raise refuse("upstream", config, refusal)
        n, f, is_clt = len(parts), config.d_dict, config.kind == "clt"
        blob = {
            "input_size": config.d_in, "output_size": config.d_out, "dict_size": f, "encoder_type": kind, "seed": 0,
            "batch_size": 4096, "lr": 3e-4, "num_tokens": 0, "l1_coeff": 0.0, "beta1": 0.9, "beta2": 0.999,
            "max_grad_norm": 1.0, "device": "cpu", "dtype": "torch.float32", "n_batches_to_dead": 50, "top_k": 0,
            "top_k_aux": config.d_in // 2, "aux_penalty": 1 / 32, "bandwidth": 0.001, "wandb_project": "",
            "perf_log_freq": 1000, "checkpoint_freq": "final", "n_eval_seqs": 8,
        } | own  # fmt: skip
        scope = {"input_unit_norm": False, "pre_enc_bias": False, "run_name": name}
        blob |= {"layers": str(list(config.layers))} if is_clt else scope
        state: Tensors = {}
        for i, part in enumerate(parts):
            at = f".{i}" if is_clt else ""
            W_dec = part.W_dec.view(f, n - i, -1).transpose(0, 1) if is_clt else part.W_dec
            state |= {
                f"W_enc{at}": part.W_enc.T,
                f"b_enc{at}": part.b_enc,
                f"W_dec{at}": W_dec,
                f"b_dec{at}": part.b_dec,
            }
            state |= {} if part.theta is None else {upstream_log_threshold(at): log_threshold(part.theta)}
        files |= {f"{name}/{ENCODER}": state, f"{name}/{CONFIG}": blob}
    return files


# -------------------------------------------------------------------------------------------------------------- SAELens

SAELENS: dict[str, tuple[Callable[[int], Rule], bool, bool]] = {  # → (rule of this k, is a transcoder, has a skip)
    "standard": (lambda k: RELU, False, False),
    "topk": (TopK, False, False),
    "jumprelu": (lambda k: JUMPRELU, False, False),
    "gated": (lambda k: GATED, False, False),
    "transcoder": (lambda k: RELU, True, False),
    "skip_transcoder": (lambda k: RELU, True, True),
    "jumprelu_transcoder": (lambda k: JUMPRELU, True, False),
    "jumprelu_skip_transcoder": (lambda k: JUMPRELU, True, True),
}  # fmt: skip
SAELENS_VERSION = "6.54.12"  # whose layout this is; a file without one is read as older than 6, without its metadata


def read_saelens(folder: Path, given: Place) -> list[Dictionary]:
    """cfg.json + sae_weights.safetensors, as SAELens 6 writes them."""
    source, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    blob = read_blob(source)
    arch = require_one_of(
        source, blob, "architecture", allowed=tuple(SAELENS), remedy=f"use one of {', '.join(SAELENS)}"
    )
    require_one_of(
        source, blob, "normalize_activations", allowed=(None, "none"), remedy="fold its normalisation in SAELens first"
    )
    require_one_of(
        source, blob, "reshape_activations", allowed=(None, "none"), remedy="heads side by side are no site here"
    )
    meta = blob.get("metadata")
    if not isinstance(meta, dict):
        raise ValueError(f"{source} has no metadata: load and save it once with SAELens 6 or newer")
    make_rule, is_transcoder, skip = SAELENS[arch]
    d_in, f = require_positive_int(source, blob, "d_in"), require_positive_int(source, blob, "d_sae")
    d_out = require_positive_int(source, blob, "d_out") if is_transcoder else d_in
    gate = "b_gate" if arch == "gated" else "b_enc"
    shapes = {"W_enc": (d_in, f), gate: (f,), "W_dec": (f, d_out), "b_dec": (d_out,)}
    shapes |= {"b_mag": (f,), "r_mag": (f,)} if arch == "gated" else {}
    shapes |= {"threshold": (f,)} if arch.startswith("jumprelu") else {}
    t = check(weights, read_tensors(weights), shapes | ({"W_skip": (d_out, d_in)} if skip else {}))
    W_enc, b_enc, W_dec, theta = t["W_enc"].T, t[gate], t["W_dec"], t.get("threshold")
    magnitude = Magnitude(t["r_mag"], t["b_mag"]) if arch == "gated" else None
    if blob.get("rescale_acts_by_decoder_norm"):
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm[:, None], b_enc * norm, W_dec / norm[:, None]
    rule: Rule = make_rule(require_positive_int(source, blob, "k") if arch == "topk" else 0)
    if theta is not None and "batch_topk" in meta and (theta == theta[0]).all():  # one of ours
        rule = BatchTopK(require_positive_int(source, meta, "batch_topk"))
    hook = str(meta.get("hook_name") or "")
    if is_transcoder:
        check_input_hook(source, hook or None)
        layer = find_layer(source, hook, given)
        config: CoderConfig = EncoderConfig(layer=layer, d_in=d_in, d_out=d_out, d_dict=f, rule=rule, skip=skip)
    else:
        layer, site = find_place(source, hook, given)
        config = SAEConfig(layer=layer, site=site, d_in=d_in, d_dict=f, rule=rule)
        if not blob.get("apply_b_dec_to_input"):
            shift = W_enc @ t["b_dec"]
            b_enc = b_enc + shift
            magnitude = magnitude and magnitude._replace(b=magnitude.b + magnitude.r.exp() * shift)
    part = FoldedLayer(W_enc, b_enc, W_dec, t["b_dec"], t.get("W_skip"), theta, magnitude)
    return [Dictionary(folder.resolve().name, str(meta.get("model_name") or ""), build(config, [part]))]


def write_saelens(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for name, target, coder in dictionaries:
        config, part = coder.config, fold(coder)[0]
        rule = {Relu: "standard", TopK: "topk", BatchTopK: "jumprelu", JumpReLU: "jumprelu", Gated: "gated"}.get(
            type(config.rule), "unknown"
        )
        words = ["" if rule == "standard" else rule, config.variant, "transcoder"]
        arch = rule if isinstance(config, SAEConfig) else "_".join(filter(None, words))
        if isinstance(config, CLTConfig) or arch not in SAELENS:
            raise refuse("saelens", config, "SAEs of every rule known, and transcoders of Relu, BatchTopK and JumpReLU")
        read, written = hooks(config)
        dataset, context = hub_text(target)  # what SAELens' dashboards stream
        meta = {
            "sae_lens_version": SAELENS_VERSION, "sae_lens_training_version": None, "model_name": model_name(target),
            "hook_name": read, "hook_name_out": written, "hook_layer": config.layer, "hook_layer_out": config.layer,
            "hook_head_index": None, "model_class_name": "HookedTransformer", "model_from_pretrained_kwargs": {},
            "dataset_path": dataset, "context_size": context, "prepend_bos": False, "exclude_special_tokens": False,
            "seqpos_slice": [None], "sequence_separator_token": "eos", "disable_concat_sequences": False,
            "neuronpedia_id": neuronpedia_id(target, config),
        }  # fmt: skip
        meta |= {"batch_topk": config.rule.k} if isinstance(config.rule, BatchTopK) else {}
        blob = {
            "architecture": arch, "d_in": config.d_in, "d_sae": config.d_dict, "dtype": "float32", "device": "cpu",
            "apply_b_dec_to_input": isinstance(config, SAEConfig), "normalize_activations": "none",
            "reshape_activations": "none", "metadata": meta,
        }  # fmt: skip
        blob |= {"k": config.rule.k, "rescale_acts_by_decoder_norm": False} if isinstance(config.rule, TopK) else {}
        blob |= {"d_out": config.d_out} if isinstance(config, EncoderConfig) else {}
        gate, (r_mag, b_mag) = ("b_enc", (None, None)) if part.magnitude is None else ("b_gate", part.magnitude)
        state = {"W_enc": part.W_enc.T, gate: part.b_enc, "W_dec": part.W_dec, "b_dec": part.b_dec}
        state |= without_none({"threshold": part.theta, "W_skip": part.W_skip, "r_mag": r_mag, "b_mag": b_mag})
        files |= {f"{name}/sae_weights.safetensors": state, f"{name}/cfg.json": blob}
    return files


# ------------------------------------------------------------------------------------------------------------- sparsify


def read_sparsify(folder: Path, given: Place) -> list[Dictionary]:
    """{hookpoint}/cfg.json + sae.safetensors; the folder's name says the layer, `transcode` what is subtracted."""
    source, weights = folder / "cfg.json", folder / "sae.safetensors"
    blob = read_blob(source)
    require_one_of(source, blob, "activation", allowed=(None, "topk"), remedy="only topk is read")
    transcode, skip = bool(blob.get("transcode")), bool(blob.get("skip_connection"))
    if skip and not transcode:
        raise ValueError(f"{source}: an autoencoder with a skip rebuilds nothing: only transcoders may have one")
    d, rule = require_positive_int(source, blob, "d_in"), TopK(require_positive_int(source, blob, "k"))
    f = (
        require_positive_int(source, blob, "num_latents")
        if blob.get("num_latents")
        else d * require_positive_int(source, blob, "expansion_factor")
    )
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    t = check(weights, read_tensors(weights), shapes | ({"W_skip": (d, d)} if skip else {}))
    if transcode:
        layer = find_layer(source, folder.name, given)
        config: CoderConfig = EncoderConfig(layer=layer, d_in=d, d_out=d, d_dict=f, rule=rule, skip=skip)
    else:
        layer, site = find_place(source, folder.name, given)
        config = SAEConfig(layer=layer, site=site, d_in=d, d_dict=f, rule=rule)
    part = FoldedLayer(t["encoder.weight"], t["encoder.bias"], t["W_dec"], t["b_dec"], t.get("W_skip"))
    return [Dictionary(folder.resolve().name, "", build(config, [part]))]


def write_sparsify(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for _, _, coder in dictionaries:
        config, part = coder.config, fold(coder)[0]
        if not isinstance(config.rule, TopK) or isinstance(config, CLTConfig) or config.d_in != config.d_out:
            raise refuse("sparsify", config, "TopK SAEs and TopK transcoders whose input and output are equally wide")
        is_sae = isinstance(config, SAEConfig)
        site = {"resid": "", "mlp_out": ".mlp", "attn_out": ".self_attn"}[config.site] if is_sae else ".mlp"
        blob = {
            "activation": "topk", "expansion_factor": max(config.d_dict // config.d_in, 1), "normalize_decoder": False,
            "num_latents": config.d_dict, "k": config.rule.k, "multi_topk": False, "transcode": not is_sae,
            "skip_connection": part.W_skip is not None, "d_in": config.d_in,
        }  # fmt: skip
        state = {"encoder.weight": part.W_enc, "encoder.bias": part.b_enc, "W_dec": part.W_dec, "b_dec": part.b_dec}
        hookpoint = f"layers.{config.layer}{site}"
        if f"{hookpoint}/cfg.json" in files:
            raise ValueError(f"two dictionaries of {hookpoint}: sparsify keeps one per hookpoint, export them apart")
        state |= without_none({"W_skip": part.W_skip})
        files |= {f"{hookpoint}/sae.safetensors": state, f"{hookpoint}/cfg.json": blob}
    return files


# -------------------------------------------------------------------------------------------------- dictionary_learning

DICTIONARIES = {
    Relu: "AutoEncoder",
    TopK: "AutoEncoderTopK",
    BatchTopK: "BatchTopKSAE",
    JumpReLU: "JumpReluAutoEncoder",
}


def read_dictionary_learning(folder: Path, given: Place) -> list[Dictionary]:
    """trainer_{i}/ae.pt + config.json of the four classes above."""
    source, weights = folder / "config.json", folder / "ae.pt"
    blob = read_blob(source).get("trainer")
    if not isinstance(blob, dict):
        raise ValueError(f"{source} has no trainer: not a dictionary_learning folder")
    classes = tuple(DICTIONARIES.values())
    cls = require_one_of(source, blob, "dict_class", allowed=classes, remedy=f"use one of {', '.join(classes)}")
    d, f, state = (
        require_positive_int(source, blob, "activation_dim"),
        require_positive_int(source, blob, "dict_size"),
        read_tensors(weights),
    )
    rule: Rule
    if cls == "JumpReluAutoEncoder":
        t = check(weights, state, {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,), "threshold": (f,)})
        b_enc = t["b_enc"] + t["W_enc"].T @ t["b_dec"]  # it subtracts nothing from the input
        part, rule = FoldedLayer(t["W_enc"].T, b_enc, t["W_dec"], t["b_dec"], None, t["threshold"]), JUMPRELU
    else:
        bias = "bias" if cls == "AutoEncoder" else "b_dec"
        shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "decoder.weight": (d, f), bias: (d,)}
        t = check(weights, state, shapes | ({} if cls == "AutoEncoder" else {"k": (), "threshold": ()}))
        part, rule = FoldedLayer(t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t[bias]), RELU
    if "k" in t and int(t["k"]) < 1:
        raise ValueError(f"{weights}: k is {int(t['k'])}, not a positive whole number")
    if cls == "AutoEncoderTopK":
        rule = TopK(int(t["k"]))
    if cls == "BatchTopKSAE":
        if t["threshold"] < 0:
            raise ValueError(f"{weights}: threshold is {t['threshold']:g}, never set: train past threshold_start_step")
        part, rule = part._replace(theta=t["threshold"].expand(f)), BatchTopK(int(t["k"]))
    hook = str(blob.get("submodule_name") or "")
    layer = blob.get("layer") if given.layer is None else given.layer
    if layer is not None and (not isinstance(layer, int) or layer < 0):
        raise ValueError(f"{source}: layer is {layer!r}, not the number of one: name it with --layer")
    layer, site = find_place(source, hook, Place(layer, given.site))
    config = SAEConfig(layer=layer, site=site, d_in=d, d_dict=f, rule=rule)
    return [Dictionary(folder.resolve().name, str(blob.get("lm_name") or ""), build(config, [part]))]


def write_dictionary_learning(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for i, (_, target, coder) in enumerate(dictionaries):
        config, part = coder.config, fold(coder)[0]
        refusal = f"SAEs of {', '.join(rule.__name__ for rule in DICTIONARIES)}"
        if not isinstance(config, SAEConfig):
            raise refuse("dictionary_learning", config, refusal)
        W_enc, W_dec, b_dec = part.W_enc, part.W_dec, part.b_dec
        state = {"encoder.weight": W_enc, "encoder.bias": part.b_enc, "decoder.weight": W_dec.T}
        match config.rule:
            case Relu():
                state |= {"bias": b_dec}
            case TopK(k):
                state |= {"b_dec": b_dec, "k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
            case BatchTopK(k):
                threshold = part.theta[0]  # type: ignore[index]
                state |= {"b_dec": b_dec, "k": torch.tensor(k, dtype=torch.int), "threshold": threshold}
            case JumpReLU():  # it subtracts nothing from the input
                state = {"W_enc": W_enc.T, "b_enc": part.b_enc - W_enc @ b_dec, "W_dec": W_dec, "b_dec": b_dec}
                state |= without_none({"threshold": part.theta})
            case _:
                raise refuse("dictionary_learning", config, refusal)
        trainer = {
            "dict_class": DICTIONARIES[type(config.rule)], "activation_dim": config.d_in, "dict_size": config.d_dict,
            "k": coder.k or 0, "layer": config.layer, "lm_name": model_name(target),
            "submodule_name": hooks(config)[0].split(".hook_")[1],
        }  # fmt: skip
        files |= {f"trainer_{i}/ae.pt": state, f"trainer_{i}/config.json": {"trainer": trainer}}
    return files


# ------------------------------------------------------------------------------------ circuit-tracer, crosslayer-coding


def read_circuit_tracer(folder: Path, given: Place) -> list[Dictionary]:
    """config.yaml and one file per layer; relu, or jump-relu where a threshold is stored."""
    source = folder / "config.yaml"
    blob = read_blob(source)
    kind = require_one_of(
        source,
        blob,
        "model_kind",
        allowed=("transcoder_set", "cross_layer_transcoder"),
        remedy="only these two are known",
    )
    activations = (None, "relu", "jump_relu", "jumprelu")
    require_one_of(
        source, blob, "activation", allowed=activations, remedy="circuit-tracer's loader knows relu and jump_relu"
    )
    check_input_hook(source, blob.get("feature_input_hook"))
    target, is_set = str(blob.get("model_name") or ""), kind == "transcoder_set"
    n = len(list(folder.glob("layer_*.safetensors" if is_set else "W_enc_*.safetensors")))
    if n == 0:
        raise ValueError(f"{folder} holds no layers: fetch the weights beside {source.name}")
    found, parts = [], []
    for i in range(n):
        path = folder / (f"layer_{i}.safetensors" if is_set else f"W_enc_{i}.safetensors")
        at, theta = ("", "activation_function.threshold") if is_set else (f"_{i}", f"threshold_{i}")
        state = read_tensors(path) | ({} if is_set else read_tensors(folder / f"W_dec_{i}.safetensors"))
        f, d = (state[f"b_{side}{at}"].numel() if f"b_{side}{at}" in state else 0 for side in ("enc", "dec"))
        shapes = {f"W_enc{at}": (f, d), f"b_enc{at}": (f,), f"b_dec{at}": (d,)}
        shapes |= {f"W_dec{at}": (f, d) if is_set else (f, n - i, d)}
        shapes |= {theta: (f,)} if theta in state else {}
        t = check(path, state, shapes | ({"W_skip": (d, d)} if is_set and "W_skip" in state else {}))
        skip, rule = t.get("W_skip"), JUMPRELU if theta in t else RELU
        W_dec = t[f"W_dec{at}"].reshape(f, -1)
        part = FoldedLayer(t[f"W_enc{at}"], t[f"b_enc{at}"], W_dec, t[f"b_dec{at}"], skip, t.get(theta))
        parts.append(part)
        if is_set:
            config = EncoderConfig(layer=i, d_in=d, d_out=d, d_dict=f, rule=rule, skip=skip is not None)
            found.append(Dictionary(f"layer_{i}", target, build(config, [part])))
    if len({(part.W_enc.shape, part.theta is None, part.W_skip is None) for part in parts}) > 1:
        raise ValueError(f"{folder}: the layers differ in width, activation or skip")
    if is_set:
        return found
    clt = CLTConfig(layers=tuple(range(n)), d_in=d, d_out=d, d_dict=f, rule=rule)
    return [Dictionary(folder.resolve().name, target, build(clt, parts))]


def write_circuit_tracer(dictionaries: Sequence[Dictionary]) -> Files:
    """A set of transcoders, one for each of the layers 0…n−1, or one CLT of them."""
    configs = [entry.coder.config for entry in dictionaries]
    is_clt = isinstance(configs[0], CLTConfig)
    for config in configs:
        alone = isinstance(config, CLTConfig) and len(configs) == 1
        fits = isinstance(config, EncoderConfig) or alone
        fits &= isinstance(config.rule, Relu | BatchTopK | JumpReLU)
        if not fits or config.d_in != config.d_out or config.d_dict != configs[0].d_dict:
            allowed = "one CLT, or transcoders, of one width, d_in = d_out, and Relu, BatchTopK or JumpReLU"
            raise refuse("circuit-tracer", config, allowed)
    layers = [layer for config in configs for layer in config.layers]
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"circuit-tracer wants one coder for each layer from 0 upwards, not layers {layers}")
    files: Files = {}
    for entry in dictionaries:
        for i, part in zip(entry.coder.config.layers, fold(entry.coder)):
            at, theta = (f"_{i}", f"threshold_{i}") if is_clt else ("", "activation_function.threshold")
            state = {f"W_enc{at}": part.W_enc, f"b_enc{at}": part.b_enc, f"b_dec{at}": part.b_dec}
            state |= without_none({theta: part.theta, "W_skip": part.W_skip})
            shape = (len(part.W_dec), -1, entry.coder.config.d_out) if is_clt else part.W_dec.shape
            W_dec = {f"W_dec{at}": part.W_dec.view(shape)}
            named = {f"W_enc_{i}": state, f"W_dec_{i}": W_dec} if is_clt else {f"layer_{i}": state | W_dec}
            files |= {f"{name}.safetensors": tensors for name, tensors in named.items()}
    kind = "cross_layer_transcoder" if is_clt else "transcoder_set"
    files["config.yaml"] = {
        "model_kind": kind, "model_name": model_name(dictionaries[0].target), "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }  # fmt: skip
    return files


def read_crosslayer_coding(folder: Path, given: Place) -> list[Dictionary]:
    """cfg.json + one clt_checkpoint_*.safetensors or model.safetensors, untied decoders; biases of a target add up."""
    source = folder / "cfg.json"
    blob = read_blob(source)
    remedy = "its top-k spans all layers: convert it to jumprelu there"
    kind = require_one_of(source, blob, "activation_fn", allowed=("relu", "jumprelu"), remedy=remedy)
    require_one_of(source, blob, "decoder_tying", allowed=(None, "none"), remedy="only untied decoders are read")
    require_one_of(
        source,
        blob,
        "normalization_method",
        allowed=(None, "none"),
        remedy="its normalisation is not in the checkpoint",
    )
    found = sorted([*folder.glob("clt_checkpoint_*.safetensors"), *folder.glob("model.safetensors")])
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} checkpoints: keep the one to read beside cfg.json")
    n, d, f = (require_positive_int(source, blob, name) for name in ("num_layers", "d_model", "num_features"))
    state, arrows = read_tensors(found[0]), [(i, j) for i in range(n) for j in range(i, n)]
    encoder, decoder = "encoder_module.encoders.{}.{}", "decoder_module.decoders.{}->{}.{}"
    shapes: dict[str, tuple[int, ...]] = {encoder.format(i, "weight"): (f, d) for i in range(n)}
    shapes |= {encoder.format(i, "bias_param"): (f,) for i in range(n)}
    shapes |= {decoder.format(i, j, "weight"): (d, f) for i, j in arrows}
    shapes |= {name: (d,) for i, j in arrows if (name := decoder.format(i, j, "bias_param")) in state}
    t = check(found[0], state, shapes | ({"theta_manager.log_threshold": (n, f)} if kind == "jumprelu" else {}))
    parts = [
        FoldedLayer(
            t[encoder.format(i, "weight")],
            t[encoder.format(i, "bias_param")],
            torch.cat([t[decoder.format(i, j, "weight")].T for j in range(i, n)], dim=1),
            torch.stack([t.get(decoder.format(j, i, "bias_param"), torch.zeros(d)) for j in range(i + 1)]).sum(0),
            theta=t["theta_manager.log_threshold"][i].exp() if kind == "jumprelu" else None,
        )
        for i in range(n)
    ]
    rule = JUMPRELU if kind == "jumprelu" else RELU
    config = CLTConfig(layers=tuple(range(n)), d_in=d, d_out=d, d_dict=f, rule=rule)
    return [Dictionary(folder.resolve().name, str(blob.get("model_name") or ""), build(config, parts))]


FORMATS: dict[str, Format] = {
    "upstream": Format(CONFIG, read_upstream, write_upstream),
    "saelens": Format("cfg.json", read_saelens, write_saelens),
    "sparsify": Format("cfg.json", read_sparsify, write_sparsify),
    "dictionary_learning": Format("config.json", read_dictionary_learning, write_dictionary_learning),
    "circuit-tracer": Format("config.yaml", read_circuit_tracer, write_circuit_tracer),
    "crosslayer-coding": Format("cfg.json", read_crosslayer_coding, None),
}


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def import_dictionaries(name: str, source: str, given: Place) -> list[Dictionary]:
    """Every dictionary of a folder (or W&B artifact), or of its direct subfolders; nothing is written."""
    form, root = format_named(name), resolve(source)
    folders = [root] if (root / form.marker).exists() else sorted(path.parent for path in root.glob(f"*/{form.marker}"))
    if not folders:
        raise ValueError(f"{source} holds no {form.marker}, nor does a folder in it: no {name} dictionary")
    return [dictionary for folder in folders for dictionary in form.read(folder, given)]
