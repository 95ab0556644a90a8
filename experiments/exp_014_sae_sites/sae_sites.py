"""What does it cost to replace each site of a layer by its SAE: the MLP's output, attention's output, the residual stream?

BatchTopK SAEs of equal size and sparsity at every site of every layer, trained on the same tokens; each stands in for the
value of its site, one layer at a time and all layers at once. Zero and mean ablation of the same site stand beside them.

    python experiments/exp_014_sae_sites/sae_sites.py                # the embedded model, offline
    python experiments/exp_014_sae_sites/sae_sites.py --target gpt2 --device cuda --tokens 100000000 --d-dict 16384

Expected: the stream is rebuilt best in FVU and yet costs most, since all that later layers read passes through it.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from baselines import baselines  # fmt: skip
from checkpoints import checkpoint_folder  # fmt: skip
from coder_replacements import as_replacements  # fmt: skip
from config import BatchTopK, Site
from evaluation import (
    Measurement,
    evaluate,
    held_out_tokens,  # fmt: skip
)
from recipes import sae_configs, train_coders  # fmt: skip
from study import settings_for, write_report  # fmt: skip
from target_models import at_site, load_target


@dataclass(frozen=True)
class Settings:
    target: str = "tiny"
    sites: tuple[Site, ...] = ("mlp_out", "attn_out", "resid")
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 32)  # active latents per token
    d_dict: int = 1536  # latents per layer and site
    tokens: int = 500_000  # training tokens
    batch: int = 2048  # tokens per training batch
    eval_tokens: int = 32_768  # held-out tokens
    device: str = "cpu"
    seed: int = 0
    output: Path = Path(__file__).parent / "output"


TEXT = """`sae`: of MLP outputs; `sae-attn_out`: of what attention wrote; `sae-resid`: of the residual stream after each block.
Each replaces the value of its own site; zero and mean ablation, and CE recovered against them, are those of the site too. An
affine map is fitted to MLPs alone: at the other sites what is read is what is written."""


def main(s: Settings) -> None:
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    measured = Measurement([], [])
    for site in s.sites:
        view = at_site(target, site)
        configs = sae_configs(view, s.layers, [BatchTopK(k) for k in s.top_k], s.d_dict)
        trained = train_coders(configs, view, s.tokens, s.batch, s.seed, checkpoint_folder(s.target))
        replacements = as_replacements(trained) + baselines(view, s.layers, neurons=())
        points, layers = evaluate(view, replacements, held_out_tokens(view, s.eval_tokens))
        measured = Measurement(measured.points + points, measured.layers + layers)
    write_report(s.output, measured, s, "SAEs at every site of a layer", f"{__doc__}\n\n{TEXT}", began, s.device)


if __name__ == "__main__":
    main(settings_for({"tiny": Settings()}, __doc__))
