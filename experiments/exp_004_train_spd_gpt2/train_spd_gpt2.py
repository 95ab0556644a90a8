"""How few rank-one parts of c_fc and down_proj does a token need, when the parts are learnt from the weights themselves?

Stochastic parameter decomposition of the MLP matrices of the chosen layers: KL objective, stochastic masks, importance
minimality with p annealed from 2 to 0.4, shared-MLP gates that read their own module's input at the same position (and so
cannot see the future), start from a least-squares factorisation in place of faithfulness warm-up.

    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py                # GPT-2, layer 8: GPU, network, a day
    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py --target tiny  # layer 2 of the embedded model, minutes
    python experiments/exp_004_train_spd_gpt2/train_spd_gpt2.py --target tiny --layers 0 1 2 3 --components 512 \\
        --steps 3000 --ship assets/spd_tiny                                    # the shipped decomposition, 40 minutes
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints import TrainingRecord, save_spd
from config import GateConfig, Recon, SPDConfig, SPDTrainConfig
from evaluation import evaluate
from logs import git_commit
from spd_model import ComponentModel
from spd_training import train_spd
from study import baselines, checkpoint_folder, held_out_tokens, settings_for, spd_replacements, write_report
from target_models import likes_bf16, load_target, mlp_matrices
from token_stream import TokenStream


@dataclass(frozen=True)
class Settings:
    target: str = "gpt2"
    layers: tuple[int, ...] = (8,)
    components: int = 6144  # C of every matrix
    gate_hidden: int = 768  # hidden width of each gate
    steps: int = 100_000
    batch: int = 32  # sequences per step
    lr: float = 1e-3  # peak of AdamW, cosine to a tenth
    minimality: float = 5e-4
    eval_tokens: int = 131_072  # held-out tokens
    device: str = "cuda"
    seed: int = 0
    ship: Path = Path()  # also write a half-precision copy here
    output: Path = Path(__file__).parent / "output"


PRESETS = {
    "gpt2": Settings(),
    "tiny": Settings("tiny", (2,), components=512, gate_hidden=192, steps=400, batch=4, device="cpu"),
}


def main(s: Settings) -> None:
    began = time.perf_counter()
    target = load_target(s.target, s.device)
    patterns = tuple((path, s.components) for layer in s.layers for path in mlp_matrices(target, layer))
    config = SPDConfig(patterns, GateConfig("shared_mlp", (s.gate_hidden,)))
    model = ComponentModel(target.model, config, torch.Generator().manual_seed(s.seed)).to(s.device)
    train = SPDTrainConfig(
        s.steps, s.lr, (Recon(1.0, "stochastic", "all"),), s.minimality, "kl", p=(2.0, 0.4), faithfulness=1.0,
        final=0.1, warmup=0.02, faithful_steps=0, clip=1.0, metrics_every=20, checkpoint_every=100, seed=s.seed,
    )  # fmt: skip
    name = f"{s.target}_spd_L{'-'.join(map(str, s.layers))}_C{s.components}_s{s.seed}"
    folder = checkpoint_folder(s.target) / name
    stream = TokenStream(target.data, target.tokenizer, "train", s.batch, target.context, s.seed)
    seconds = train_spd(model, OnDevice(stream, s.device), train, folder, name, autocast=likes_bf16(target.device))
    tokens = s.steps * s.batch * target.context
    record = TrainingRecord(name, s.target, target.fingerprint, tokens, seconds, s.seed, git_commit())
    save_spd(folder, model, record)
    if s.ship != Path():
        save_spd(s.ship, model.half(), record)
    replacements = spd_replacements(target, model.float(), record, s.layers) + baselines(
        target, s.layers, (16, 64, 256)
    )
    measured = evaluate(target, replacements, held_out_tokens(target, s.eval_tokens))
    write_report(s.output, measured, s, "SPD of MLP matrices", __doc__, began, s.device)


class OnDevice:
    """A token stream whose batches lie on the device."""

    def __init__(self, stream: TokenStream, device: str) -> None:
        self.stream, self.device = stream, device
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict

    def __next__(self) -> torch.Tensor:
        return next(self.stream).to(self.device)


if __name__ == "__main__":
    main(settings_for(PRESETS, __doc__))
