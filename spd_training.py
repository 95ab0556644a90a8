"""Training a stochastic parameter decomposition, of toys and of language models alike.

    loss = Σ_terms coefficient · D(target, target under masks × routing) + λ · minimality(g_up; p) + γ · faithfulness
    D = squared error or KL;   AdamW (no weight decay) on V, U and the gates;   p moves linearly, the rate by cosine

One clean pass gives the inputs of all modules; gates read them, not detached; each term is one masked pass.
Published recipe and numbers: arXiv 2506.20790 and goodfire-ai/spd.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from config import Recon, SPDTrainConfig, to_json
from logs import Logger
from losses import annealed_p, faithfulness, importance_minimality, mean_kl, squared_error
from spd_masks import Mask, PersistentSources, pgd_sources, route_subset, routed, source_masks, stochastic_masks
from spd_model import ComponentModel
from training import Progress, run_training


class Batches(Protocol):
    """An endless source of target inputs that can be resumed exactly."""

    def __next__(self) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def scheduled_rate(config: SPDTrainConfig, step: int) -> float:
    rise = min(1.0, (step + 1) / max(1.0, config.warmup * config.steps))
    if config.schedule == "constant":
        return config.lr * rise
    fall = config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * rise * fall


class SPDTrainer:
    """All that a run owns: model, optimiser, adversaries, generator. `step` is one step; state round-trips exactly."""

    def __init__(self, model: ComponentModel, config: SPDTrainConfig, autocast: bool) -> None:
        self.model, self.config, self.autocast = model, config, autocast
        self.generator = torch.Generator(next(model.parameters()).device).manual_seed(config.seed)
        weights = [p for part in model.components.values() for p in part.parameters()]
        self.weights = weights
        self.optimiser = torch.optim.AdamW(
            [{"params": weights}, {"params": list(model.importances.parameters())}],
            lr=config.lr,
            weight_decay=0.0,
            fused=True,
        )
        shared = () if model.stack is None else (model.stack, 1)  # by all positions, not by seeds
        self.adversaries = {
            i: PersistentSources(model.sizes, shared, term.step_size, (0.5, 0.99), self.generator).to(weights[0].device)
            for i, term in enumerate(config.recon) if term.source == "persistent"
        }  # fmt: skip
        self.steps_done = 0

    def warm_up(self) -> None:
        """Faithfulness alone, by AdamW of its own; with 0 steps, the least-squares factorisation in its place."""
        if self.config.faithful_steps == 0:
            return self.model.start_faithful()
        optimiser = torch.optim.AdamW(
            self.weights, lr=self.config.faithful_lr, weight_decay=self.config.faithful_decay, fused=True
        )
        for _ in range(self.config.faithful_steps):
            faithfulness(self.model.deltas()).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def distance(self, target: Tensor, prediction: Tensor) -> Float[Tensor, ""]:
        if self.config.distance == "kl":
            return mean_kl(target, prediction)
        return squared_error(target, prediction) * (self.model.stack or 1)

    def distances(self, target: Tensor, prediction: Tensor) -> Float[Tensor, "*stack"]:
        """`distance` of each seed of a stack by itself."""
        if self.model.stack is None:
            return self.distance(target, prediction)
        return torch.stack([squared_error(*own) for own in zip(target, prediction, strict=True)])

    def run(self, masks: dict[str, Mask], batch: Tensor) -> Tensor:
        device = batch.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.autocast):
            return self.model.run_masked(masks, batch)

    def importances(self, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(z of every module, clean output); the clean pass itself carries no gradient."""
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad():
                inputs, clean = self.model.inputs_capture(batch)
            z = self.model.importance_logits(inputs)
        return {path: logit.float() for path, logit in z.items()}, clean

    def step(self, batch: Tensor) -> Tensor:
        """One optimiser step; returns (loss, recon, minimality, L0 per module), still on the device."""
        c, model = self.config, self.model
        z, clean = self.importances(batch)
        g_lo = {path: model.lower(logit) for path, logit in z.items()}
        stack = "" if model.stack is None else "stack "
        by_position = f"{stack}... component -> {stack}(...) component"
        g_up = {path: rearrange(model.upper(logit), by_position) for path, logit in z.items()}
        p = annealed_p(c.p, c.p_between, self.steps_done / c.steps)
        minimality = importance_minimality(g_up, p, c.frequency)
        n = len(c.recon) if c.split else 1
        shares = [
            ({path: g[i % n :: n] for path, g in g_lo.items()}, clean[i % n :: n], batch[i % n :: n])
            for i in range(len(c.recon))
        ]
        recon = torch.stack([t.coefficient * self.recon(i, t, *shares[i]) for i, t in enumerate(c.recon)]).sum()
        loss = recon + c.minimality * minimality
        if c.faithfulness:
            loss = loss + c.faithfulness * faithfulness(model.deltas())
        loss.backward()
        if c.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, c.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = scheduled_rate(c, self.steps_done)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.steps_done += 1
        with torch.no_grad():
            l0 = torch.stack([(g > 0).sum() / (g.numel() / g.shape[-1]) for g in g_lo.values()])
        return torch.cat([torch.stack([loss, recon, minimality]).detach(), l0])

    def recon(self, index: int, term: Recon, g_lo: dict[str, Tensor], clean: Tensor, batch: Tensor) -> Tensor:
        """D of one term. `layerwise` masks one module at a time and averages over modules."""
        if term.routing == "layerwise":
            masks = self.masks(index, term, g_lo, clean, batch)
            losses = [self.distance(clean, self.run({path: mask}, batch)) for path, mask in masks.items()]
            return torch.stack(losses).mean()
        masks = self.masks(index, term, g_lo, clean, batch)
        return self.distance(clean, self.run(masks, batch))

    def masks(self, index: int, term: Recon, g_lo: dict[str, Tensor], clean: Tensor, batch: Tensor) -> dict[str, Mask]:
        routing = None
        if term.routing == "subset":
            routing = route_subset(list(g_lo), tuple(next(iter(g_lo.values())).shape[:-1]), self.generator)
        route: Callable[[dict[str, Mask]], dict[str, Mask]] = lambda m: m if routing is None else routed(m, routing)  # noqa: E731
        if term.source == "stochastic":
            return route(stochastic_masks(g_lo, self.generator))
        if term.source == "importance":
            return route({path: Mask(g, None) for path, g in g_lo.items()})
        if term.source == "deployed":
            return route({path: Mask(torch.where(g > 0, 1.0, g), None) for path, g in g_lo.items()})
        if term.source == "ones":
            return route({path: Mask(torch.ones_like(g), None) for path, g in g_lo.items()})
        frozen = {path: g.detach() for path, g in g_lo.items()}

        def objective(sources: dict[str, Tensor]) -> Float[Tensor, "*stack"]:
            return self.distances(clean, self.run(route(source_masks(frozen, sources)), batch))

        if term.source == "pgd":
            lead = (self.model.stack,) if self.model.stack else ()
            start = {
                path: torch.rand(
                    *lead, *[1] * (g.ndim - 1 - len(lead)), g.shape[-1] + 1, generator=self.generator, device=g.device
                )
                for path, g in g_lo.items()
            }
            return route(source_masks(g_lo, pgd_sources(objective, start, term.steps, term.step_size)))
        adversary = self.adversaries[index]
        for _ in range(term.steps):
            adversary.ascend(objective(adversary.sources()).sum())
        return route(source_masks(g_lo, {path: r.detach() for path, r in adversary.sources().items()}))

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "adversaries": {str(i): [a.state_dict(), a.optimiser.state_dict()] for i, a in self.adversaries.items()},
            "generator": self.generator.get_state().cpu(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        for i, adversary in self.adversaries.items():
            adversary.load_state_dict(state["adversaries"][str(i)][0])
            adversary.optimiser.load_state_dict(state["adversaries"][str(i)][1])
        self.generator.set_state(state["generator"])
        self.steps_done = state["steps_done"]


class _SPDRun:
    """A decomposition in training on a stream of target inputs."""

    def __init__(self, trainer: SPDTrainer, batches: Batches, logger: Logger) -> None:
        self.trainer, self.batches, self.logger = trainer, batches, logger
        self.names, self.settings = [logger.name], [to_json(trainer.model.config), to_json(trainer.config)]
        self.start = trainer.warm_up

    def step(self, step: int) -> Float[Tensor, "1 reading"]:
        return self.trainer.step(next(self.batches))[None]

    def read(self, readings: list[list[float]], progress: Progress) -> str:
        loss, recon, minimality, *l0 = readings[0]
        named = {f"l0/{path}": value for path, value in zip(self.trainer.model.paths, l0)}
        metrics = {"loss": loss, "recon": recon, "minimality": minimality, "seconds": progress.seconds}
        self.logger.log(progress.step, metrics | named)
        return f"loss {loss:.3g}, recon {recon:.3g}, L0 {sum(l0) / len(l0):.2f}"

    def state_dict(self) -> dict[str, Any]:
        return {"trainer": self.trainer.state_dict(), "batches": self.batches.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self.batches.load_state_dict(state["batches"])


def train_spd(
    model: ComponentModel, batches: Batches, config: SPDTrainConfig, folder: Path, name: str, autocast: bool = False
) -> float:
    """Train a decomposition in place; returns the seconds it took, interruptions left out.

    An interrupted call goes on from `folder`/state.pt when made again. Raises ValueError where that file is of other
    settings, RuntimeError when the loss is not finite.
    """
    logger = Logger(name, folder, {"spd": to_json(model.config), "train": to_json(config)})
    run, state_file = _SPDRun(SPDTrainer(model, config, autocast), batches, logger), folder / "state.pt"
    every = {"metrics_every": config.metrics_every, "checkpoint_every": config.checkpoint_every}
    seconds = run_training(run, config.steps, file=state_file, **every)
    logger.close()
    state_file.unlink(missing_ok=True)
    return seconds
