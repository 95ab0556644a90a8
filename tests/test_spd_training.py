"""Theorems about one training step of an SPD of a language model."""

from collections.abc import Callable

import torch
from small import clean, decomposition, make_tiny, some_tokens

from config import Lp, Recon, SPDTrainConfig
from spd_replacement import SPDReplacement
from spd_training import SPDTrainer


def trainer(recon: tuple[Recon, ...], split: bool) -> SPDTrainer:
    model = decomposition(make_tiny(2)).requires_grad_(True)
    model.target_model.requires_grad_(False)
    return SPDTrainer(
        model,
        SPDTrainConfig(
            steps=10, lr=1e-3, recon=recon, minimality=Lp(coefficient=1e-3, p=(1.0, 1.0)), distance="kl", split=split
        ),
        False,
    )


def gradients(own: SPDTrainer, tokens: torch.Tensor) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    own.optimiser.step = lambda: kept.extend(p.grad.clone() for p in own.model.parameters() if p.grad is not None)
    own.step(tokens)
    return kept


def test_terms_that_split_a_batch_add_up_to_one_term_over_it() -> None:
    """Half of D over the even sequences and half of D over the odd ones are D over all."""
    tokens = some_tokens()
    assert len(tokens) % 2 == 0
    whole = gradients(trainer((Recon(coefficient=1.0, source="importance"),), False), tokens)
    halves = gradients(
        trainer((Recon(coefficient=0.5, source="importance"), Recon(coefficient=0.5, source="importance")), True),
        tokens,
    )
    assert len(whole) == len(halves) > 0
    for one, two in zip(whole, halves):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-4)


def test_deployed_masks_are_those_of_the_ruler_at_threshold_zero() -> None:
    """The masks trained under are what `SPDReplacement(threshold=0)` runs with in a frozen pass."""
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    own = SPDTrainer(
        model.requires_grad_(True),
        SPDTrainConfig(
            steps=10, lr=1e-3, recon=(Recon(coefficient=1.0, source="deployed"),), minimality=Lp(coefficient=0.0)
        ),
        False,
    )
    z, output = own.importances(tokens)
    masks = own.masks(
        0,
        Recon(coefficient=1.0, source="deployed"),
        {path: model.lower(logit) for path, logit in z.items()},
        output,
        tokens,
    )
    ruler = SPDReplacement(target, model, threshold=0.0)
    frozen = ruler.frozen(clean(target, tokens, range(2)))
    for path, mask in masks.items():
        assert mask.delta is None
        assert torch.equal(mask.components, ruler.on(path, frozen.z[path]).float()), path
        assert 0 < mask.components.mean() < 1


def test_running_gates_decide_as_the_rulers_free_protocol_does() -> None:
    """Every gate reads what its module is given in the masked pass; on where `SPDReplacement(threshold=0)` says so."""
    target, tokens = make_tiny(2), some_tokens()
    model = decomposition(target)
    own = trainer((Recon(coefficient=1.0, source="running"),), False)
    ruler = SPDReplacement(target, model, threshold=0.0)
    free = ruler.free(clean(target, tokens, range(2)), lambda pass_: None)
    seen: dict[str, torch.Tensor] = {}

    def mask(path: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: seen.setdefault(path, free._mask(int(path[2]), path.rpartition(".")[2], path, x))

    with torch.no_grad(), model.masked({path: mask(path) for path in model.paths}):
        expected = target.model(tokens)[0]
    torch.testing.assert_close(own.run_gated(tokens, False), expected)
    assert all(0 < m.mean() < 1 for m in seen.values()) and len(seen) == 4
