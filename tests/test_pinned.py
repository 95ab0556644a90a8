"""Theorems about pinned coders: what is frozen stays to the bit, what is nearly frozen stays near, and the rest learns."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from small import make_small_target, write_corpus
from torch.nn.functional import cosine_similarity, normalize

from activation_store import DataConfig
from checkpoints import load_checkpoint
from coder import Coder
from coder_replacements import as_replacements
from config import BatchTopK, CLTConfig, CoderConfig, EncoderConfig, Pinned, SAEConfig, TrainConfig, from_json, to_json
from pinned import on_ray, random_directions, reach_bound, within_cone
from recipes import new_coder
from target_models import TargetModel
from training import train_group

SIZES = {"d_in": 16, "d_dict": 40, "rule": BatchTopK(4)}
CONFIGS: dict[str, CoderConfig] = {
    "sae": SAEConfig(layer=0, site="mlp_out", **SIZES),
    "transcoder": EncoderConfig(layer=1, d_out=16, skip=True, **SIZES),
    "clt": CLTConfig(layers=(0, 1), d_out=16, **SIZES),
}
PINS = {str(pinned): pinned for pinned in (Pinned("encoder"), Pinned("decoder"), Pinned("decoder", 0.8))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TargetModel, dict[tuple[str, str], Coder]]:
    """Coders of every kind and pin after some steps of the project's own training, and where they lie."""
    folder = tmp_path_factory.mktemp("pinned")
    target = make_small_target(write_corpus(folder))
    coders = {(kind, pin): new_coder(pinned(CONFIGS[kind], pin), 0) for kind in CONFIGS for pin in ("", *PINS)}
    data = DataConfig(layers=(0, 1), batch_tokens=256, buffer_tokens=1024)
    config = TrainConfig(tokens=6 * 256, lr=0.1, dead_after=300, metrics_every=1, calibration_tokens=512)
    train_group(list(coders.values()), target, data=data, config=config, folder=folder)
    return folder, target, coders


def pinned(config: CoderConfig, pin: str) -> CoderConfig:
    return dataclasses.replace(config, pinned=PINS.get(pin))


def rows(coder: Coder) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(w, d⁰) of each decoder, w by latent and target."""
    d = coder.config.d_out
    return [
        (W.detach().unflatten(1, (-1, d)), cone.directions[:, None]) for W, cone in zip(coder.decoders, coder.cones)
    ]


# -------------------------------------------------------------------------------------------------- what training leaves


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_frozen_encoder_stays_to_the_bit_and_all_else_learns(trained, kind: str) -> None:
    coder, start = trained[2][kind, "frozen-encoder"], new_coder(pinned(CONFIGS[kind], "frozen-encoder"), 0)
    before = dict(start.named_parameters())
    for name, value in coder.named_parameters():
        assert torch.equal(value, before[name]) == name.endswith("W_enc"), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_frozen_decoder_writes_along_directions_that_stay_to_the_bit(trained, kind: str) -> None:
    coder, start = trained[2][kind, "frozen-decoder"], new_coder(pinned(CONFIGS[kind], "frozen-decoder"), 0)
    before = dict(start.named_parameters())
    for cone, cone_before in zip(coder.cones, start.cones, strict=True):
        assert torch.equal(cone.directions, cone_before.directions)
    for w, d0 in rows(coder):
        scale = (w * d0).sum(-1, keepdim=True)
        torch.testing.assert_close(w, scale * d0, rtol=0, atol=1e-6)
        assert scale.min() >= 0 and (scale > 0).any()
    moved = {name for name, value in coder.named_parameters() if not torch.equal(value, before[name])}
    fixed = before.keys() - moved
    assert fixed == ({"W_dec"} if kind == "sae" else set())
    if kind == "clt":  # a latent may write more to one target than to another
        w = rows(coder)[0][0].norm(dim=2)
        assert ((w[:, 0] - w[:, 1]).abs() > 1e-3).any()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_soft_decoder_stays_within_its_angle_and_uses_it(trained, kind: str) -> None:
    coder = trained[2][kind, "soft0.8-decoder"]
    cosines = torch.cat([cosine_similarity(w, d0, dim=2)[w.norm(dim=2) > 0] for w, d0 in rows(coder)])
    assert cosines.min() >= 0.8 - 1e-5 and cosines.min() < 0.8 + 1e-3  # some would go farther
    if kind == "sae":
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(40))


def test_every_step_ends_within_the_angle(trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not the last one alone: a hook behind each step looks."""
    seen: list[float] = []
    coder = new_coder(pinned(CONFIGS["clt"], "soft0.8-decoder"), 1)
    after = type(coder).constrain_weights

    def watched(self: Coder) -> None:
        after(self)
        if self is coder:
            seen.append(min(cosine_similarity(w, d0, dim=2)[w.norm(dim=2) > 0].min().item() for w, d0 in rows(self)))

    monkeypatch.setattr(type(coder), "constrain_weights", watched)
    data = DataConfig(layers=(0, 1), batch_tokens=256, buffer_tokens=1024)
    config = TrainConfig(tokens=4 * 256, lr=1e-2, calibration_tokens=512)
    train_group([coder], trained[1], data=data, config=config, folder=tmp_path)
    assert len(seen) == 4 and min(seen) >= 0.8 - 1e-5


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_begin_with_one_encoder_and_no_direction_comes_from_it(kind: str) -> None:
    starts = [new_coder(pinned(CONFIGS[kind], pin), 3) for pin in ("", *PINS)]
    for coder in starts[1:]:
        for own, plain in zip(coder.encoders, starts[0].encoders):
            assert torch.equal(own.W_enc, plain.W_enc)
    drawn = [cone.directions for coder in starts for cone in coder.cones]
    drawn += [coder.W_dec.detach() for coder in starts[1:] if kind == "sae"]
    for directions in drawn:
        assert (directions @ starts[0].encoders[0].W_enc.detach().T).abs().max() < 0.95


def test_a_coder_that_is_not_pinned_holds_and_saves_what_it_did(trained) -> None:
    """Checkpoints from before the field are read as unpinned ones."""
    for kind, config in CONFIGS.items():
        coder = trained[2][kind, ""]
        assert not coder.cones and not [name for name in coder.state_dict() if "cone" in name]
        assert all(p.requires_grad for p in coder.parameters()) and config.pinned is None
        older = {name: value for name, value in to_json(config).items() if name != "pinned"}
        assert from_json(older) == config and "pinned" not in repr(config)


def test_a_pinned_coder_is_read_back_named_and_measured_as_such(trained) -> None:
    folder, _, coders = trained
    read = [load_checkpoint(str(file.parent), "cpu") for file in sorted(folder.glob("*/config.json"))]
    assert {str(c.coder.config.pinned or "") for c in read} == {"", *PINS}
    for checkpoint in read:
        pin = str(checkpoint.coder.config.pinned or "")
        own = coders[checkpoint.coder.config.kind, pin]
        assert all(torch.equal(value, own.state_dict()[name]) for name, value in checkpoint.coder.state_dict().items())
        assert pin in checkpoint.record.name
    methods = {r.method for r in as_replacements(read)}
    assert {"sae-frozen-encoder", "transcoder-skip-soft0.8-decoder", "clt-frozen-decoder", "clt"} <= methods
    assert len(methods) == len(read)


# ------------------------------------------------------------------------------------------------------- the projections


def some(n: int, targets: int, d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, targets, d, generator=g, dtype=torch.float64) * torch.rand(n, 1, 1, generator=g).double() * 9
    return w, normalize(random_directions(n, d, g).double(), dim=1), g


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cosine", [0.3, 0.8, 0.99])
def test_the_cones_nearest_vector_in_angle(cosine: float, seed: int) -> None:
    """Norms stay, who is inside stays to the bit, and no vector of the cone that a search draws is nearer."""
    w, d0, g = some(60, 2, 5, seed)
    w[:20] = 8 * d0[:20, None] + 0.1 * w[:20]
    near = within_cone(w, d0, cosine)
    torch.testing.assert_close(near.norm(dim=2), w.norm(dim=2))
    inside = cosine_similarity(w, d0[:, None], dim=2) >= cosine
    assert torch.equal(near[inside], w[inside]) and inside.any() and (~inside).any()
    reached = cosine_similarity(near, d0[:, None], dim=2)
    torch.testing.assert_close(reached[~inside], torch.full_like(reached[~inside], cosine))
    best = cosine_similarity(near, w, dim=2)
    for _ in range(300):
        u = torch.randn(w.shape, generator=g, dtype=torch.float64)
        u = normalize(u - (u * d0[:, None]).sum(-1, keepdim=True) * d0[:, None], dim=2)
        c = cosine + (1 - cosine) * torch.rand(w.shape[:2], generator=g, dtype=torch.float64)[..., None] ** 4
        other = c * d0[:, None] + (1 - c**2).sqrt() * u
        assert (cosine_similarity(other, w, dim=2) <= best + 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_the_rays_nearest_vector(seed: int) -> None:
    w, d0, g = some(50, 3, 4, seed)
    near = on_ray(w, d0)
    scale = (near * d0[:, None]).sum(-1, keepdim=True)
    torch.testing.assert_close(near, scale * d0[:, None])
    assert scale.min() == 0 and scale.max() > 0
    for _ in range(200):
        other = torch.rand(scale.shape, generator=g, dtype=torch.float64) * 20 * d0[:, None]
        assert ((other - w).norm(dim=2) >= (near - w).norm(dim=2) - 1e-9).all()


def test_few_random_directions_come_near_a_given_one() -> None:
    """The bound holds where it can be counted, and says what the paper says of it."""
    g = torch.Generator().manual_seed(0)
    trials, n, d, cosine = 2000, 20, 10, 0.75
    hits = sum((random_directions(n, d, g)[:, 0] >= cosine).any().item() for _ in range(trials))
    assert 0 < hits / trials <= reach_bound(n, d, cosine)
    assert math.log10(reach_bound(1, 768, 0.8)) == pytest.approx(-107, abs=0.5)


def test_what_cannot_be_pinned_is_refused() -> None:
    for wrong in ({"part": "bias"}, {"part": "decoder", "cosine": 1.5}, {"part": "encoder", "cosine": 0.8}):
        with pytest.raises(ValueError):
            Pinned(**wrong)
