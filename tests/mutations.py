"""Whether the tests see a fault: each of a list is put into a copy of the sources, and the test that must fail is run.

    python tests/mutations.py            a table, a row per fault; exit code 1 if one of them was not seen

A fault is seen where its test fails with an AssertionError: one that merely breaks the program proves nothing. The tests
named must pass on the sources as they are, which is looked at first. Processes are forked one after another from one that
has imported the libraries, which takes longer than the tests. Beside pytest, which collects none of this,
`test_mutations.py` holds the list to the sources.
"""

import contextlib
import io
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[1]
SEEN, PASSED, BROKEN = 1, 0, 2  # exit codes of a run of tests


class Mutation(NamedTuple):
    """A fault: the snippet of a file, which stands there once, what takes its place, and the test that sees it."""

    fault: str
    file: str
    old: str
    new: str
    test: str  # file::function, or file::function[case]


STEP = "test_training_step.py::test_a_step_is_that_of_the_equations"
RATES = "test_training_step.py::test_rate_and_k_of_a_run_rise_stay_and_fall[batchtopk]"
LATER = "test_training_step.py::test_the_threshold_is_set_on_the_text_after_the_last_batch"
COUNTED = "test_training_step.py::test_a_run_counts_the_dead_while_it_trains"
AUXK = "test_auxk.py"
RESUMED = "test_training.py::test_a_killed_run_ends_bit_identical"
SPD = "test_spd_step.py::test_a_step_is_that_of_the_equations"
SPD_RATES = "test_spd_step.py::test_rate_and_p_of_a_run_are_the_schedules[cosine]"
IMPORTANCES = "experiments/exp_004_train_spd_gpt2/importance_figures.py"
RECOVERED = "experiments/exp_012_spd_known_mechanisms/recovered.py"

CODERS = [
    Mutation("penalty left out", "training.py", "loss = error + penalty", "loss = error", f"{STEP}[sae-relu]"),
    Mutation(
        "CLT: FVU summed over targets", "training.py", "error = fvu(y, y_hat, run.variance).mean()",
        "error = fvu(y, y_hat, run.variance).sum()", f"{STEP}[clt-topk]",
    ),
    Mutation(
        "CLT: penalty summed over layers", "clt.py", "[of_layer.penalty for of_layer in trained]).mean()",
        "[of_layer.penalty for of_layer in trained]).sum()", f"{STEP}[clt-relu]",
    ),
    Mutation("AuxK never added", "training.py", "    if coder.n_dead:\n", "    if False:\n", f"{STEP}[transcoder-topk]"),
    Mutation("AuxK: residual attached", "losses.py", "e = (y - y_hat).detach()", "e = y - y_hat", f"{STEP}[transcoder-topk]"),
    Mutation("AuxK: scale wrong", "training.py", "loss + config.aux * auxk(", "loss + auxk(", f"{STEP}[transcoder-topk]"),
    Mutation(
        "AuxK: summed over targets", "training.py", "e_hat=e_hat, variance=run.variance).mean()",
        "e_hat=e_hat, variance=run.variance).sum()", f"{STEP}[clt-topk]",
    ),
    Mutation(
        "AuxK: ê not shortened", "losses.py", "torch.where(along < square, along.clamp_min(0) / square, 1.0)", "1.0",
        f"{AUXK}::test_auxk_lies_between_zero_and_the_fvu",
    ),
    Mutation(
        "AuxK: ê turned round", "losses.py", "along.clamp_min(0) / square", "along / square",
        f"{AUXK}::test_at_no_token_does_auxk_pull_harder_at_e_hat_than_the_fvu_at_y_hat",
    ),
    Mutation(
        "AuxK: no gradient at ê = 0", "losses.py", "torch.where(along < square, along.clamp_min(0) / square, 1.0)",
        "(along.clamp_min(0) / square.clamp_min(1e-30)).clamp_max(1.0)",
        f"{AUXK}::test_auxk_with_nothing_written_is_the_fvu_and_pulls_towards_the_residual",
    ),
    Mutation(
        "AuxK: ê shortened below the best", "losses.py", "fvu(e, alpha * e_hat, variance)", "fvu(e, alpha**2 * e_hat, variance)",
        f"{AUXK}::test_what_already_helps_best_is_not_pushed_further",
    ),
    Mutation(
        "AuxK: shortened as a whole", "losses.py", "(e * e_hat.detach()).sum(-1, keepdim=True)",
        "(e * e_hat.detach()).sum(-1, keepdim=True).mean(-2, keepdim=True)",
        f"{AUXK}::test_auxk_is_the_least_error_over_all_shortenings",
    ),
    Mutation(
        "AuxK: signed", "sparsity.py", "(pre - theta.clamp(max=0))", "pre",
        f"{AUXK}::test_a_dead_latent_is_active_at_its_own_largest_tokens_and_never_negative",
    ),
    Mutation(
        "AuxK: signed, in a step", "sparsity.py", "(pre - theta.clamp(max=0))", "pre", f"{STEP}[skip-batchtopk]",
    ),
    Mutation(
        "AuxK: active at every token", "sparsity.py", "active = (pre > theta) &", "active = (pre > -torch.inf) &",
        f"{STEP}[sae-relu]",
    ),
    Mutation(
        "AuxK: the lift has a gradient", "sparsity.py", "theta = pre.detach().topk(", "theta = pre.topk(",
        f"{AUXK}::test_the_lift_carries_no_gradient",
    ),
    Mutation(
        "AuxK: who fired stays", "sparsity.py", " & (silence >= dead_after)[:, None]", "",
        f"{AUXK}::test_who_has_fired_since_the_last_count_is_left_out",
    ),
    Mutation(
        "AuxK: the liveliest for the dead", "sparsity.py", ".topk(self.n_dead)", ".topk(self.n_dead, largest=False)",
        f"{AUXK}::test_a_step_adds_auxk_to_the_dead_and_leaves_all_else_alone[TopK-transcoder]",
    ),
    Mutation(
        "AuxK: an SAE's b_dec learns", "sae.py", "self.b_dec.detach(), dead_after", "self.b_dec, dead_after",
        f"{AUXK}::test_a_step_adds_auxk_to_the_dead_and_leaves_all_else_alone[TopK-sae]",
    ),
    Mutation(
        "AuxK: one layer's dead in another's", "clt.py", "zip(pairs, self.W_dec)]", "zip(pairs[::-1], self.W_dec)]",
        f"{AUXK}::test_in_a_clt_only_the_layers_that_have_dead_latents_are_taught",
    ),
    Mutation(
        "AuxK: nothing wakes", "sparsity.py", "(pre - theta.clamp(max=0)) * active", "pre.relu() * active",
        f"{AUXK}::test_sleeping_latents_wake[transcoder]",
    ),
    Mutation(
        "dead after a fifth of the run", "training.py", "tokens // 10", "tokens // 5",
        f"{AUXK}::test_dead_means_a_tenth_of_a_short_run_and_ten_million_tokens_of_a_long_one",
    ),
    Mutation(
        "dead latents never counted", "training.py",
        "        self.coder.count_dead(dead_after)\n        return", "        return", COUNTED,
    ),
    Mutation(
        "dead latents not counted on resuming", "training.py",
        '        self.seconds = state["seconds"]\n        self.count_dead(dead_after)\n',
        '        self.seconds = state["seconds"]\n', RESUMED,
    ),
    Mutation("silence not counted", "training.py", "    coder.update_statistics(codes)\n", "", f"{STEP}[sae-topk]"),
    Mutation("Gated: the gates' decoder learns", "coder.py", "with frozen(self):", "if True:", f"{STEP}[transcoder-gated]"),
    Mutation("JumpReLU: θ for log θ", "sparsity.py", "d_theta * theta, None", "d_theta, None", f"{STEP}[clt-jumprelu]"),
    Mutation(
        "SAE: gradient not projected", "sae.py", "self.W_dec.grad -= along * self.W_dec", "pass", f"{STEP}[sae-topk]",
    ),
    Mutation(
        "SAE: clipped before projected", "training.py",
        "    coder.constrain_gradients()\n    coder.clip_gradients(config.max_grad_norm)\n",
        "    coder.clip_gradients(config.max_grad_norm)\n    coder.constrain_gradients()\n",
        f"{STEP}[sae-batchtopk]",
    ),
    Mutation(
        "SAE: decoder not renormalised", "sae.py", "self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)", "pass",
        f"{STEP}[sae-topk]",
    ),
    Mutation(
        "gradient not clipped", "training.py",
        "    coder.clip_gradients(config.max_grad_norm)\n", "", f"{STEP}[clt-batchtopk]",
    ),
    Mutation("no step", "training.py", "    optimiser.step()\n", "", f"{STEP}[transcoder-relu]"),
    Mutation("Adam's betas not those asked for", "training.py", "betas=config.betas, ", "", f"{STEP}[transcoder-relu]"),
    Mutation("rate given, not used", "training.py", 'group["lr"] = lr\n', "pass\n", f"{STEP}[transcoder-relu]"),
    Mutation("rate not scheduled", "training.py", "factor=schedule(step, self.steps, config)", "factor=1.0", RATES),
    Mutation("k not annealed", "training.py", "run.coder.set_k(annealed_k(", "(annealed_k(", RATES),
    Mutation("not calibrated", "training.py", "    _side_by_side(calibrate, runs, store.device)\n", "", LATER),
    Mutation(
        "calibrated on text already seen", "training.py", "itertools.islice(store, ",
        "itertools.islice(ActivationsStore(target, data), ", LATER,
    ),
]  # fmt: skip

EARLY = "test_training.py::test_forwards_before_a_refill_give_the_batches_of_forwards_in_it[32]"
CACHE = "test_activation_cache.py"
MEMORY = "test_memory.py"

HARVEST = [
    Mutation(
        "early slots filled again", "activation_store.py", "self.order[: self.served]])[len(self.early) :]",
        "self.order[: self.served]])", EARLY,
    ),
    Mutation("early forwards without end", "activation_store.py", "- self.serve) - len(self.early)", "- self.serve)", EARLY),
    Mutation(
        "early tokens in another order", "activation_store.py", "torch.cat([self.order[self.served :], self.early])",
        "torch.cat([self.early, self.order[self.served :]])", EARLY,
    ),
    Mutation(
        "int8: one scale for a layer", "activation_cache.py", "    s = wide.abs().amax(-1) / 127\n",
        "    s = (wide.abs().amax(-1) / 127).amax(-1, keepdim=True).expand(wide.shape[:-1])\n",
        f"{CACHE}::test_int8_errs_by_at_most_half_a_step_and_keeps_the_largest_of_each_token",
    ),
    Mutation(
        "shard behind a gap", "activation_cache.py", "        if forward == self.whole:\n", "        if True:\n",
        f"{CACHE}::test_a_cache_without_a_folder_writes_nothing_behind_a_gap",
    ),
    Mutation(
        "int8 not in the recipe", "training.py", '"int8 activations, " if harvest.cache == "int8" else ""', '""',
        f"{CACHE}::test_a_training_from_a_cache_is_the_training_that_made_it[int8]",
    ),
    Mutation(
        "harvest's precision forgotten", "activation_store.py", "[self.fingerprint(), precision, *part]",
        "[self.fingerprint(), *part]", f"{CACHE}::test_what_decides_the_values_decides_the_folder",
    ),
    Mutation(
        "forwards kept", "activation_store.py", "        self.whole &= kept",
        "        self.kept = [*getattr(self, 'kept', []), kept]\n        self.whole &= kept",
        f"{MEMORY}::test_a_store_holds_its_buffer_and_nothing_that_grows",
    ),
    Mutation(
        "logits of all tokens at once", "losses.py", "        for h, of_p, g in zip(flat.split(rows)",
        "        rows = len(flat)\n        for h, of_p, g in zip(flat.split(rows)",
        f"{MEMORY}::test_training_on_the_output_holds_log_p_and_logits_of_few_tokens[64-True]",
    ),
]  # fmt: skip

DECOMPOSITIONS = [
    Mutation(
        "minimality left out", "spd_training.py", " + c.minimality.coefficient * self.pull * minimality", "",
        f"{SPD}[one]",
    ),
    Mutation(
        "minimality left out", "spd_training.py", " + c.minimality.coefficient * self.pull * minimality", "",
        "test_spd_model.py::test_minimality_and_reconstruction_fall_in_training",
    ),
    Mutation(
        "no aim", "spd_training.py", "if c.aim is not None:", "if False:", f"{SPD}[today]",
    ),
    Mutation(
        "gates that follow a masked stream cost nothing", "spd_training.py", "self.followed.append(z)", "pass",
        f"{SPD}[today]",
    ),
    Mutation(
        "an inactive part cannot be let in", "replacement.py", "torch.lerp(self.parts[key]", "torch.lerp(0 * self.parts[key]",
        "test_adversary.py::test_the_corners_of_the_box_are_the_deployed_replacement_and_the_original_model",
    ),
    Mutation(
        "the remainder cannot be let in", "replacement.py", " + self.sources.deltas[key] * rest", "",
        "test_adversary.py::test_what_an_attacked_layer_writes_is_what_the_definition_says",
    ),
    Mutation(
        "the last sources count, not the worst", "adversary.py", "if kl > worst:", "if True:",
        "test_adversary.py::test_an_attack_climbs_and_a_later_rung_is_never_better_for_the_method",
    ),
    Mutation(
        "gates are not dealt", "replacement.py", "return on[..., self.dealt[key]] if key in self.dealt else on", "return on",
        "test_adversary.py::test_dealt_gates_open_as_many_parts_as_before_among_those_alive",
    ),
    Mutation(
        "frequency term left out", "spd_training.py", "        if c.frequency is not None:\n", "        if False:\n",
        f"{SPD}[today]",
    ),
    Mutation(
        "firing rates stand still", "spd_training.py", ".lerp_(f.detach(), 1 - kept)", ".lerp(f.detach(), 1 - kept)",
        f"{SPD}[today]",
    ),
    Mutation(
        "slope of this step's rates", "losses.py", "count = positions * mean\n", "count = positions * f.detach()\n",
        f"{SPD}[today]",
    ),
    Mutation(
        "locality left out", "spd_training.py", "        if c.locality is not None:\n", "        if False:\n",
        f"{SPD}[today]",
    ),
    Mutation("faithfulness not relative", "spd_training.py", "if not self.config.relative:", "if True:", f"{SPD}[today]"),
    Mutation(
        "particles not moved by the loss", "spd_training.py", "adversary.follow(1 / term.coefficient)", "pass",
        f"{SPD}[today]",
    ),
    Mutation(
        "running gates read the clean stream", "spd_training.py", 'if term.source == "running":', "if False:",
        f"{SPD}[today]",
    ),
    Mutation(
        "Muon left out", "spd_training.py", 'by_muon = config.optimiser == "muon"', "by_muon = False",
        "test_spd_step.py::test_matrices_move_by_muon_and_vectors_by_adamw",
    ),
    Mutation(
        "firing rates not restored", "spd_training.py", "rate.copy_(state", "rate.clone().copy_(state",
        "test_spd_step.py::test_all_of_today_resumes_bit_identically",
    ),
    Mutation("faithfulness left out", "spd_training.py", "        if c.faithfulness:\n", "        if False:\n", f"{SPD}[all]"),
    Mutation("coefficients left out", "spd_training.py", "t.coefficient * self.recon(", "self.recon(", f"{SPD}[all]"),
    Mutation("layerwise summed", "spd_training.py", "torch.stack(losses).mean()", "torch.stack(losses).sum()", f"{SPD}[one]"),
    Mutation("subset routed as all", "spd_training.py", 'if term.routing == "subset":', "if False:", f"{SPD}[all]"),
    Mutation(
        "deployed masks of importances", "spd_training.py",
        "torch.where(g_lo > 0, 1 + g_lo - g_lo.detach() if straight_through else 1.0, g_lo)",
        "g_lo", f"{SPD}[all]",
    ),
    Mutation("straight through never", "spd_training.py", "if straight_through else", "if False else", f"{SPD}[today]"),
    Mutation(
        "persistent sources stand still", "spd_training.py", "adversary.ascend(objective(adversary.sources()).sum())", "pass",
        f"{SPD}[all]",
    ),
    Mutation("PGD does not ascend", "spd_masks.py", "        if step < steps:\n", "        if False:\n", f"{SPD}[all]"),
    Mutation("a split term reads all", "spd_training.py", "n = len(c.recon) if c.split else 1", "n = 1", f"{SPD}[split]"),
    Mutation("gates' leak of both signs", "spd_gates.py", "ctx.alpha * grad.clamp(max=0)", "ctx.alpha * grad", f"{SPD}[all]"),
    Mutation("gradient not clipped", "spd_training.py", "        if c.clip is not None:\n", "        if False:\n", f"{SPD}[all]"),
    Mutation(
        "gates clipped with the components", "spd_training.py", "clip_grad_norm_(self.weights, c.clip)",
        "clip_grad_norm_(self.model.parameters(), c.clip)", f"{SPD}[all]",
    ),
    Mutation("weight decay", "spd_training.py", "weight_decay=0.0, fused", "weight_decay=0.1, fused", f"{SPD}[one]"),
    Mutation(
        "rate not scheduled", "spd_training.py", 'group["peak"] * share_of_peak(c, self.steps_done)', 'group["peak"]', SPD_RATES,
    ),
    Mutation("gates at the components' rate", "spd_training.py", "config.gate_lr or config.lr", "config.lr", f"{SPD}[one]"),
    Mutation(
        "p not annealed", "losses.py", "annealed(minimality.p, minimality.between, progress)", "minimality.p[0]", SPD_RATES,
    ),
    Mutation(
        "no warm-up", "spd_training.py", "        self.start = trainer.warm_up\n", "        self.start = lambda: None\n",
        SPD_RATES,
    ),
    Mutation(
        "warm-up without decay", "spd_training.py", ", weight_decay=self.config.faithful_decay", ", weight_decay=0.0",
        "test_spd_step.py::test_warm_up_is_faithfulness_alone_with_decay",
    ),
]  # fmt: skip

PERFECT = "test_evaluation.py::test_a_perfect_decomposition_lands_exactly_on_every_axis_and_protocol"
DEFINITION = "test_evaluation.py::test_the_ruler_equals_its_definition_for_every_method_and_protocol[64]"
RULER = [
    Mutation(
        "dead constant 0", "metrics.py", "return tally.replacement.dead(tally.layers)", "return 0.0",
        "test_training_step.py::test_latents_silent_at_the_end_of_training_are_the_tables_dead",
    ),
    Mutation(
        "FVU without the mean", "metrics.py", "self.size(layer) - mean.square().sum().item()", "self.size(layer)",
        DEFINITION,
    ),
    Mutation("bits without values", "metrics.py", " + VALUE_BITS * sum(l0.values())", "", PERFECT),
    Mutation("CE recovered of the whole CE", "metrics.py", "/ (most - least) if", "/ most if", PERFECT),
    Mutation(
        "an SAE without its MLP", "evaluation.py", "if run.replacement.reads_y else 0", "if False else 0",
        "test_evaluation.py::test_who_reads_what_the_mlp_writes_needs_the_mlp",
    ),
    Mutation(
        "frozen reads the running stream", "replacement.py", "(x, y) if self.clean is None else self._at(self.clean, layer)",
        "(x, y)", "test_replacement.py::test_frozen_layers_write_what_each_writes_alone",
    ),
    Mutation(
        "gates keep clean values", "replacement.py", "self.replacement.values_at(layer, x, y, super().encode(layer))",
        "super().encode(layer)", "test_replacement.py::test_where_all_parts_are_active_gates_are_free",
    ),
    Mutation(
        "rows of unequal training", "coder_replacements.py", "return record.seed, record.train_tokens, record.recipe",
        "return (record.seed,)", "test_replacement.py::test_coders_of_different_training_never_share_a_row",
    ),
    Mutation(
        "dead of all layers", "metrics.py", "dead(tally.layers)", "dead(tally.replacement.layers)",
        "test_replacement.py::test_dead_are_those_of_the_rows_layers_in_a_window_after_the_annealing",
    ),
    Mutation(
        "layers weigh alike", "allocation.py", "max(self.kl, 0.0) / max(self.squared, 1e-30)", "1.0",
        "test_allocation.py::test_one_threshold_serves_all_layers_and_parts",
    ),
    Mutation(
        "a threshold in half", "allocation.py", "return found.topk(min(n, len(found))).values[-1]",
        "return found.topk(min(n // 2, len(found))).values[-1]",
        "test_allocation.py::test_what_is_kept_are_the_largest_scores_of_all_layers_and_tokens",
    ),
    Mutation(
        "unused components count", RECOVERED, ".masked_fill(~counts, -torch.inf)", "",
        "test_spd_model.py::test_a_component_without_importance_counts_for_nothing",
    ),
    Mutation(
        "MMCS without the components' norm", RECOVERED, "dot / (norm * length).clamp_min(1e-12)", "dot / length",
        "test_spd_model.py::test_perfect_decompositions_score_perfectly",
    ),
]  # fmt: skip

ON_OUTPUT = "test_output_objective.py::test_the_gradient_is_that_of_the_equations"
SOME = "test_output_objective.py::test_the_gradient_of_some_layers_is_that_of_the_equations"
DEAD = "test_output_objective.py::test_the_gradient_of_auxk_is_that_of_the_equations"
PLANS = "test_output_objective.py::test_a_mixed_objective_draws_what_it_says"
CHUNKED = "test_output_objective.py::test_kl_through_the_head_is_the_plain_one_and_so_is_its_gradient"
THRESHOLDS = "test_output_training.py::test_thresholds_are_set_where_the_trained_protocol_has_coders_read"
TUNED = "test_output_training.py::test_the_rate_rises_stays_and_falls_and_latents_are_counted"
CUT = "test_output_training.py::test_an_interrupted_training_ends_bit_identical"
OUTPUT = [
    Mutation(
        "free: earlier coders learn nothing from later ones",
        "output_objective.py",
        "own = (self._tokens(x), self._tokens(y)) if",
        "own = (self._tokens(x).detach(), self._tokens(y).detach()) if",
        f"{ON_OUTPUT}[clt-topk-free-0.0]",
    ),
    Mutation(
        "free reads the clean stream",
        "output_objective.py",
        "if layer in self.follows else self.original(layer)",
        "if False else self.original(layer)",
        f"{ON_OUTPUT}[skip-topk-free-0.0]",
    ),
    Mutation(
        "a source that is not replaced follows",
        "output_objective.py",
        "            if layer not in self.follows:\n",
        "            if x is None and layer in self.follows:\n",
        f"{SOME}[clt-two]",
    ),
    Mutation(
        "clean: what a run says is lost",
        "output_objective.py",
        "if leaf.grad is not None and",
        "if False and",
        f"{ON_OUTPUT}[sae-topk-single-0.0]",
    ),
    Mutation(
        "local loss left out",
        "output_objective.py",
        "(objective.local * error.sum() if objective.local else 0.0)",
        "0.0",
        f"{ON_OUTPUT}[clt-topk-frozen-0.5]",
    ),
    Mutation(
        "local loss at full weight",
        "output_objective.py",
        "objective.local * error.sum()",
        "error.sum()",
        f"{ON_OUTPUT}[clt-topk-frozen-0.5]",
    ),
    Mutation(
        "gates learn nothing from the target",
        "output_objective.py",
        " + of_gates.sum()",
        "",
        f"{ON_OUTPUT}[sae-gated-free-0.0]",
    ),
    Mutation(
        "decoder learns from gates",
        "output_objective.py",
        "with frozen(self.replacement.reading(layer, *own).coder):",
        "if True:",
        f"{ON_OUTPUT}[skip-gated-free-0.0]",
    ),
    Mutation(
        "penalty left out",
        "output_objective.py",
        "_penalty(member, pass_) + _auxk",
        "_auxk",
        f"{ON_OUTPUT}[transcoder-relu-frozen-0.0]",
    ),
    Mutation(
        "penalty summed over layers",
        "output_objective.py",
        "pass_.trained[layer].penalty for layer in own]).mean()",
        "pass_.trained[layer].penalty for layer in own]).sum()",
        f"{ON_OUTPUT}[clt-relu-free-0.0]",
    ),
    Mutation(
        "FVU summed over layers",
        "output_objective.py",
        "torch.stack(errors).mean() if errors",
        "torch.stack(errors).sum() if errors",
        f"{ON_OUTPUT}[clt-topk-frozen-0.5]",
    ),
    Mutation(
        "AuxK never added",
        "output_objective.py",
        "    if not coder.n_dead:\n",
        "    if True:\n",
        f"{DEAD}[transcoder-free]",
    ),
    Mutation(
        "AuxK: what the dead read moves",
        "output_objective.py",
        "torch.zeros_like(some)).detach()",
        "torch.zeros_like(some))",
        f"{DEAD}[transcoder-free]",
    ),
    Mutation("KL of sums", "losses.py", "return total / len(flat)", "return total", CHUNKED),
    Mutation("KL's gradient of sums", "losses.py", ".div_(len(flat))", "", CHUNKED),
    Mutation(
        "alone follows the stream",
        "output_objective.py",
        "return Run((layers[order[0]],), False)",
        "return Run((layers[order[0]],), True)",
        PLANS,
    ),
    Mutation(
        "some may be all", "output_objective.py", "torch.randint(2, n, (1,)", "torch.randint(2, n + 1, (1,)", PLANS
    ),
    Mutation("a tuning at one rate", "output_training.py", "lr=member.lr * factor", "lr=member.lr", TUNED),
    Mutation(
        "silence not counted",
        "output_training.py",
        "                encoder.update_statistics(codes[layer])\n",
        "                pass\n",
        TUNED,
    ),
    Mutation(
        "draws not resumed",
        "output_training.py",
        '        self.generator.set_state(state["generator"])\n',
        "",
        f"{CUT}[protocol3-True]",
    ),
    Mutation(
        "text not resumed",
        "output_training.py",
        '        self.stream.load_state_dict(state["stream"][self.part])\n',
        "",
        f"{CUT}[free-False]",
    ),
    Mutation(
        "calibrated on the clean stream",
        "output_training.py",
        'else protocol == "free"',
        "else False",
        f"{THRESHOLDS}[free]",
    ),
    Mutation(
        "stages read the same text",
        "output_training.py",
        "config.seed + stages",
        "config.seed",
        "test_output_training.py::test_every_stage_reads_the_text_in_an_order_of_its_own",
    ),
]

KERNELS = "test_sparse_triton.py::test_kernels_are_plain_indexing_in_the_interpreter[selection]"
SELECTION = [
    Mutation(
        "bounds without a margin", "sparse_triton.py", "column == d, margin * 1.0078125", "column == d, margin * 0.0", KERNELS,
    ),
    Mutation(
        "bounds without what the bias lost", "sparse_triton.py", "column == d + 2, b_rest", "column == d + 2, -b_rest",
        KERNELS,
    ),
    Mutation(
        "NaN the least of bounds", "sparse_triton.py", "(key < -0x7F81), 0x7FFF, key)", "(key < -0x7F81), -0x7FFF, key)",
        KERNELS,
    ),
    Mutation(
        "every token proven", "sparse_triton.py", "1 - (smallest > tl.load(rest + t)).to(tl.int32)", "0 * t", KERNELS,
    ),
    Mutation(
        "the batch proven by its largest winner", "sparse_encode.py", "(ordered[k * n - 1] > candidates.rest)",
        "(ordered[0] > candidates.rest)", KERNELS,
    ),
    Mutation(
        "ties to the highest latent", "sparse_triton.py", "(nth[None, :] < slot[:, None])", "(nth[None, :] > slot[:, None])",
        KERNELS,
    ),
    Mutation(
        "ties of candidates dropped", "sparse_triton.py", "high * 0, high * 0, CAPACITY - found, SEGMENTS",
        "high * 0, high * 0, high * 0, SEGMENTS", KERNELS,
    ),
    Mutation(
        "a search that begins above what it seeks", "sparse_triton.py", "tl.maximum(tl.min(largest, 0), -32768)",
        "tl.maximum(tl.max(largest, 0), -32768)", KERNELS,
    ),
    Mutation(
        "ties counted anew in every segment", "sparse_triton.py", "room - equal - tl.cumsum(n_equal, 0) + n_equal",
        "room - equal", KERNELS,
    ),
    Mutation(
        "the largest tie left out forgotten", "sparse_triton.py", "tl.maximum(rest, threshold - 1), rest)", "rest, rest)",
        KERNELS,
    ),
]  # fmt: skip

VARIANTS = "test_spd_variants.py"
MASK_VARIANTS = [
    Mutation(
        "g + s in place of g + (1 − g) s", "spd_variants.py", "m = g + (1 - g) * s", "m = (g + s).clamp(0, 1)",
        f"{VARIANTS}::test_masks_are_drawn_evenly_between_the_importance_and_1[stochastic]",
    ),
    Mutation(
        "unmasked at half strength", "spd_variants.py", "gated=False, source=1.0", "gated=False, source=0.5",
        f"{VARIANTS}::test_unmasked_is_every_component_at_full_strength[frozen]",
    ),
    Mutation(
        "unmasked: Δ forgotten", "spd_variants.py", "delta=delta or", "delta=False or",
        f"{VARIANTS}::test_unmasked_with_delta_is_the_target[gate0]",
    ),
    Mutation(
        "zero lets components in", "spd_variants.py", '"zero": Variant(gated=False', '"zero": Variant(gated=True',
        f"{VARIANTS}::test_zero_writes_only_biases",
    ),
    Mutation(
        "importances above 0 count as 1", "spd_variants.py", "return m.to(x.dtype)", "return m.ceil().to(x.dtype)",
        f"{VARIANTS}::test_importance_is_rounded_where_every_importance_is_0_or_1",
    ),
    Mutation(
        "stochastic: Δ shut", "spd_variants.py", "source=None, draws_delta=True", "source=None",
        f"{VARIANTS}::test_stochastic_under_importances_of_1_is_unmasked_with_a_drawn_delta",
    ),
    Mutation(
        "u is that of any call", "spd_variants.py", ".manual_seed(zlib.crc32(f\"{self.seed} {name}\".encode()))", "",
        f"{VARIANTS}::test_the_same_batch_has_the_same_numbers_and_another_others[stochastic-gate0]",
    ),
    Mutation(
        "u is that of any batch", "spd_variants.py", '{seed} {bits}', '{seed}',
        f"{VARIANTS}::test_the_same_batch_has_the_same_numbers_and_another_others[random-gate0]",
    ),
    Mutation(
        "u is that of any matrix", "spd_variants.py", '{self.seed} {name}', '{self.seed}',
        f"{VARIANTS}::test_the_same_batch_has_the_same_numbers_and_another_others[random-gate0]",
    ),
    Mutation(
        "random counts half", "spd_variants.py", "path, x, m > 0)", "path, x, m > 0.5)",
        f"{VARIANTS}::test_every_variant_is_a_row_counted_by_the_components_that_run",
    ),
    Mutation(
        "first positions counted", IMPORTANCES, "z[:, 1:]", "z",
        "test_exp_004.py::test_counts_are_of_every_token_and_component_and_those_above_0_are_the_rulers_l0[gate0]",
    ),
    Mutation(
        "0 falls into the first bin", IMPORTANCES, "torch.bucketize(g, edges)", "torch.bucketize(g.clamp_min(1e-6), edges)",
        "test_exp_004.py::test_means_and_bins_are_those_of_the_gates",
    ),
    Mutation(
        "what is not active has a place", "pareto_figure.py", "(getattr(p, x) or 0) > 0", "getattr(p, x) is not None",
        "test_pareto.py::test_a_row_without_active_parts_has_no_place",
    ),
]  # fmt: skip

MUTATIONS = [*CODERS, *HARVEST, *DECOMPOSITIONS, *RULER, *OUTPUT, *SELECTION, *MASK_VARIANTS]


class _Failures:
    """A plugin of pytest that keeps what tests raised."""

    def __init__(self) -> None:
        self.raised: list[BaseException] = []

    def pytest_exception_interact(self, call: Any) -> None:
        self.raised.append(call.excinfo.value)


def _pytest(tests: Sequence[str], *options: str, plugins: Sequence[object] = ()) -> int:
    import pytest

    return pytest.main(["-qx", "-p", "no:cacheprovider", *options, *(f"tests/{test}" for test in tests)], plugins)


def _test(tests: Sequence[str]) -> None:
    """Run tests and end the process with SEEN, PASSED or BROKEN."""
    silence, failures = os.open(os.devnull, os.O_WRONLY), _Failures()
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = _pytest(tests, plugins=[failures])
    by_assertion = bool(failures.raised) and all(isinstance(error, AssertionError) for error in failures.raised)
    os._exit(PASSED if code == 0 else SEEN if by_assertion else BROKEN)


def run_tests(tests: Sequence[str]) -> int:
    """`_test` in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=_test, args=(tests,))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def import_libraries(root: Path, tests: Sequence[str]) -> None:
    """Import all that the tests import, then forget the modules of the tree: a fork imports those anew, and no others."""
    finders = list(sys.meta_path)
    with contextlib.redirect_stdout(io.StringIO()):
        _pytest(tests, "--collect-only")
    sys.meta_path[:] = finders
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(str(root)):
            del sys.modules[name]


def mutated(text: str, mutation: Mutation) -> str:
    """The file's text with the fault in it."""
    assert text.count(mutation.old) == 1, f"{mutation.file} has {mutation.old!r} {text.count(mutation.old)} times"
    return text.replace(mutation.old, mutation.new)


def copy_sources(root: Path) -> None:
    """Every Python file of the working tree that git does not ignore, and pytest's settings."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "*.py", "pyproject.toml"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, root / name)


def main() -> None:
    sys.dont_write_bytecode = True  # bytecode is told from its source by time and size, which a fault may leave alike
    tests, unseen = sorted({mutation.test for mutation in MUTATIONS}), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        copy_sources(root)
        os.chdir(root)
        sys.path.insert(0, str(root))
        import_libraries(root, tests)
        if (code := run_tests(tests)) != PASSED:
            raise SystemExit(f"the tests do not pass on the sources as they are ({code}): run them with pytest first")
        for mutation in MUTATIONS:
            file = root / mutation.file
            text = file.read_text()
            file.write_text(mutated(text, mutation))
            code = run_tests([mutation.test])
            file.write_text(text)
            word = {SEEN: "seen", PASSED: "NOT SEEN", BROKEN: "BREAKS"}[code]
            print(f"{word:8}  {mutation.file:18.18}  {mutation.fault:36}  {mutation.test}", flush=True)
            unseen += code != SEEN
    print(f"{len(MUTATIONS) - unseen} of {len(MUTATIONS)} faults seen")
    raise SystemExit(unseen > 0)


if __name__ == "__main__":
    main()
