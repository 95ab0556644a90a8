"""SAEs of the residual stream and of attention's output: the same store and the same ruler as of MLP outputs."""

from pathlib import Path

import pytest
import torch
from small import each_by_itself, make_small_target, write_corpus

import evaluation
import measure
from activation_store import ActivationsStore, DataConfig
from baselines import IdentityReplacement, ZeroReplacement, baselines
from checkpoints import load_checkpoint
from coder_replacements import SAEReplacement, TranscoderReplacement
from config import BatchTopK, EncoderConfig, Relu, SAEConfig, Site, TrainConfig
from pareto import read_points
from recipes import new_coder, sae_configs
from replacement import replaced_logits
from sae import BaseAutoencoder, build_sae
from target_models import TargetModel, at_site
from training import train_group

SITES: tuple[Site, ...] = ("mlp_out", "attn_out", "resid")
DATA = DataConfig(layers=(0, 1), batch_tokens=64, buffer_tokens=256, model_batch=4)
TOKENS = torch.arange(2, 34).view(2, 16)


@pytest.fixture
def small_target(tmp_path: Path) -> TargetModel:
    """With enough text for the baselines' training tokens."""
    (tmp_path / "corpus").mkdir()
    return make_small_target(write_corpus(tmp_path / "corpus", documents=1200))


def exact_sae(layer: int, site: Site) -> BaseAutoencoder:
    """x = relu(x) − relu(−x): two latents per dimension rebuild everything."""
    sae = build_sae(
        SAEConfig(layer=layer, site=site, d_in=16, d_dict=32, rule=Relu(0.0)), torch.Generator().manual_seed(0)
    )
    both = torch.cat([torch.eye(16), -torch.eye(16)])
    with torch.no_grad():
        sae.encoder.W_enc.copy_(both)
        sae.encoder.b_enc.zero_()
        sae.W_dec.copy_(both)
    return sae.eval()


@pytest.mark.parametrize("site", SITES)
def test_an_exact_sae_changes_nothing_at_its_site(small_target: TargetModel, site: Site) -> None:
    view = at_site(small_target, site)
    measured = evaluation.evaluate(
        view,
        [SAEReplacement([exact_sae(i, site) for i in (0, 1)]), IdentityReplacement((0, 1))],
        each_by_itself(TOKENS),
    )
    for point in measured.points:
        assert abs(point.ce_degradation) < 1e-5 and point.kl < 1e-5 and point.fvu < 1e-10, f"{point}"
    of_site = "" if site == "mlp_out" else f"-{site}"
    assert {p.method for p in measured.points} == {f"identity{of_site}", f"sae{of_site}-relu"}


@pytest.mark.parametrize("site", SITES)
def test_the_store_of_a_site_serves_its_values_on_both_sides(small_target: TargetModel, site: Site) -> None:
    batch = next(ActivationsStore(at_site(small_target, site), DATA))
    assert torch.equal(batch.inputs, batch.targets) == (site != "mlp_out")


def test_zero_at_a_site_removes_what_the_site_carries(small_target: TargetModel) -> None:
    """Without the last block's output nothing is left of the prompt: the logits are those of an empty stream."""
    view = at_site(small_target, "resid")
    logits = replaced_logits(view, TOKENS, ZeroReplacement((1,)).begin(), (1,), lambda layer, y_hat: None)
    assert torch.equal(logits[:, 1:], torch.zeros_like(logits[:, 1:]))


def test_saes_of_a_site_are_trained_and_measured_by_the_command_line(
    small_target: TargetModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load_target", lambda name, device: small_target)
    for site in SITES:
        view = at_site(small_target, site)
        coders = [new_coder(c, 0) for c in sae_configs(view, layers=(0, 1), rules=[BatchTopK(4)], d_dict=32)]
        train_group(
            coders,
            view,
            data=DATA,
            config=TrainConfig(tokens=640, lr=1e-2, calibration_tokens=64),
            folder=tmp_path / "checkpoints",
        )
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir())
    assert len(names) == 6, f"{names=}"  # no two sites share a name
    paths = [str(tmp_path / "checkpoints" / name) for name in names]
    resid = tuple(path for path in paths if "resid" in path)
    assert [load_checkpoint(path, "cpu").coder.config.site for path in resid] == ["resid", "resid"]
    measure.main(resid, tokens=320, protocols=("single", "free"), points=tmp_path / "points.csv")
    rows = read_points(tmp_path / "points.csv")
    assert {p.method for p in rows} == {"sae-resid", "identity-resid", "zero-resid", "mean-resid"}
    assert [p.layers for p in rows if p.method == "sae-resid"] == [(0,), (1,), (0, 1)]
    with pytest.raises(ValueError, match="several sites.*take each by itself"):
        measure.main(tuple(paths), tokens=320, points=tmp_path / "points.csv")


def test_a_site_is_never_mistaken_for_another(small_target: TargetModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sae-resid-relu writes resid, the target is read at mlp_out.*at_site"):
        evaluation.evaluate(small_target, [SAEReplacement([exact_sae(0, "resid")])], each_by_itself(TOKENS))
    transcoder = new_coder(EncoderConfig(layer=0, d_in=16, d_out=16, d_dict=32, rule=BatchTopK(4)), 0)
    with pytest.raises(ValueError, match="transcoder writes mlp_out, the target is read at resid"):
        evaluation.evaluate(
            at_site(small_target, "resid"), [TranscoderReplacement([transcoder])], each_by_itself(TOKENS)
        )  # type: ignore[list-item]
    with pytest.raises(ValueError, match="is of attn_out, the target is read at mlp_out"):
        train_group(
            [exact_sae(0, "attn_out")],
            small_target,
            data=DATA,
            config=TrainConfig(tokens=640, lr=1e-2),
            folder=tmp_path,
        )
    with pytest.raises(ValueError, match="SAEs read"):
        SAEReplacement([exact_sae(0, "resid"), exact_sae(1, "attn_out")])
    assert [r.method for r in baselines(at_site(small_target, "resid"), (0, 1), (4,))] == ["identity", "zero", "mean"]
