"""The methods and nulls that this experiment compares, and the settings that its parts share.

method               codes
transcoder, clt      deployed sparse codes of one layer's latents (the CLT's latents of that layer)
neurons              the k neurons of a token with the largest |h| · ‖W_out‖
transcoder-shuffled  null: the transcoder's activations, dealt to other tokens (one permutation of all tokens)
transcoder-random    null: a transcoder trained alike on the target with every weight matrix drawn afresh
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from baselines import NeuronsReplacement
from coder_replacements import as_replacement
from config import BatchTopK
from recipes import clt_configs, transcoder_configs
from replacement import Coded
from study import CoderStudySettings, train_for
from target_models import TargetModel, weights_fingerprint

METHODS = ("transcoder", "clt", "neurons", "transcoder-shuffled", "transcoder-random")


@dataclass(frozen=True, kw_only=True)
class InterpSettings(CoderStudySettings):
    """What every part of this experiment lets one choose; examples are taken from the held-out tokens."""

    target: str = "pile"
    layer: int = 3
    layers: tuple[int, ...] = (0, 1, 2, 3)  # layers the coders are trained on
    k: int = 16  # active latents (neurons) per token and layer
    eval_tokens: int = 1_000_000
    latents: int = 100  # latents examined per method, and per way of drawing them
    methods: tuple[str, ...] = METHODS  # methods and nulls examined (faithfulness has its own)


TINY: dict[str, Any] = {  # a part's settings for the embedded model
    "target": "tiny", "d_dict": 1536, "tokens": 1_000_000, "batch": 2048, "eval_tokens": 131_072, "latents": 50,
    "device": "cpu",
}  # fmt: skip


def randomised(target: TargetModel, seed: int) -> TargetModel:
    """The same architecture; every matrix (embeddings too) drawn afresh with its own mean and deviation. 2501.17727."""
    model, generator = copy.deepcopy(target.model), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim >= 2:
            fresh = torch.randn(p.shape, generator=generator).to(p)
            p.data.copy_(p.mean() + p.std() * fresh)
    name, fingerprint = f"{target.name}-random", weights_fingerprint(model)
    return dataclasses.replace(target, name=name, model=model, fingerprint=fingerprint)


def replacements(s: InterpSettings, target: TargetModel, names: Sequence[str]) -> dict[str, tuple[TargetModel, Coded]]:
    """Method → (the target it belongs to, its replacement); missing coders are trained with the usual recipe."""
    rule, found = [BatchTopK(s.k)], {}
    for name in names:
        own = randomised(target, s.seed) if name == "transcoder-random" else target
        layers = (s.layer,) if name == "transcoder-random" else s.layers
        if name == "neurons":
            found[name] = (own, NeuronsReplacement(own, layers, s.k))
            continue
        build = clt_configs if name == "clt" else transcoder_configs
        configs = build(own, layers=layers, rules=rule, d_dict=s.d_dict)
        found[name] = (own, as_replacement(train_for(s, own, configs)))
    return found
