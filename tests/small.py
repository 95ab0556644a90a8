"""Small random targets, corpora and coders: everything a test needs, offline and in milliseconds."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from baselines import (
    AffineReplacement,
    IdentityReplacement,
    MeanReplacement,
    NeuronsReplacement,
    ZeroReplacement,
    fit_affine,
)
from clt import CrossLayerTranscoder
from coder import Coder
from coder_replacements import CLTReplacement, SAEReplacement, TranscoderReplacement
from config import BatchTopK, CLTConfig, EncoderConfig, GateConfig, JumpReLU, SAEConfig, SPDConfig
from evaluation import Measurement
from llama_simple_mlp import LlamaSimpleMLP, LlamaSimpleMLPConfig, initialise
from pareto import ParetoPoint
from patching import Captured, kept_inputs
from replacement import Pass, Replacement, replaced_logits
from sae import build_sae
from spd_model import ComponentModel
from target_models import Loaded, TargetModel, make_target
from token_stream import DatasetSpec, HeldOutText
from transcoder import BaseTranscoder, build_transcoder

WORDS = [f"w{i}" for i in range(60)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def write_corpus(folder: Path, documents: int = 400, seed: int = 0) -> Path:
    """A folder with train.jsonl and val.jsonl of random words."""
    generator = random.Random(seed)
    for split, n in (("train", documents), ("val", documents // 4)):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(5, 60))) for _ in range(n)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def make_small_target(folder: Path, layers: int = 2, seed: int = 0, d_mlp: int = 32) -> TargetModel:
    config = LlamaSimpleMLPConfig(16, len(WORDS) + 2, layers, 2, 16, d_mlp, 1)
    model = LlamaSimpleMLP(config)
    initialise(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for block in model.h:
            block.mlp.c_fc.weight.mul_(20)
            block.mlp.down_proj.weight.mul_(20)
    spec = DatasetSpec(str(folder), val_split="val")
    return make_target("small", Loaded(model, word_tokenizer(), config.block_size, spec), "cpu")


D, H, F, VOCAB, SEQ = 16, 48, 32, 40, 7


def make_tiny(n_layer: int = 3, seed: int = 0) -> TargetModel:
    g = torch.Generator().manual_seed(seed)
    model = LlamaSimpleMLP(LlamaSimpleMLPConfig(16, VOCAB, n_layer, 2, D, H, 1))
    initialise(model, g)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim == 2 else 1)  # far enough from zero that every MLP matters
    return make_target("random", Loaded(model, None, 16, DatasetSpec("python")), "cpu")  # type: ignore[arg-type]


def some_tokens(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (n, SEQ), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(coder: Coder, seed: int = 2) -> Coder:
    g = torch.Generator().manual_seed(seed)
    for p in coder.parameters():
        p.normal_(std=0.3, generator=g)
    for encoder in coder.encoders:
        if isinstance(encoder.rule, JumpReLU):
            encoder.log_theta.fill_(-1.0)
        if isinstance(encoder.rule, BatchTopK):
            encoder.threshold.fill_(0.2)
    return coder


def transcoders(layers: Sequence[int], rule: object = BatchTopK(4), skip: bool = False) -> list[BaseTranscoder]:
    g = torch.Generator().manual_seed(5)
    return [
        randomise(build_transcoder(EncoderConfig(layer=i, d_in=D, d_out=D, d_dict=F, rule=rule, skip=skip), g), i)
        for i in layers
    ]  # type: ignore


def saes(layers: Sequence[int]) -> list[Coder]:
    g = torch.Generator().manual_seed(6)
    return [
        randomise(build_sae(SAEConfig(layer=i, site="mlp_out", d_in=D, d_dict=F, rule=BatchTopK(3)), g), i)
        for i in layers
    ]


def clt(layers: Sequence[int], rule: object = BatchTopK(4)) -> CrossLayerTranscoder:
    g = torch.Generator().manual_seed(7)
    return randomise(CrossLayerTranscoder(CLTConfig(layers=tuple(layers), d_in=D, d_out=D, d_dict=F, rule=rule), g))  # type: ignore


def each_by_itself(tokens: Tensor) -> HeldOutText:
    """Sequences that have nothing to do with each other."""
    return HeldOutText(tokens, torch.arange(len(tokens)))


def run(target: TargetModel, tokens: Tensor, pass_: Pass, layers: Sequence[int]) -> Tensor:
    with torch.inference_mode():
        return replaced_logits(target, tokens, pass_, layers, lambda layer, y_hat: None)


def clean(target: TargetModel, tokens: Tensor, layers: Sequence[int], watched: Sequence[str] = ()) -> Captured:
    """fp32, unlike `capture`, which may use bf16."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Watch(Pass):
        def __call__(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
            seen.append((x, y))
            return y

    with kept_inputs(target.model, watched) as modules:
        run(target, tokens, Watch(IdentityReplacement(layers)), layers)
    return Captured(*(torch.stack(kept) for kept in zip(*seen)), modules)


def all_methods(target: TargetModel, layers: Sequence[int]) -> list[Replacement]:
    x, y = (kept.flatten(1, 2) for kept in clean(target, some_tokens(32, 9), layers)[:2])
    return [
        SAEReplacement(saes(layers)),
        TranscoderReplacement(transcoders(layers)),
        TranscoderReplacement(transcoders(layers, skip=True)),
        TranscoderReplacement(transcoders(layers), top_k=2),
        CLTReplacement(clt(layers)),
        NeuronsReplacement(target, layers, 5),
        AffineReplacement(layers, fit_affine([(x, y)])),
        IdentityReplacement(layers),
        ZeroReplacement(layers),
        MeanReplacement(layers, y.mean(1)),
    ]


def the(measured: Measurement, method: str, protocol: str, layers: tuple[int, ...]) -> ParetoPoint:
    (point,) = [p for p in measured.points if (p.method, p.protocol, p.layers) == (method, protocol, layers)]
    return point


C_FC, C_DOWN = 20, 24
LOCAL = GateConfig(kind="shared_mlp", hidden=(8,))


def decomposition(target: TargetModel, gate: GateConfig = LOCAL) -> ComponentModel:
    config = SPDConfig(components=(("h.*.mlp.c_fc", C_FC), ("h.*.mlp.down_proj", C_DOWN)), gate=gate)
    return ComponentModel(target.model, config, torch.Generator().manual_seed(0)).requires_grad_(False)
