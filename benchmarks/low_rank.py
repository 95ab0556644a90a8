"""What do decoders of low rank cost a cross-layer transcoder, and what do they save?

CLTs of all layers of `tiny` that differ in the rank of their later decoders alone, trained one after another on the same
tokens and measured on the same held-out text. Writes results/low_rank.csv; minutes of one core.

    python benchmarks/low_rank.py
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

from coder_replacements import CLTReplacement
from config import BatchTopK, CLTConfig, TrainConfig
from evaluation import evaluate, held_out
from logs import write_csv
from recipes import clt_configs, new_coder
from target_models import load_target
from training import DataConfig, dead_after, train_encoder

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("rank", "decoder_parameters", "protocol", "ce_degradation", "ce_low", "ce_high", "fvu",
           "seconds", "tokens", "eval_tokens")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    ranks: tuple[int, ...] = (4, 16, 64)  # beside full decoders
    tokens: int = 102_400
    eval_tokens: int = 8_192
    k: int = 16
    d_dict: int = 1536
    batch: int = 2048


def main(s: Settings) -> None:
    target = load_target("tiny", "cpu")
    layers, text, rows = tuple(range(target.n_layers)), held_out(target, s.eval_tokens), []
    (full,) = clt_configs(target, layers=layers, rules=[BatchTopK(s.k)], d_dict=s.d_dict)
    data = DataConfig(layers=layers, batch_tokens=s.batch)
    train = TrainConfig(tokens=s.tokens, dead_after=dead_after(s.tokens))
    for rank in (None, *s.ranks):
        config: CLTConfig = dataclasses.replace(full, rank=rank)
        with tempfile.TemporaryDirectory() as folder:
            trained = train_encoder(new_coder(config, 0), target, data=data, config=train, folder=Path(folder))
        decoders = sum(p.numel() for name, p in trained.coder.named_parameters() if "_dec." in name)
        for point in evaluate(target, [CLTReplacement(trained.coder)], text, ["frozen", "free"]).points:
            ce = (point.ce_degradation, point.ce_low, point.ce_high)
            seconds = round(trained.record.train_seconds, 1)
            rows.append((rank or "full", decoders, point.protocol, *ce, point.fvu, seconds, s.tokens, point.tokens))
    write_csv(RESULTS / "low_rank.csv", COLUMNS, rows)
    print((RESULTS / "low_rank.csv").read_text())


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
