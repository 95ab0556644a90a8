"""Theorems about the ruler: what is known by construction must come out exactly, on every axis and protocol."""

import math

import pytest
import torch
from small import SEQ, D, F, H, all_methods, clean, clt, each_by_itself, make_tiny, run, some_tokens, the, transcoders
from torch import Tensor

from baselines import IdentityReplacement, MeanReplacement, NeuronsReplacement, ZeroReplacement
from coder_replacements import CLTReplacement, TranscoderReplacement
from config import BatchTopK, EncoderConfig, Relu, TopK
from evaluation import PROTOCOLS, evaluate
from losses import cross_entropy, kl_divergence
from metrics import binary_entropy, bootstrap_interval, document_draws
from replacement import Origin, Replacement, replaced_logits
from target_models import TargetModel
from token_stream import HeldOutText
from transcoder import build_transcoder


def dictionary_of(target: TargetModel, tokens: Tensor, layer: int, active: int) -> TranscoderReplacement:
    """A hand-made transcoder that equals the MLP on these tokens with `active` parts for each: a perfect decomposition.

    Latent (t, j) reads the unit direction of the t-th input and is above threshold for that input alone; the `active`
    latents of an input share its output.
    """
    x, y = (kept[0].flatten(0, 1) for kept in clean(target, tokens, [layer])[:2])
    unit, norm = x / x.norm(dim=1, keepdim=True), x.norm(dim=1)
    gap = norm - (x @ unit.T - 1e9 * torch.eye(len(x))).amax(0)  # by how much it beats the next along its direction
    assert (gap > 1e-3).all(), f"the inputs must be distinct: {gap.min()=}"
    coder = build_transcoder(
        EncoderConfig(layer=layer, d_in=D, d_out=D, d_dict=active * len(x), rule=Relu(0.0)), torch.Generator()
    )
    with torch.no_grad():  # pre = 1 − 2 (norm − x·unit) / gap: 1 at its own input, at most −1 at every other
        coder.encoder.W_enc.copy_((2 * unit / gap[:, None]).repeat_interleave(active, 0))
        coder.encoder.b_enc.copy_((1 - 2 * norm / gap).repeat_interleave(active))
        coder.W_dec.copy_((y / active).repeat_interleave(active, 0))
        coder.b_dec.zero_()
    return TranscoderReplacement(
        [coder], origin=Origin(seed=3, train_tokens=77, train_seconds=1.5, checkpoint="hand/made")
    )


def test_a_perfect_decomposition_lands_exactly_on_every_axis_and_protocol() -> None:
    target, tokens, active = make_tiny(3), some_tokens(4), 3
    tokens[:, 0] = torch.arange(4)  # what a first position holds depends on its token alone
    n, parts = 4 * (SEQ - 1), active * 4 * SEQ
    perfect = dictionary_of(target, tokens, 1, active)
    measured = evaluate(target, [perfect, MeanReplacement([1], torch.zeros(1, D))], each_by_itself(tokens))
    with torch.inference_mode():
        ce = cross_entropy(target.logits(tokens), tokens).mean().item()
        ce_zero = cross_entropy(run(target, tokens, ZeroReplacement([1]).begin(), [1]), tokens).mean().item()
    for protocol in PROTOCOLS:
        p = the(measured, "transcoder-relu", protocol, (1,))
        assert (p.l0, p.l0_p95, p.l0_per_mlp, p.active_params) == (active, active, active, active * 2 * D)
        # each part of a counted position fires once in n tokens, the first positions' parts never
        bits = active * n * binary_entropy(torch.tensor([1 / n], dtype=torch.float64)).item() + 8 * active
        assert p.bits_per_token == pytest.approx(bits, rel=1e-12)
        assert p.ce == pytest.approx(ce, abs=1e-4) and p.ce_degradation == pytest.approx(0, abs=1e-4)
        assert p.fvu == pytest.approx(0, abs=1e-5) and p.tail_max == pytest.approx(0, abs=1e-2)
        assert p.ce_recovered_zero == pytest.approx(1, abs=1e-3) == p.ce_recovered_mean
        assert p.tokens == n and p.k is None and p.gate_params == parts * (D + 1)
        assert (p.seed, p.train_tokens, p.train_seconds, p.checkpoint) == (3, 77, 1.5, "hand/made")
        z = the(measured, "mean", protocol, (1,))  # means of zero: the zero ablation
        assert z.ce == pytest.approx(ce_zero, abs=1e-6) and z.ce_recovered_zero == 0 and z.l0 is None
        assert z.ce_degradation == pytest.approx(ce_zero - ce, abs=1e-6)


def test_axes_of_a_clt_are_those_of_the_table() -> None:
    """Σ L0_i (n−i)/n active parts per MLP, Σ L0_i (d_in + (n−i) d_out) parameters; `single`: what writes to it."""
    target, tokens, n = make_tiny(3), some_tokens(), 3
    measured = evaluate(target, [CLTReplacement(clt(range(n), TopK(5)), top_k=None)], each_by_itself(tokens))
    for protocol in ("frozen", "free"):
        p = the(measured, "clt-per_token", protocol, (0, 1, 2))
        rows = [d for d in measured.layers if d.protocol == protocol and d.layers == (0, 1, 2)]
        l0 = [d.l0 for d in rows]
        assert p.l0 == pytest.approx(sum(l0) / n)
        assert p.l0_per_mlp == pytest.approx(sum(l0[i] * (n - i) / n for i in range(n)))
        assert p.active_params == pytest.approx(sum(l0[i] * (D + (n - i) * D) for i in range(n)))
        assert p.fvu == pytest.approx(sum(d.fvu for d in rows) / n)
    for m in range(n):
        p = the(measured, "clt-per_token", "single", (m,))
        rows = [d for d in measured.layers if d.protocol == "single" and d.layers == (m,)]
        assert [d.layer for d in rows] == list(range(m + 1)) and [d.fvu is None for d in rows] == [True] * m + [False]
        assert p.l0_per_mlp == pytest.approx(sum(d.l0 for d in rows))
        assert p.active_params == pytest.approx(sum(d.l0 for d in rows) * 2 * D)


def test_neurons_count_their_k_and_a_dense_map_its_parameters() -> None:
    target, tokens = make_tiny(2), some_tokens()
    measured = evaluate(target, all_methods(target, range(2)), each_by_itself(tokens), ["frozen"])
    neurons = the(measured, "neurons", "frozen", (0, 1))
    assert (neurons.l0, neurons.l0_per_mlp, neurons.active_params) == (5, 5, 2 * 5 * 2 * D)
    assert the(measured, "affine", "frozen", (0, 1)).active_params == 2 * D * D
    skip, plain = the(measured, "transcoder-skip", "frozen", (0, 1)), the(measured, "transcoder", "frozen", (0, 1))
    assert skip.active_params == pytest.approx(2 * skip.l0 * 2 * D + 2 * D * D)
    assert plain.active_params == pytest.approx(2 * plain.l0 * 2 * D)


def test_who_reads_what_the_mlp_writes_needs_the_mlp() -> None:
    """An SAE and the identity count its weights as at work on every token; neurons are chosen by all of W_in."""
    target, tokens, mlp = make_tiny(2), each_by_itself(some_tokens()), 2 * D * H
    measured = evaluate(target, all_methods(target, range(2)), tokens)
    for protocol in PROTOCOLS[1:]:
        sae = the(measured, "sae", protocol, (0, 1))
        assert sae.active_params == pytest.approx(2 * sae.l0 * 2 * D + 2 * mlp)
        assert sae.gate_params == 2 * (F * (D + 1) + mlp)
        assert the(measured, "identity", protocol, (0, 1)).active_params == 2 * mlp
        assert the(measured, "neurons", protocol, (0, 1)).gate_params == 2 * D * H
        assert the(measured, "transcoder", protocol, (0, 1)).gate_params == 2 * F * (D + 1)
    one = the(measured, "sae", "single", (1,))
    assert one.active_params == pytest.approx(one.l0 * 2 * D + mlp)


def test_identity_costs_exactly_nothing_and_full_neurons_almost() -> None:
    target, tokens = make_tiny(2), some_tokens()
    measured = evaluate(
        target, [IdentityReplacement(range(2)), NeuronsReplacement(target, range(2), H)], each_by_itself(tokens)
    )
    for p in measured.points:
        if p.method == "identity":
            assert (p.ce_degradation, p.ce_low, p.ce_high, p.kl, p.fvu, p.tail_max) == (0,) * 6
            assert p.ce_recovered_zero == 1
        else:
            assert abs(p.ce_degradation) < 1e-4 and p.l0 == H


def slow(
    target: TargetModel, replacement: Replacement, tokens: Tensor, protocol: str, layers: list[int]
) -> dict[str, float]:
    """The definition, without sharing, batching or streaming."""
    captured = clean(target, tokens, list(replacement.layers))
    opened = {"free": replacement.begin, "gates": lambda: replacement.gated(captured)}
    pass_ = opened.get(protocol, lambda: replacement.frozen(captured))()
    y_hat: dict[int, Tensor] = {}
    with torch.inference_mode():
        p, q = target.logits(tokens), replaced_logits(target, tokens, pass_, layers, y_hat.__setitem__)
    fvu, mse = [], []
    for layer in layers:
        y = captured.outputs[replacement.layers.index(layer)][:, 1:].flatten(0, 1)
        e = y - y_hat[layer][:, 1:].flatten(0, 1)
        fvu.append((e.square().sum() / (y - y.mean(0)).square().sum()).item())
        mse.append(e.square().mean().item())
    return {
        "ce": cross_entropy(q, tokens).mean().item(),
        "ce_degradation": (cross_entropy(q, tokens) - cross_entropy(p, tokens)).mean().item(),
        "kl": kl_divergence(p, q).mean().item(),
        "fvu": sum(fvu) / len(fvu),
        "mse": sum(mse) / len(mse),
    }


@pytest.mark.parametrize("batch", [2, 64])
def test_the_ruler_equals_its_definition_for_every_method_and_protocol(batch: int) -> None:
    target, tokens, layers = make_tiny(3), some_tokens(5), (0, 1, 2)
    methods = all_methods(target, layers)
    measured = evaluate(target, methods, each_by_itself(tokens), batch=batch)
    assert len(measured.points) == len(methods) * (3 + 3)
    rows = iter(measured.points)
    for method in methods:
        for protocol, replaced_layers in [*(("single", [i]) for i in layers), *((p, layers) for p in PROTOCOLS[1:])]:
            p = next(rows)
            assert (p.method, p.protocol, p.layers) == (method.method, protocol, tuple(replaced_layers))
            for name, value in slow(target, method, tokens, protocol, list(replaced_layers)).items():
                assert getattr(p, name) == pytest.approx(value, rel=1e-3, abs=2e-5), (p.method, protocol, name)
            assert p.ce_low <= p.ce_degradation <= p.ce_high
            assert p.ce_recovered_zero is not None and p.ce_recovered_mean is not None


def test_the_ruler_measures_in_float32_on_every_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast bf16 decides how coders are trained and how winners are found, never what is measured."""
    target, tokens = make_tiny(3), some_tokens()
    replacements, tables = all_methods(target, range(3)), []
    for word in ("on", "off"):
        monkeypatch.setenv("NN_BF16", word)
        tables.append(evaluate(target, replacements, each_by_itself(tokens)).points)
    for on, off in zip(*tables):
        assert (on.method, on.protocol, on.layers, on.l0) == (off.method, off.protocol, off.layers, off.l0)
        assert on.ce == pytest.approx(off.ce, abs=1e-6) and on.kl == pytest.approx(off.kl, abs=1e-6)


def test_first_positions_are_not_counted() -> None:
    """A latent that fires on nothing but first positions is as good as silent."""
    target, tokens = make_tiny(1), some_tokens()
    tokens[:, 0], tokens[:, 1:] = 0, tokens[:, 1:].clamp_min(1)  # token 0 comes first and only there
    (coder,) = transcoders([0], Relu(0.0))
    x = clean(target, tokens, [0]).inputs[0]
    with torch.no_grad():
        coder.encoder.W_enc.zero_()
        coder.encoder.b_enc.fill_(-1)
        coder.encoder.W_enc[0] = x[0, 0] * 10  # one token, seen alone: the same input each time
        coder.encoder.b_enc[0] = -10 * x[0, 0] @ x[0, 0] + 1
    p = evaluate(target, [TranscoderReplacement([coder])], each_by_itself(tokens), ["frozen"]).points[0]
    assert (p.l0, p.bits_per_token, p.active_params) == (0, 0, 0)


def test_evaluation_leaves_model_and_random_state_alone() -> None:
    target, tokens = make_tiny(2), some_tokens()
    before, state = target.logits(tokens), torch.get_rng_state()
    first = evaluate(target, all_methods(target, range(2)), each_by_itself(tokens))
    assert torch.equal(target.logits(tokens), before) and torch.equal(torch.get_rng_state(), state)
    again = evaluate(target, all_methods(target, range(2)), each_by_itself(tokens))
    assert first[:3] == again[:3] and all(map(torch.equal, first.differences, again.differences))


def test_what_is_measured_so_far_is_the_measurement_of_the_first_sequences() -> None:
    target, tokens, seen = make_tiny(2), some_tokens(17), []
    replacements = all_methods(target, range(2))
    whole = evaluate(target, replacements, each_by_itself(tokens), batch=2, so_far=seen.append)
    assert [len(own.differences[0]) for own in seen] == [2, 4, 8]
    for own, n in ((seen[1], 4), (whole, 17)):
        expected = evaluate(target, replacements, each_by_itself(tokens[:n]), batch=2)
        assert own[:3] == expected[:3] and all(map(torch.equal, own.differences, expected.differences))
    evaluate(target, replacements, each_by_itself(tokens[:14]), batch=2, so_far=lambda _: pytest.fail("seven batches"))


def test_codes_at_native_sparsity_do_not_depend_on_the_batch() -> None:
    target, tokens = make_tiny(2), some_tokens(6)
    coders = [CLTReplacement(clt(range(2), BatchTopK(4))), TranscoderReplacement(transcoders(range(2)))]
    one, six = (evaluate(target, coders, each_by_itself(tokens), ["free"], batch=b).points for b in (1, 6))
    for a, b in zip(one, six):
        assert (a.l0, a.bits_per_token) == (b.l0, b.bits_per_token)
        assert a.ce == pytest.approx(b.ce, abs=1e-5)


def test_bootstrap_interval_contains_the_mean_and_shrinks_with_more_sequences() -> None:
    g = torch.Generator().manual_seed(0)
    widths = []
    for n in (16, 256, 4096):
        values = torch.randn(n, generator=g, dtype=torch.float64) + 3
        low, high = bootstrap_interval(values, document_draws(torch.arange(n), 1000, seed=0))
        assert low < values.mean().item() < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]
    assert widths[2] == pytest.approx(2 * 1.96 / math.sqrt(4096), rel=0.15)


def test_sequences_of_one_document_are_drawn_together() -> None:
    """Every sequence sixteen times: the interval is that of each once, and four times too narrow if documents are not known."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=g, dtype=torch.float64)
    once = bootstrap_interval(values, document_draws(torch.arange(64), 1000, seed=0))
    copies, numbers = values.repeat_interleave(16), torch.arange(64).repeat_interleave(16)
    assert bootstrap_interval(copies, document_draws(numbers, 1000, seed=0)) == pytest.approx(once, abs=1e-12)
    low, high = bootstrap_interval(copies, document_draws(torch.arange(1024), 1000, seed=0))
    assert 3.4 * (high - low) < once[1] - once[0] < 4.6 * (high - low)


def test_documents_of_any_length_weigh_by_their_sequences() -> None:
    draws = document_draws(torch.tensor([0, 0, 0, 1]), 4000, seed=0)
    means = draws.weights @ torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64) / draws.weights.sum(1)
    assert draws.n_documents == 2
    assert means.unique().tolist() == [1.0, 2.0, 5.0], "both the first, one of each, both the second"


def test_pairs_are_the_differences_of_rows_on_the_same_draws() -> None:
    target, text = make_tiny(2), HeldOutText(some_tokens(12), torch.arange(12) // 3)
    points, _, pairs, _ = evaluate(target, all_methods(target, range(2)), text)
    cost = {(p.method, p.k, p.protocol): p.ce_degradation for p in points if p.protocol != "single"}
    assert len(pairs) == 3 * math.comb(len(cost) // 3, 2)
    for pair in pairs:
        expected = cost[pair.method, pair.k, pair.protocol] - cost[pair.other, pair.other_k, pair.protocol]
        assert pair.difference == pytest.approx(expected, abs=1e-6) and pair.low <= pair.difference <= pair.high
    (same,) = [p for p in pairs if (p.method, p.other, p.protocol) == ("affine", "identity", "frozen")]
    (own,) = [p for p in points if (p.method, p.protocol) == ("affine", "frozen")]
    assert (same.low, same.high) == pytest.approx((own.ce_low, own.ce_high), abs=1e-6), "the identity costs nothing"


def test_binary_entropy_of_never_always_and_half() -> None:
    torch.testing.assert_close(binary_entropy(torch.tensor([0.0, 1.0, 0.5])), torch.tensor([0.0, 0.0, 1.0]))


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ValueError, match="no held-out sequences"):
        evaluate(make_tiny(1), [IdentityReplacement([0])], each_by_itself(torch.zeros(0, SEQ, dtype=torch.int64)))


def test_the_detail_names_what_was_active() -> None:
    detail = evaluate(
        make_tiny(1), [TranscoderReplacement(transcoders([0], Relu(0.0)))], each_by_itself(some_tokens()), ["free"]
    ).layers[0]
    assert (detail.layer, detail.module) == (0, "latents")
    assert detail.fired is not None and 0 < detail.fired <= 1
    assert 0 < detail.l0_median <= detail.l0_p95 <= F


def test_processes_that_share_the_batches_measure_what_one_does(small_target: TargetModel) -> None:
    """Bit by bit: each batch is computed by one thread, and sums are taken in the order of the batches."""
    layers = range(small_target.n_layers)
    replacements = [NeuronsReplacement(small_target, layers, 3), ZeroReplacement(layers), IdentityReplacement(layers)]
    tokens = torch.randint(small_target.vocab_size, (5, 16), generator=torch.Generator().manual_seed(0))
    text = HeldOutText(tokens, torch.arange(5))
    alone = evaluate(small_target, replacements, text, batch=1)
    torch.set_num_threads(2)
    together = evaluate(small_target, replacements, text, batch=1)
    torch.set_num_threads(1)
    assert alone[:3] == together[:3]
    assert all(torch.equal(a, b) for a, b in zip(alone.differences, together.differences))
