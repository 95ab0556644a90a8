"""What does it cost to replace each site of a layer by its SAE: the MLP's output, attention's output, the residual stream?

BatchTopK SAEs of equal size and sparsity at every site of every layer, trained on the same tokens; each stands in for the
value of its site, one layer at a time and all layers at once. Zero and mean ablation of the same site stand beside them.

    python experiments/exp_014_sae_sites/sae_sites.py                # the embedded model, offline
    python experiments/exp_014_sae_sites/sae_sites.py --target gpt2  # GPU, network
    … --replot draws the figure again from points.csv

Expected: the stream is rebuilt best in FVU and yet costs most, since all that later layers read passes through it.
"""

from dataclasses import dataclass
from pathlib import Path

from baselines import baselines
from coder_replacements import as_replacements
from config import BatchTopK, Site
from evaluation import Measurement, evaluate, held_out
from recipes import sae_configs
from study import CoderStudySettings, Report, check_fits, run_study, train_for
from target_models import at_site, load_target


@dataclass(frozen=True, kw_only=True)
class Settings(CoderStudySettings):
    target: str = "tiny"
    sites: tuple[Site, ...] = ("mlp_out", "attn_out", "resid")
    layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: tuple[int, ...] = (8, 32)  # active latents per token
    d_dict: int = 1536  # latents per layer and site
    tokens: int = 500_000
    batch: int = 2048
    eval_tokens: int = 32_768
    device: str = "cpu"
    output: Path = Path(__file__).parent / "output"


PRESETS = (Settings(), Settings(target="gpt2", d_dict=16_384, tokens=100_000_000, device="cuda"))
TEXT = """`sae`: of MLP outputs; `sae-attn_out`: of what attention wrote; `sae-resid`: of the residual stream after each block.
Each replaces the value of its own site; zero and mean ablation, and CE recovered against them, are those of the site too. An
affine map is fitted to MLPs alone: at the other sites what is read is what is written."""
REPORT = Report("SAEs at every site of a layer", f"{__doc__}\n{TEXT}")


def main(s: Settings) -> None:
    target = load_target(s.target, s.home)
    check_fits(s, target)
    measured = Measurement([], [], [], [])
    for site in s.sites:
        view = at_site(target, site)
        configs = sae_configs(view, layers=s.layers, rules=[BatchTopK(k) for k in s.top_k], d_dict=s.d_dict)
        trained = train_for(s, view, configs)
        replacements = as_replacements(trained) + baselines(view, s.layers, neurons=())
        own = evaluate(view, replacements, held_out(view, s.eval_tokens))
        measured = Measurement(*(before + more for before, more in zip(measured, own)))
    REPORT.write(s, measured)


if __name__ == "__main__":
    run_study(main, PRESETS, __doc__, redraw=REPORT.redraw)
