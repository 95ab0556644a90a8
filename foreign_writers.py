"""What other libraries' loaders open, written from our coders: a pure function per format, from coders to named files.

Everything passes through `FoldedLayer` (folding.py). A BatchTopK coder leaves as a JumpReLU with one threshold for
all latents: the same function of a token. A format that cannot say what a coder computes refuses it, a ValueError; a rule
that no format has been told of is a bug, an AssertionError: it is never written as another rule.
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from einops import rearrange

from checkpoints import CONFIG, ENCODER
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
from folding import fold
from foreign_files import (
    Tensors,
    hooks,
    hub_text,
    model_name,
    neuronpedia_id,
)
from foreign_readers import DICTIONARIES, SAELENS, Dictionary, Files, upstream_log_threshold
from sparsity import log_threshold

SAELENS_VERSION = "6.54.12"  # whose layout this is; a file without one is read as older than 6, without its metadata


def without_none(tensors: dict[str, torch.Tensor | None]) -> Tensors:
    """Without the entries that this coder has not."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def refuse(format_name: str, config: CoderConfig, allowed: str) -> ValueError:
    """What to raise for a coder that a format cannot say. AssertionError for a rule that is none of `Rule`'s."""
    assert isinstance(config.rule, Rule), f"no format knows the rule {config.rule}"
    kind = {"sae": "SAE", "clt": "cross-layer transcoder"}.get(config.kind, config.kind)
    kind = f"skip {kind}" if config.variant == "skip" else kind
    return ValueError(f"{format_name} has no {type(config.rule).__name__} {kind}: it takes {allowed}")


def write_upstream(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for name, _, coder, _ in dictionaries:
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
            case Gated():
                raise refuse("upstream", config, refusal)
            case _:
                assert_never(config.rule)
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
            by_target = rearrange(part.W_dec, "d_dict (target d_out) -> target d_dict d_out", target=n - i)
            state |= {
                f"W_enc{at}": part.W_enc.T,
                f"b_enc{at}": part.b_enc,
                f"W_dec{at}": by_target if is_clt else part.W_dec,
                f"b_dec{at}": part.b_dec,
            }
            state |= {} if part.theta is None else {upstream_log_threshold(at): log_threshold(part.theta)}
        files |= {f"{name}/{ENCODER}": state, f"{name}/{CONFIG}": blob}
    return files


def write_saelens(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for name, target, coder, _ in dictionaries:
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


def write_sparsify(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for _, _, coder, _ in dictionaries:
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


def write_dictionary_learning(dictionaries: Sequence[Dictionary]) -> Files:
    files: Files = {}
    for i, (_, target, coder, _) in enumerate(dictionaries):
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
            case Gated():
                raise refuse("dictionary_learning", config, refusal)
            case _:
                assert_never(config.rule)
        trainer = {
            "dict_class": DICTIONARIES[type(config.rule)], "activation_dim": config.d_in, "dict_size": config.d_dict,
            "k": coder.k or 0, "layer": config.layer, "lm_name": model_name(target),
            "submodule_name": hooks(config)[0].split(".hook_")[1],
        }  # fmt: skip
        files |= {f"trainer_{i}/ae.pt": state, f"trainer_{i}/config.json": {"trainer": trainer}}
    return files


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
            by_target, d_out = "d_dict (target d_out) -> d_dict target d_out", entry.coder.config.d_out
            W_dec = {f"W_dec{at}": rearrange(part.W_dec, by_target, d_out=d_out) if is_clt else part.W_dec}
            named = {f"W_enc_{i}": state, f"W_dec_{i}": W_dec} if is_clt else {f"layer_{i}": state | W_dec}
            files |= {f"{name}.safetensors": tensors for name, tensors in named.items()}
    kind = "cross_layer_transcoder" if is_clt else "transcoder_set"
    files["config.yaml"] = {
        "model_kind": kind, "model_name": model_name(dictionaries[0].target), "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }  # fmt: skip
    return files
