"""Dictionaries that other libraries wrote, read into our coders: a reader per format.

Every reader writes down which settings of a file it understands, and refuses one that could change what is computed. Everything
passes through `FoldedLayer` (folding.py); foreign_writers.py goes the other way.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from checkpoints import CONFIG, ENCODER
from coder import Coder
from config import BatchTopK, CLTConfig, CoderConfig, EncoderConfig, Gated, JumpReLU, Relu, Rule, SAEConfig, TopK
from folding import FoldedLayer, Magnitude, build
from foreign_files import (
    Keys,
    Only,
    Place,
    Tensors,
    check,
    check_transcoder_hooks,
    find_layer,
    find_place,
    named_hooks,
    read_blob,
    read_layer,
    read_text,
    require_one_of,
    require_positive_int,
    require_section,
    understood,
)
from logs import read_tensors


class Dictionary(NamedTuple):
    name: str
    target: str  # the model's name in the foreign file, "" where it has none
    coder: Coder
    hooks: tuple[str, ...] = ()  # TransformerLens hook points that the file names as what it reads and writes


Files = dict[str, Any]  # relative path → Tensors (.safetensors, .pt) or a JSON value; configurations last
RELU, JUMPRELU, GATED = Relu(l1=0.0), JumpReLU(l0=0.0), Gated(l1=0.0)  # as read: no file says what penalty trained it


# ------------------------------------------------------------------------ nn_decompositions (bartbussmann), PLT and CLT

UPSTREAM_KINDS = ("vanilla", "topk", "batchtopk", "jumprelu")
UPSTREAM_KEYS = Keys(  # of its commits from daf79b4 on
    read="input_size output_size dict_size encoder_type top_k layers",
    only={
        "input_unit_norm": Only(
            (False, None), "it rescales outputs by the target's own statistics, an oracle: train without it"
        ),
        "pre_enc_bias": Only(
            (False, None), "it takes the output's bias from the input, as no coder here does: train without it"
        ),
    },
    harmless="seed batch_size lr num_tokens l1_coeff beta1 beta2 max_grad_norm device dtype n_batches_to_dead top_k_aux "
    "aux_penalty bandwidth run_name wandb_project perf_log_freq checkpoint_freq n_eval_seqs",
)


def upstream_log_threshold(at: str) -> str:
    return f"jumprelu_log_thresholds{at}" if at else "jumprelu.log_threshold"


def spanned_layers(source: Path, blob: dict[str, Any]) -> tuple[int, ...]:
    """The layers of a CLT, a list that is written as a text; () for a PLT, which has no such key."""
    if blob.get("layers") is None:
        return ()
    text = str(blob["layers"])
    layers = tuple(int(layer) for layer in re.findall(r"\d+", text))
    if re.fullmatch(r"[\[(]\s*\d+(\s*,\s*\d+)*\s*,?\s*[\])]", text) is None or list(layers) != sorted(set(layers)):
        raise ValueError(f"{source}: layers is {text!r}, not ascending numbers")
    return layers


def read_upstream(folder: Path, given: Place) -> list[Dictionary]:
    """encoder.pt + config.json; b_enc is honoured, the saved device is not. A CLT names its layers, a PLT none."""
    source = folder / CONFIG
    blob = understood(source, read_blob(source), UPSTREAM_KEYS)
    kind = require_one_of(
        source, blob, "encoder_type", allowed=UPSTREAM_KINDS, remedy=f"use one of {', '.join(UPSTREAM_KINDS)}"
    )
    d_in, d_out, f = (require_positive_int(source, blob, name) for name in ("input_size", "output_size", "dict_size"))
    if kind == "batchtopk":
        print(f"{source}: upstream stores no threshold, so BatchTopK becomes TopK: the same L0, and no neighbours")
    without_k = {"vanilla": RELU, "jumprelu": JUMPRELU}
    rule: Rule = without_k[kind] if kind in without_k else TopK(require_positive_int(source, blob, "top_k"))
    layers = spanned_layers(source, blob)
    n, ats = (len(layers), [f".{i}" for i in range(len(layers))]) if layers else (1, [""])
    shapes: dict[str, tuple[int, ...]] = {}
    for i, at in enumerate(ats):
        W_dec = (n - i, f, d_out) if at else (f, d_out)
        shapes |= {f"W_enc{at}": (d_in, f), f"b_enc{at}": (f,), f"W_dec{at}": W_dec, f"b_dec{at}": (d_out,)}
        shapes |= {upstream_log_threshold(at): (f,)} if rule == JUMPRELU else {}
    t = check(folder / ENCODER, read_tensors(folder / ENCODER), shapes)
    parts = []
    for at in ats:
        W_dec = rearrange(t[f"W_dec{at}"], "... d_dict d_out -> d_dict (... d_out)")
        theta = t[upstream_log_threshold(at)].exp() if rule == JUMPRELU else None
        parts.append(FoldedLayer(t[f"W_enc{at}"].T, t[f"b_enc{at}"], W_dec, t[f"b_dec{at}"], None, theta))
    config: CoderConfig
    if layers:
        config = CLTConfig(layers=layers, d_in=d_in, d_out=d_out, d_dict=f, rule=rule)
    else:
        config = EncoderConfig(layer=find_layer(source, "", given), d_in=d_in, d_out=d_out, d_dict=f, rule=rule)
    return [Dictionary(folder.resolve().name, "", build(config, parts))]


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
SAELENS_KEYS = Keys(  # of version 6; an absent key means what it does in 6.54.12
    read="architecture d_in d_sae d_out k metadata",
    only={
        "apply_b_dec_to_input": Only((True, False), "say true or false"),
        "normalize_activations": Only(("none", None), "fold its normalisation in SAELens first"),
        "reshape_activations": Only(("none", None), "heads side by side are no site here"),
        "rescale_acts_by_decoder_norm": Only((False, True), "say true or false"),
        "activation_fn": Only(("relu",), "an older version's: load and save it once with SAELens 6"),
        "activation_fn_str": Only(("relu",), "an older version's: load and save it once with SAELens 6"),
        "finetuning_scaling_factor": Only((False, None), "an older version's: load and save it once with SAELens 6"),
    },
    harmless="dtype device use_sparse_activations decoder_init_norm l1_coefficient lp_norm l1_warm_up_steps "
    "l0_coefficient l0_warm_up_steps pre_act_loss_coefficient target_l0 aux_loss_coefficient jumprelu_init_threshold "
    "jumprelu_bandwidth jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input topk_threshold_lr",
)
SAELENS_METADATA = Keys(
    read="model_name hook_name hook_name_out hook_layer hook_layer_out batch_topk model_from_pretrained_kwargs",
    only={
        "hook_head_index": Only((None,), "one head is no site here"),
        "hook_head_index_out": Only((None,), "one head is no site here"),
    },
    harmless="sae_lens_version sae_lens_training_version model_class_name dataset_path context_size prepend_bos "
    "exclude_special_tokens seqpos_slice sequence_separator_token disable_concat_sequences neuronpedia_id hf_hook_name "
    "hf_hook_name_out training_architecture training_architecture_details dataset_trust_remote_code",
)
UNPROCESSED = Only((False,), "it asks for a processed model, and targets are as they were trained")
SAELENS_MODEL = Keys(
    read="",
    only=dict.fromkeys(
        "fold_ln center_writing_weights center_unembed fold_value_biases refactor_factored_attn_matrices".split(),
        UNPROCESSED,
    ),
    harmless="dtype torch_dtype device device_map n_devices trust_remote_code default_prepend_bos default_padding_side",
)


def read_saelens(folder: Path, given: Place) -> list[Dictionary]:
    """cfg.json + sae_weights.safetensors, as SAELens 6 writes them."""
    source, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    blob = understood(source, read_blob(source), SAELENS_KEYS)
    arch = require_one_of(
        source, blob, "architecture", allowed=tuple(SAELENS), remedy=f"use one of {', '.join(SAELENS)}"
    )
    remedy = "load and save it once with SAELens 6 or newer"
    meta = understood(source, require_section(source, blob, "metadata", otherwise=remedy), SAELENS_METADATA)
    if meta.get("model_from_pretrained_kwargs") is not None:
        understood(
            source, require_section(source, meta, "model_from_pretrained_kwargs", otherwise=remedy), SAELENS_MODEL
        )
    make_rule, is_transcoder, skip = SAELENS[arch]
    d_in, f = require_positive_int(source, blob, "d_in"), require_positive_int(source, blob, "d_sae")
    d_out = require_positive_int(source, {"d_out": d_in} | blob if not is_transcoder else blob, "d_out")
    if not is_transcoder and d_out != d_in:
        raise ValueError(f"{source}: d_out is {d_out} of an SAE that reads {d_in}: an SAE rebuilds what it reads")
    if arch != "topk":
        remedy = f"a {arch} dictionary has none"
        require_one_of(source, blob, "k", allowed=(None,), remedy=remedy)
        require_one_of(source, blob, "rescale_acts_by_decoder_norm", allowed=(False,), remedy=remedy)
    gate = "b_gate" if arch == "gated" else "b_enc"
    shapes = {"W_enc": (d_in, f), gate: (f,), "W_dec": (f, d_out), "b_dec": (d_out,)}
    shapes |= {"b_mag": (f,), "r_mag": (f,)} if arch == "gated" else {}
    shapes |= {"threshold": (f,)} if arch.startswith("jumprelu") else {}
    t = check(weights, read_tensors(weights), shapes | ({"W_skip": (d_out, d_in)} if skip else {}))
    W_enc, b_enc, W_dec, theta = t["W_enc"].T, t[gate], t["W_dec"], t.get("threshold")
    magnitude = Magnitude(t["r_mag"], t["b_mag"]) if arch == "gated" else None
    if blob["rescale_acts_by_decoder_norm"]:
        W_enc, b_enc, W_dec = by_decoder_norm(W_enc, b_enc, W_dec)
    rule: Rule = make_rule(require_positive_int(source, blob, "k") if arch == "topk" else 0)
    if theta is not None and "batch_topk" in meta and (theta == theta[0]).all():  # one of ours
        rule = BatchTopK(require_positive_int(source, meta, "batch_topk"))
    read, written = read_text(source, meta, "hook_name"), read_text(source, meta, "hook_name_out")
    read_layer_of = read_layer(source, meta, "hook_layer")
    if is_transcoder:
        check_transcoder_hooks(source, read, written, prefix=r"blocks\.(\d+)\.")
        remedy = "a transcoder subtracts nothing from its input: say false, or fold b_dec into b_enc"
        require_one_of(source, blob, "apply_b_dec_to_input", allowed=(False,), remedy=remedy)
        layer = find_layer(source, read, given, read_layer_of)
        find_layer(source, written, given, read_layer(source, meta, "hook_layer_out"))
        config: CoderConfig = EncoderConfig(layer=layer, d_in=d_in, d_out=d_out, d_dict=f, rule=rule, skip=skip)
    else:
        if written not in ("", read):
            raise ValueError(f"{source} reads {read!r} and writes {written!r}: an SAE rebuilds what it reads")
        layer, site = find_place(source, read, given, read_layer_of)
        config = SAEConfig(layer=layer, site=site, d_in=d_in, d_dict=f, rule=rule)
        if not blob["apply_b_dec_to_input"]:
            shift = W_enc @ t["b_dec"]
            b_enc = b_enc + shift
            magnitude = magnitude and magnitude._replace(b=magnitude.b + magnitude.r.exp() * shift)
    part = FoldedLayer(W_enc, b_enc, W_dec, t["b_dec"], t.get("W_skip"), theta, magnitude)
    is_the_users_word = given.site is not None and not is_transcoder
    named = () if is_the_users_word else named_hooks(given, read, written)
    return [Dictionary(folder.resolve().name, read_text(source, meta, "model_name"), build(config, [part]), named)]


def by_decoder_norm(
    W_enc: Float[Tensor, "d_dict d_in"], b_enc: Float[Tensor, "d_dict"], W_dec: Float[Tensor, "d_dict d_out"]
) -> tuple[Float[Tensor, "d_dict d_in"], Float[Tensor, "d_dict"], Float[Tensor, "d_dict d_out"]]:
    """The tensors of a dictionary whose latents are ranked by what they write: decoder rows of unit norm.

    A row of zeros stays one: its latent is never among the active ones. In float64, where no square of a float32 vanishes.
    """
    norm = W_dec.double().norm(dim=1, keepdim=True)
    rows = W_dec / torch.where(norm > 0, norm, 1.0)
    return (W_enc * norm).float(), (b_enc * norm[:, 0]).float(), rows.float()


# ------------------------------------------------------------------------------------------------------------- sparsify


SPARSIFY_KEYS = Keys(  # an absent key means what it does in 1.3.3, but for `transcode`
    read="d_in k num_latents expansion_factor",
    only={
        "transcode": Only((None, False, True), "say true or false"),
        "activation": Only(("topk", None), "only topk is read"),
        "signed": Only((False, None), "top k by absolute value is no rule here"),  # of 2024
        "skip_connection": Only((False, True), "say true or false"),
    },
    harmless="normalize_decoder multi_topk",  # how it was trained: the decoder's rows are what they are
)


def read_sparsify(folder: Path, given: Place) -> list[Dictionary]:
    """{hookpoint}/cfg.json + sae.safetensors, or {hookpoint}/seed0/…; the hookpoint says the layer.

    Where `transcode` is absent the file is older than February 2025 (pull request 49). Everything of that age subtracted
    b_dec from its input, transcoders too; `old_transcodes` says which it is.
    """
    source, weights, path = folder / "cfg.json", folder / "sae.safetensors", folder.resolve()
    blob = understood(source, found := read_blob(source), SPARSIFY_KEYS)
    hookpoint = path.parent if re.fullmatch(r"seed_?\d+", path.name) else path
    skip, is_old = blob["skip_connection"], blob["transcode"] is None
    transcode = old_transcodes(source, found, hookpoint.parent) if is_old else blob["transcode"]
    if skip and not transcode:
        raise ValueError(f"{source}: an autoencoder with a skip rebuilds nothing: only transcoders may have one")
    d, rule = require_positive_int(source, blob, "d_in"), TopK(require_positive_int(source, blob, "k"))
    factor = require_positive_int(source, {"expansion_factor": 32} | blob, "expansion_factor")
    f = require_positive_int(source, blob, "num_latents") if blob.get("num_latents") else d * factor
    shapes = {"encoder.weight": (f, d), "encoder.bias": (f,), "W_dec": (f, d), "b_dec": (d,)}
    t = check(weights, read_tensors(weights), shapes | ({"W_skip": (d, d)} if skip else {}))
    layer, site = find_place(source, hookpoint.name, given)
    if transcode:
        if site != "mlp_out":
            raise ValueError(f"{source} transcodes {site} of layer {layer}: only transcoders of an MLP fit")
        config: CoderConfig = EncoderConfig(layer=layer, d_in=d, d_out=d, d_dict=f, rule=rule, skip=skip)
    else:
        config = SAEConfig(layer=layer, site=site, d_in=d, d_dict=f, rule=rule)
    b_enc = t["encoder.bias"] - t["encoder.weight"] @ t["b_dec"] if is_old and transcode else t["encoder.bias"]
    part = FoldedLayer(t["encoder.weight"], b_enc, t["W_dec"], t["b_dec"], t.get("W_skip"))
    return [Dictionary(path.name, "", build(config, [part]))]


def old_transcodes(source: Path, blob: dict[str, Any], run: Path) -> bool:
    """Whether a dictionary of before February 2025 is a transcoder, where its files leave no doubt.

    One with a skip is. One whose cfg.json has no `multi_topk` is not: that key came in August 2024 (pull request 23), the
    first transcoders in November (35). For those between, the run's config.json beside the hookpoints says it.
    """
    if blob.get("skip_connection"):
        return True
    if "multi_topk" not in blob:
        return False
    if (file := run / "config.json").exists() and isinstance((settings := read_blob(file)).get("sae"), dict):
        said = {"transcode": False} | settings
        return bool(require_one_of(file, said, "transcode", allowed=(True, False), remedy="say true or false"))
    raise ValueError(
        f'{source} does not say whether it transcodes, nor does its run\'s config.json: write "transcode": false for an SAE; '
        "for a transcoder write true, and fold the b_dec that it subtracted into encoder.bias"
    )


# -------------------------------------------------------------------------------------------------- dictionary_learning

DICTIONARIES = {
    Relu: "AutoEncoder",
    TopK: "AutoEncoderTopK",
    BatchTopK: "BatchTopKSAE",
    JumpReLU: "JumpReluAutoEncoder",
}


DICTIONARY_LEARNING_KEYS = Keys(  # a trainer's, of 0.1.0
    read="dict_class activation_dim dict_size k layer lm_name submodule_name",
    only={},
    harmless="trainer_class lr steps seed device wandb_name warmup_steps decay_start auxk_alpha threshold_beta top_k_aux "
    "threshold_start_step l1_penalty sparsity_warmup_steps resample_steps bandwidth sparsity_penalty target_l0 p_start p_end "
    "sparsity_function anneal_start anneal_end sparsity_queue_length n_sparsity_updates norm_factor",  # folded when saved
)
DICTIONARY_LEARNING_FILE = Keys(read="trainer buffer", only={}, harmless="")


def read_dictionary_learning(folder: Path, given: Place) -> list[Dictionary]:
    """trainer_{i}/ae.pt + config.json of the four classes above; until October 2024 k stands in config.json alone."""
    source, weights = folder / "config.json", folder / "ae.pt"
    whole = read_blob(source)
    trainer = require_section(source, whole, "trainer", otherwise="not a dictionary_learning folder")
    understood(source, whole, DICTIONARY_LEARNING_FILE)
    blob, state = understood(source, trainer, DICTIONARY_LEARNING_KEYS), read_tensors(weights)
    classes = tuple(DICTIONARIES.values())
    cls = require_one_of(source, blob, "dict_class", allowed=classes, remedy=f"use one of {', '.join(classes)}")
    d, f = require_positive_int(source, blob, "activation_dim"), require_positive_int(source, blob, "dict_size")
    if cls not in ("AutoEncoderTopK", "BatchTopKSAE"):
        require_one_of(source, blob, "k", allowed=(0, None), remedy=f"{cls} has none")
    rule: Rule
    if cls == "JumpReluAutoEncoder":
        t = check(weights, state, {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,), "threshold": (f,)})
        b_enc = t["b_enc"] + t["W_enc"].T @ t["b_dec"]  # it subtracts nothing from the input
        part, rule = FoldedLayer(t["W_enc"].T, b_enc, t["W_dec"], t["b_dec"], None, t["threshold"]), JUMPRELU
    else:
        bias = "bias" if cls == "AutoEncoder" else "b_dec"
        shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (f, d), "encoder.bias": (f,), "decoder.weight": (d, f)}
        numbers = {"AutoEncoder": [], "AutoEncoderTopK": [n for n in ("k", "threshold") if n in state]}
        named = numbers.get(cls, ["threshold", *(["k"] if "k" in state else [])])
        t = check(weights, state, shapes | {bias: (d,)} | dict.fromkeys(named, ()))
        part, rule = FoldedLayer(t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t[bias]), RELU
    if cls == "AutoEncoderTopK":
        rule = TopK(counted(source, blob, t))
    if cls == "BatchTopKSAE":
        if t["threshold"] < 0:
            raise ValueError(f"{weights}: threshold is {t['threshold']:g}, never set: train past threshold_start_step")
        part, rule = part._replace(theta=t["threshold"].expand(f)), BatchTopK(counted(source, blob, t))
    buffer = whole.get("buffer") if isinstance(whole.get("buffer"), dict) else {}
    if given.site is None:
        remedy = "only what a submodule writes is a site here: name one with --site"
        require_one_of(source, buffer, "io", allowed=("out", None), remedy=remedy)
    said = read_layer(source, blob, "layer") if given.layer is None else None
    layer, site = find_place(source, read_text(source, blob, "submodule_name"), given, said)
    config = SAEConfig(layer=layer, site=site, d_in=d, d_dict=f, rule=rule)
    return [Dictionary(folder.resolve().name, read_text(source, blob, "lm_name"), build(config, [part]))]


def counted(source: Path, blob: dict[str, Any], t: Tensors) -> int:
    """k of the tensors and of the configuration, which must agree where both have it."""
    number = t["k"].item() if "k" in t else 0.0  # `check` made it a float
    k = require_positive_int(source, {"k": int(number) if number.is_integer() else number} if "k" in t else blob, "k")
    require_one_of(source, blob, "k", allowed=(k, None), remedy=f"its tensor k is {k}: keep the right one")
    return k


# ------------------------------------------------------------------------------------ circuit-tracer, crosslayer-coding


CIRCUIT_TRACER_KEYS = Keys(  # of 0.5.0
    read="model_kind model_name feature_input_hook feature_output_hook activation",
    only={
        "transcoders": Only((None,), "put the files beside it as layer_0.safetensors, layer_1.safetensors, …"),
        "k": Only((None,), "its loader knows no top k"),
    },
    harmless="scan repo_id revision subfolder",
)


def read_circuit_tracer(folder: Path, given: Place) -> list[Dictionary]:
    """config.yaml and one file per layer; relu, or where a threshold is stored x · [x > θ], which θ < 0 would let through."""
    source = folder / "config.yaml"
    blob = understood(source, read_blob(source), CIRCUIT_TRACER_KEYS)
    kinds = ("transcoder_set", "cross_layer_transcoder")
    kind = require_one_of(
        source, blob, "model_kind", allowed=kinds, remedy="only these two are known: " + ", ".join(kinds)
    )
    read, written = read_text(source, blob, "feature_input_hook"), read_text(source, blob, "feature_output_hook")
    check_transcoder_hooks(source, read, written, prefix="()")  # the same of every layer
    target, is_set = read_text(source, blob, "model_name"), kind == "transcoder_set"
    n = count_layers(folder, "layer" if is_set else "W_enc")
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
        activations = (None, "jump_relu", "jumprelu") if theta in t else (None, "relu")
        remedy = "circuit-tracer's loader knows relu and jump_relu, as the thresholds say"
        require_one_of(source, blob, "activation", allowed=activations, remedy=remedy)
        if theta in t and (t[theta] < 0).any():
            raise ValueError(f"{path}: {theta} is negative, which lets negative values through, as no coder here does")
        skip, rule = t.get("W_skip"), JUMPRELU if theta in t else RELU
        W_dec = rearrange(t[f"W_dec{at}"], "d_dict ... d_out -> d_dict (... d_out)")
        part = FoldedLayer(t[f"W_enc{at}"], t[f"b_enc{at}"], W_dec, t[f"b_dec{at}"], skip, t.get(theta))
        parts.append(part)
        if is_set:
            config = EncoderConfig(layer=i, d_in=d, d_out=d, d_dict=f, rule=rule, skip=skip is not None)
            named = (f"blocks.{i}.{read}", f"blocks.{i}.{written}")
            found.append(Dictionary(f"layer_{i}", target, build(config, [part]), named))
    if len({(part.W_enc.shape, part.theta is None, part.W_skip is None) for part in parts}) > 1:
        raise ValueError(f"{folder}: the layers differ in width, activation or skip")
    if is_set:
        return found
    clt = CLTConfig(layers=tuple(range(n)), d_in=d, d_out=d, d_dict=f, rule=rule)
    named = tuple(f"blocks.{i}.{hook}" for i in range(n) for hook in (read, written))
    return [Dictionary(folder.resolve().name, target, build(clt, parts), named)]


def count_layers(folder: Path, stem: str) -> int:
    """How many files {stem}_{i}.safetensors there are; raises ValueError unless they number 0, 1, 2, …"""
    numbers = [path.stem.removeprefix(f"{stem}_") for path in folder.glob(f"{stem}_*.safetensors")]
    if not numbers or set(numbers) != {str(i) for i in range(len(numbers))}:
        raise ValueError(f"{folder} holds {stem}s {sorted(numbers)}, not 0, 1, 2, …: fetch all beside config.yaml")
    return len(numbers)


CROSSLAYER_CODING_KEYS = Keys(  # of CLTConfig in 2025; an absent key means what it does there
    read="num_features num_layers d_model activation_fn model_name mlp_input_template mlp_output_template "
    "tl_input_template tl_output_template",
    only={
        "decoder_tying": Only(("none", None), "only untied decoders are read"),
        "normalization_method": Only(("none", None), "its normalisation is not in the checkpoint"),
        "skip_connection": Only((False, None), "no CLT here has a skip"),
    },
    harmless="jumprelu_threshold batchtopk_k batchtopk_frac batchtopk_straight_through topk_k topk_frac "
    "topk_straight_through clt_dtype expected_input_dtype",
)


def read_crosslayer_coding(folder: Path, given: Place) -> list[Dictionary]:
    """cfg.json + one clt_checkpoint_*.safetensors or model.safetensors, untied decoders; biases of a target add up."""
    source = folder / "cfg.json"
    blob = understood(source, read_blob(source), CROSSLAYER_CODING_KEYS)
    remedy = "its top-k spans all layers: convert it to jumprelu there"
    kind = require_one_of(source, blob, "activation_fn", allowed=("relu", "jumprelu"), remedy=remedy)
    found = sorted([*folder.glob("clt_checkpoint_*.safetensors"), *folder.glob("model.safetensors")])
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} checkpoints: keep the one to read beside cfg.json")
    n, d, f = (require_positive_int(source, blob, name) for name in ("num_layers", "d_model", "num_features"))
    state = read_tensors(found[0])
    encoder, decoder = "encoder_module.encoders.{}.{}", "decoder_module.decoders.{}->{}.{}"
    if encoder.format(n - 1, "weight") not in state or encoder.format(n, "weight") in state:
        raise ValueError(f"{source}: num_layers is {n}, and {found[0].name} has encoders of another number of layers")
    arrows = [(i, j) for i in range(n) for j in range(i, n)]
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
    named = tuple(template.replace("{}", str(i)) for i in range(n) for template in check_templates(source, blob))
    return [Dictionary(folder.resolve().name, read_text(source, blob, "model_name"), build(config, parts), named)]


def check_templates(source: Path, blob: dict[str, Any]) -> tuple[str, ...]:
    """The hook points that it names, of layer {}; module paths go before them.

    Raises ValueError where it was trained on other tensors than MLPs' own.
    """
    paths = [read_text(source, blob, f"mlp_{side}_template") for side in ("input", "output")]
    if any(paths):
        if not (re.search(r"(^|[._])mlp\.input$", paths[0]) and re.search(r"(^|[._])mlp\.output$", paths[1])):
            raise ValueError(f"{source} reads {paths[0]!r} and writes {paths[1]!r}: only CLTs of MLPs fit")
        return ()
    read, written = (read_text(source, blob, f"tl_{side}_template") for side in ("input", "output"))
    if read or written:
        check_transcoder_hooks(source, read, written, prefix=r"blocks\.(\{\})\.")
    return tuple(filter(None, (read, written)))
