"""Random coders, and what they compute: shared by the interop tests here and those that need the other libraries."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import interop
from checkpoints import TrainingRecord, build_coder, load_checkpoint, save_checkpoint
from coder import Coder
from config import BatchTopK, CLTConfig, CoderConfig, EncoderConfig, Gated, JumpReLU, Relu, Rule, SAEConfig, TopK
from folding import fold
from foreign_files import hook_points
from foreign_formats import FORMATS, Dictionary
from sparse_ops import to_dense

D, F, B, N = 6, 20, 40, 3
RULES = [Relu(l1=0.0), TopK(3), BatchTopK(3), JumpReLU(l0=0.0)]
GATED = Gated(l1=0.0)  # which SAELens alone has a word for, of an SAE


def random_coder(config: CoderConfig, seed: int = 0) -> Coder:
    """Every tensor random, scales far from one, thresholds in the middle of the pre-activations."""
    g = torch.Generator().manual_seed(seed)
    coder = build_coder(config, g)
    with torch.no_grad():
        for name, tensor in coder.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=g))
            if name.endswith(("scale", "threshold")):
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.3)
            if name.endswith("log_theta"):
                tensor.copy_(torch.rand(tensor.shape, generator=g).add(0.1).log())
    return coder.eval()


def sae(rule: Rule, layer: int = 1) -> Coder:
    return random_coder(SAEConfig(layer=layer, site="resid", d_in=D, d_dict=F, rule=rule))


def transcoder(rule: Rule, skip: bool = False, layer: int = 1, d_out: int = D) -> Coder:
    return random_coder(EncoderConfig(layer=layer, d_in=D, d_out=d_out, d_dict=F, rule=rule, skip=skip), layer)


def clt(rule: Rule) -> Coder:
    return random_coder(CLTConfig(layers=tuple(range(N)), d_in=D, d_out=D, d_dict=F, rule=rule))


def inputs(coder: Coder) -> Tensor:
    x = 2 * torch.randn(N, B, D, generator=torch.Generator().manual_seed(9)) + 0.5
    return x if isinstance(coder.config, CLTConfig) else x[0]


def ours(coder: Coder) -> tuple[Tensor, Tensor]:
    """(activations, ŷ), with a leading layer axis for a CLT."""
    with torch.no_grad():
        out = coder(inputs(coder))
    if isinstance(coder.config, CLTConfig):
        return torch.stack([to_dense(codes) for codes in out.codes]), out.y_hat
    return to_dense(out.codes), out.y_hat


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def save(folder: Path, coder: Coder, name: str = "coder") -> str:
    save_checkpoint(
        folder / name,
        coder,
        TrainingRecord(
            name=name,
            target="hf:org/model",
            target_fingerprint="f" * 16,
            train_tokens=10,
            train_seconds=1.0,
            seed=0,
            commit="",
            hooks=hook_points(coder.config),
        ),
    )
    return str(folder / name)


def exported(format: str, folder: Path, *coders: Coder) -> Path:
    """What the command line writes."""
    checkpoints = [save(folder / "ours", coder, f"coder_{i}") for i, coder in enumerate(coders)]
    interop.main(["export", format, *checkpoints, str(folder / format)])
    return folder / format


def imported(format: str, source: Path, destination: Path, *options: str) -> Coder:
    interop.main(["import", format, str(source), str(destination), *options])
    return load_checkpoint(str(destination), "cpu").coder


def write_crosslayer_coding(folder: Path, coder: Coder, **changes: Any) -> Path:
    """A CLT of that library, with a bias on every decoder."""
    parts, t = fold(coder), {}
    kind = "relu" if isinstance(coder.config.rule, Relu) else "jumprelu"
    for i, part in enumerate(parts):
        t |= {f"encoder_module.encoders.{i}.weight": part.W_enc, f"encoder_module.encoders.{i}.bias_param": part.b_enc}
        for j, block in enumerate(part.W_dec.split(D, dim=1), start=i):
            t[f"decoder_module.decoders.{i}->{j}.weight"] = block.T
            t[f"decoder_module.decoders.{i}->{j}.bias_param"] = parts[j].b_dec / (j + 1)
    if kind == "jumprelu":
        t["theta_manager.log_threshold"] = torch.stack([part.theta for part in parts]).log()
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in t.items()}, folder / "clt_checkpoint_latest.safetensors")
    cfg = {"num_features": F, "num_layers": N, "d_model": D, "activation_fn": kind, "model_name": "gpt2"}
    (folder / "cfg.json").write_text(json.dumps(cfg | changes))
    return folder


def upstream_folder(folder: Path, kind: str = "topk", **changes: Any) -> Path:
    coder = transcoder(TopK(3) if kind != "jumprelu" else RULES[3])
    interop.write_files(folder, FORMATS["upstream"].write([Dictionary("x", "", coder)]))
    path = folder / "x" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_type": kind} | changes))
    return folder / "x"
