"""Training a stochastic parameter decomposition, of toys and of language models alike.

    loss = Σ_terms coefficient · D(target, target under masks × routing)
         + coefficients · (Σ cost(g_up) [minimality], Φ(firing rates) [frequency], locality, faithfulness)
    the costs of importances are means over the gates of the clean pass and of those that followed a masked stream, if any
    D = squared error or KL;   AdamW, or Muon for matrices, without weight decay;   the rate falls by cosine

One clean pass gives the inputs of all modules; gates read them, not detached; each term is one masked pass.
Published recipes and numbers: arXiv 2506.20790, goodfire-ai/spd, goodfire-ai/param-decomp (core/SPEC.md).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from checkpoints import forget_state
from config import Merged, Recon, SPDTrainConfig, to_json
from logs import Logger
from losses import (
    annealed,
    faithfulness,
    frequency_cost,
    importance_cost,
    locality,
    mean_kl,
    relative_faithfulness,
    squared_error,
)
from parallel import DataRanks, check_dealt, world
from spd_masks import Mask, PersistentSources, pgd_sources, route_subset, routed, source_masks, stochastic_masks
from spd_model import ComponentModel, first_output, weight_map
from training import Progress, run_training

AIM = 12.0  # the most that the logarithm of minimality's coefficient moves in a run
DRAWS_APART = 1_000_003  # between the seeds of processes that share out data


class Batches(Protocol):
    """An endless source of target inputs that can be resumed exactly."""

    def __next__(self) -> Tensor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def share_of_peak(config: SPDTrainConfig, step: int) -> float:
    """The fraction of their peak that learning rates have at a step."""
    rise = min(1.0, (step + 1) / max(1.0, config.warmup * config.steps))
    if config.schedule == "constant":
        return rise
    fall = config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return rise * fall


def on_or_off(g_lo: Float[Tensor, "*batch"], straight_through: bool) -> Float[Tensor, "*batch"]:
    """The ruler's mask: 1 where the importance is positive, else 0. A closed gate has the gradient of `lower`, which can
    only open it; an open one none, or `straight_through` the mask's, which closes it where the component harms."""
    return torch.where(g_lo > 0, 1 + g_lo - g_lo.detach() if straight_through else 1.0, g_lo)


class SPDTrainer:
    """All that a run owns: model, optimisers, adversaries, firing rates, generator. `step` is one step; state round-trips
    exactly."""

    def __init__(self, model: ComponentModel, config: SPDTrainConfig, autocast: bool) -> None:
        self.model, self.config, self.autocast = model, config, autocast
        seed = config.seed + DRAWS_APART * world().part[0]
        self.generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        weights = [p for part in model.components.values() for p in part.parameters()]
        self.weights = weights
        peaks = [(weights, config.lr), (list(model.importances.parameters()), config.gate_lr or config.lr)]
        by_muon = config.optimiser == "muon"
        assert not by_muon or model.stack is None, "Muon takes matrices one by one: it does not train stacked toys"
        matrices, vectors = (
            [{"params": [p for p in own if (by_muon and p.ndim == 2) == matrix], "peak": peak} for own, peak in peaks]
            for matrix in (True, False)
        )
        self.optimiser = torch.optim.AdamW(vectors, weight_decay=0.0, fused=True)
        self.optimisers: list[torch.optim.Optimizer] = [self.optimiser]
        if by_muon:  # its steps as long as AdamW's at an equal rate
            self.optimisers.append(torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
        self.adversaries = {
            i: self._adversary(term).to(weights[0].device)
            for i, term in enumerate(config.recon) if isinstance(term, Merged) or term.source == "persistent"
        }  # fmt: skip
        self.rates = {  # averages of what components cost, for the frequency term
            path: torch.zeros(part.U.shape[:-1], device=part.U.device)
            for path, part in model.components.items() if config.frequency is not None
        }  # fmt: skip
        alone = [name for name, own in (("a persistent adversary", self.adversaries), ("the frequency term", self.rates),
                                        ("an aim", config.aim)) if own]  # fmt: skip
        if alone and world().deals("data"):
            raise ValueError(
                f"processes that share out data do not agree on {', '.join(alone)}: train it with one process"
            )
        self.followed: list[dict[str, Tensor]] = []  # logits of gates that read a masked stream in this step
        self.pull = torch.ones((), device=weights[0].device)  # what minimality's coefficient is multiplied by
        self.steps_done = 0

    def _adversary(self, term: Recon | Merged) -> PersistentSources:
        sizes, stack = self.model.sizes, self.model.stack
        if isinstance(term, Merged):
            assert stack is None, "sequences of stacked toys draw no particles"
            return PersistentSources(sizes, (term.particles,), term.step_size, (0.01, 0.99), self.generator)
        shared = () if stack is None else (stack, 1)  # by all positions, not by seeds
        return PersistentSources(sizes, shared, term.step_size, (0.5, 0.99), self.generator)

    def warm_up(self) -> None:
        """The start: faithfulness alone, by AdamW of its own, or a factorisation of W in its place."""
        if self.config.start == "least_squares":
            return self.model.start_faithful()
        if self.config.start == "neurons":
            return self.model.start_neurons(torch.Generator().manual_seed(self.config.seed))
        optimiser = torch.optim.AdamW(
            self.weights, lr=self.config.faithful_lr, weight_decay=self.config.faithful_decay, fused=True
        )
        for _ in range(self.config.faithful_steps):
            self.faithfulness().backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def faithfulness(self) -> Float[Tensor, ""]:
        deltas = self.model.deltas()
        if not self.config.relative:
            return faithfulness(deltas)
        targets = {path: weight_map(self.model.target_model.get_submodule(path)) for path in deltas}
        return relative_faithfulness(deltas, targets)

    def locality(self, progress: float) -> Float[Tensor, ""]:
        """Mean over the components of all MLP matrices."""
        assert (term := self.config.locality) is not None
        t = annealed(term.t, term.between, progress)
        return torch.cat([locality(weights, t) for weights in self.model.neuron_weights().values()]).mean()

    def frequency(self, costs: dict[str, Float[Tensor, "*stack component"]]) -> Float[Tensor, ""]:
        """Σ of Φ over modules; moves the averages by this step's costs. Their start at 0 is divided out."""
        assert (term := self.config.frequency) is not None
        kept = 2.0 ** (-1 / term.half_life)
        total = []
        for path, f in costs.items():
            mean = self.rates[path].lerp_(f.detach(), 1 - kept) / (1 - kept ** (self.steps_done + 1))
            total.append(frequency_cost(f, mean, term.positions))
        return torch.stack(total).sum()

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
        progress, self.followed = self.steps_done / c.steps, []
        n = len(c.recon) if c.split else 1
        assert len(batch) >= n, f"{len(batch)} sequences cannot be shared out to {n} terms"
        shares = [
            ({path: g[i % n :: n] for path, g in g_lo.items()}, clean[i % n :: n], batch[i % n :: n])
            if c.split else (g_lo, clean, batch)
            for i in range(len(c.recon))
        ]  # fmt: skip
        recon = torch.stack([t.coefficient * self.recon(i, t, *shares[i]) for i, t in enumerate(c.recon)]).sum()
        of_each = [self.costs(own) for own in (z, *self.followed)]
        costs = {path: torch.stack([own[path] for own in of_each]).mean(0) for path in z}
        minimality = torch.stack([f.sum() for f in costs.values()]).sum()
        loss = recon + c.minimality.coefficient * self.pull * minimality
        if c.frequency is not None:
            loss = loss + c.frequency.coefficient * self.frequency(costs)
        if c.locality is not None:
            loss = loss + c.locality.coefficient * self.locality(progress)
        if c.faithfulness:
            loss = loss + c.faithfulness * self.faithfulness()
        loss.backward()
        if world().deals("data"):
            DataRanks().average(p for p in model.parameters() if p.requires_grad)
        for i, adversary in self.adversaries.items():
            if isinstance(term := c.recon[i], Merged):
                adversary.follow(1 / term.coefficient)
        if c.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.weights, c.clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * share_of_peak(c, self.steps_done)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.steps_done += 1
        with torch.no_grad():
            l0 = torch.stack([g.sign().sum(-1).mean() for g in g_lo.values()])
            if c.aim is not None:
                self.pull.mul_(((l0.mean().log() - self.aimed(progress)).clamp(-1, 1) * AIM / c.steps).exp())
        return torch.cat([torch.stack([loss, recon, minimality]).detach(), l0])

    def aimed(self, progress: float) -> float:
        """The logarithm of the L0 that is aimed at."""
        assert (aim := self.config.aim) is not None
        return annealed((math.log(aim.l0[0]), math.log(aim.l0[1])), aim.between, progress)

    def costs(self, z: dict[str, Tensor]) -> dict[str, Float[Tensor, "*stack component"]]:
        """What each component's importances cost, mean over positions."""
        stack = "" if self.model.stack is None else "stack "
        by_position, progress = f"{stack}... component -> {stack}(...) component", self.steps_done / self.config.steps
        g_up = {path: rearrange(self.model.upper(logit), by_position) for path, logit in z.items()}
        return {path: importance_cost(g, self.config.minimality, progress).mean(-2) for path, g in g_up.items()}

    def recon(self, index: int, term: Recon | Merged, g_lo: dict[str, Tensor], clean: Tensor, batch: Tensor) -> Tensor:
        """D of one term. `layerwise` masks one module at a time and averages over modules."""
        if isinstance(term, Merged):
            return self.distance(clean, self.run(self.merged_masks(index, term, g_lo, clean, batch), batch))
        if term.source == "running":
            return self.distance(clean, self.run_gated(batch, term.straight_through))
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
            return route({path: Mask(on_or_off(g, term.straight_through), None) for path, g in g_lo.items()})
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

    def merged_masks(
        self, index: int, term: Merged, g_lo: dict[str, Tensor], clean: Tensor, batch: Tensor
    ) -> dict[str, Mask]:
        """Of the adversary on some sequences, of fresh draws and random subsets on the others; the adversary ascends first.

        A sequence's particle is the same in the ascents, which mask all sequences, and in the loss.
        """
        adversary, shape, like = self.adversaries[index], tuple(clean.shape[:2]), {"device": clean.device}
        index_of = torch.randint(term.particles, (shape[0], 1), generator=self.generator, **like)
        particles = index_of == torch.arange(term.particles, **like)
        hostile = torch.rand(shape[0], 1, generator=self.generator, **like) < term.adversarial
        frozen = {path: g.detach() for path, g in g_lo.items()}
        for _ in range(term.steps):
            adversary.ascend(self.distance(clean, self.run(source_masks(frozen, adversary.drawn(particles)), batch)))
        fresh = {
            path: torch.rand(*shape, n + 1, generator=self.generator, **like) for path, n in self.model.sizes.items()
        }
        drawn = {
            path: torch.where(hostile[..., None], own, fresh[path]) for path, own in adversary.drawn(particles).items()
        }
        subset = route_subset(list(g_lo), shape, self.generator)
        return routed(source_masks(g_lo, drawn), {path: torch.where(hostile, 1.0, r) for path, r in subset.items()})

    def run_gated(self, batch: Tensor, straight_through: bool) -> Tensor:
        """The output where every module's gate reads its running input and decides as deployed: the ruler's `free`."""
        model, z = self.model, {}

        def mask(path: str) -> Callable[[Tensor], Tensor]:
            def on(x: Tensor) -> Tensor:
                z[path] = model.importance_logit(path, x).float()
                return on_or_off(model.lower(z[path]), straight_through)

            return on

        with torch.autocast(batch.device.type, torch.bfloat16, enabled=self.autocast):
            with model.masked({path: mask(path) for path in model.paths}):
                out = first_output(model.target_model(batch))
        self.followed.append(z)
        return out

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "rates": self.rates,
            "pull": self.pull,
            "adversaries": {str(i): [a.state_dict(), a.optimiser.state_dict()] for i, a in self.adversaries.items()},
            "generator": self.generator.get_state().cpu(),
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimiser, own in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(own)
        for path, rate in self.rates.items():
            rate.copy_(state["rates"][path])
        self.pull.copy_(state["pull"])
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
        draws = {"batches": self.batches.state_dict(), "generator": self.trainer.generator.get_state().cpu()}
        if not world().leads:
            return {"draws": {world().rank: draws}} if world().deals("data") else {}
        return {"trainer": self.trainer.state_dict(), "draws": {0: draws}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_dealt(len(state["draws"]))
        own = state["draws"][world().part[0]]
        self.trainer.load_state_dict(state["trainer"])
        self.trainer.generator.set_state(own["generator"])
        self.batches.load_state_dict(own["batches"])


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
    forget_state(state_file)
    return seconds
