"""What adding a sparsity rule takes: a value, an encoder class with its row, a name for its SAE and its transcoder."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import config
import sae
import sparsity
import transcoder
from activation_store import DataConfig
from coder_replacements import as_replacements
from config import CLTConfig, CoderConfig, EncoderConfig, Gated, Rule, SAEConfig, TrainConfig
from evaluation import evaluate, held_out
from foreign_formats import FORMATS, Dictionary
from recipes import new_coder
from sparse_ops import Codes, from_dense, to_dense
from sparsity import SparseEncoder
from target_models import TargetModel
from training import train_group


@dataclass(frozen=True)
class Shrunk:
    """a = relu(pre − by)."""

    by: float


class ShrunkEncoder(SparseEncoder[Shrunk]):
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Codes:
        a = (self.pre_activations(x) - self.rule.by).relu()
        return from_dense(a, a.detach() > 0)


class ShrunkSAE(sae.BaseAutoencoder):
    rule_type = Shrunk


class ShrunkTranscoder(transcoder.BaseTranscoder):
    rule_type = Shrunk


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> Shrunk:
    monkeypatch.setattr(config, "Shrunk", Shrunk, raising=False)
    monkeypatch.setitem(sparsity.ENCODERS, Shrunk, ShrunkEncoder)
    monkeypatch.setitem(sae.SAES, Shrunk, ShrunkSAE)
    monkeypatch.setitem(transcoder.TRANSCODERS, Shrunk, ShrunkTranscoder)
    return Shrunk(by=0.4)


def configs(rule: Rule) -> list[CoderConfig]:
    shape = {"d_in": 16, "d_dict": 48, "rule": rule}
    return [
        *(SAEConfig(layer=i, site="mlp_out", **shape) for i in (0, 1)),
        *(EncoderConfig(layer=i, d_out=16, **shape) for i in (0, 1)),
        *(EncoderConfig(layer=i, d_out=16, skip=True, **shape) for i in (0, 1)),
        CLTConfig(layers=(0, 1), d_out=16, **shape),
    ]


def trained_and_measured(rule: Rule, target: TargetModel, folder: Path) -> None:
    """Every kind of coder: the loss falls, checkpoints are read as they were written, the ruler has its rows."""
    data = DataConfig(layers=(0, 1), batch_tokens=32, buffer_tokens=256, model_batch=4)
    train = TrainConfig(tokens=32 * 60, lr=3e-3, metrics_every=1, calibration_tokens=128, dead_after=100)
    coders = [new_coder(own, 0) for own in configs(rule)]
    checkpoints = train_group(coders, target, data=data, config=train, folder=folder)
    for coder, checkpoint in zip(coders, checkpoints):
        lines = (folder / checkpoint.record.name / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        assert sum(losses[-5:]) < sum(losses[:5]), f"{checkpoint.record.name}: {losses}"
        assert type(checkpoint.coder) is type(coder) and checkpoint.coder.config == coder.config
        for name, value in coder.state_dict().items():
            assert torch.equal(value, checkpoint.coder.state_dict()[name]), name
    replacements = [r for top_k in (None, 2) for r in as_replacements(checkpoints, top_k)]
    measured = evaluate(target, replacements, held_out(target, 128))
    names = {f"{kind}-{type(rule).__name__.lower()}" for kind in ("sae", "transcoder", "transcoder-skip", "clt")}
    assert {point.method for point in measured.points} == names | {f"{name}-topk" for name in names}
    for point in measured.points:
        assert point.l0 > 0 and point.fvu < 1.5, f"{point}"
        assert not point.method.endswith("-topk") or point.l0 <= 2, f"{point}"


def test_a_rule_defined_here_is_trained_and_measured(shrunk: Shrunk, small_target: TargetModel, tmp_path: Path) -> None:
    trained_and_measured(shrunk, small_target, tmp_path)  # type: ignore[arg-type]


def test_gated_coders_of_every_kind_are_trained_and_measured(small_target: TargetModel, tmp_path: Path) -> None:
    trained_and_measured(Gated(l1=0.003), small_target, tmp_path)


WRITABLE = [name for name, form in FORMATS.items() if form.write is not None]


@pytest.mark.parametrize("name", WRITABLE)
def test_a_rule_that_formats_were_not_told_of_is_a_bug_and_no_relu(name: str, shrunk: Shrunk) -> None:
    for own in configs(shrunk):  # type: ignore[arg-type]
        with pytest.raises(AssertionError, match=r"Shrunk\(by=0.4\)"):
            FORMATS[name].write([Dictionary("x", "tiny", new_coder(own, 0))])  # type: ignore[misc]


@pytest.mark.parametrize("name", [name for name in WRITABLE if name != "saelens"])
def test_a_rule_that_a_format_cannot_say_is_refused(name: str) -> None:
    for own in configs(Gated(l1=0.003)):
        with pytest.raises(
            ValueError, match=rf"{name} has no Gated (SAE|(skip )?transcoder|cross-layer transcoder): it takes"
        ):
            FORMATS[name].write([Dictionary("x", "tiny", new_coder(own, 0))])  # type: ignore[misc]


def test_a_rule_defined_here_computes_what_it_says(shrunk: Shrunk) -> None:
    coder = new_coder(configs(shrunk)[2], 0)  # type: ignore[arg-type]
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    expected = (x @ coder.encoder.W_enc.T + coder.encoder.b_enc - 0.4).relu()
    torch.testing.assert_close(to_dense(coder.encode(x)), expected)
