"""Theorems about replacements, on a random two- or four-layer model."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from small import (
    C_DOWN,
    C_FC,
    SEQ,
    D,
    F,
    H,
    all_methods,
    clean,
    clt,
    decomposition,
    each_by_itself,
    make_tiny,
    randomise,
    run,
    saes,
    some_tokens,
    transcoders,
)
from torch import Tensor

from baselines import IdentityReplacement, MeanReplacement, NeuronsReplacement, ZeroReplacement, fit_affine
from checkpoints import Checkpoint, TrainingRecord
from coder import Coder
from coder_replacements import (
    CLTReplacement,
    SAEReplacement,
    TranscoderReplacement,
    as_replacement,
    as_replacements,
    deployed,
)
from config import BatchTopK, EncoderConfig, Gated, JumpReLU, Relu, TopK
from evaluation import evaluate
from patching import capture
from replacement import Coded, Origin, Pass, replaced_logits
from sparse_ops import to_dense
from spd_replacement import SPDReplacement
from target_models import TargetModel
from transcoder import build_transcoder


def test_identity_replacement_preserves_logits() -> None:
    target, tokens = make_tiny(), some_tokens()
    layers = range(target.n_layers)
    with torch.inference_mode():
        original = target.logits(tokens)
    identity = IdentityReplacement(layers)
    for pass_ in (identity.begin(), identity.frozen(clean(target, tokens, layers))):
        assert torch.equal(run(target, tokens, pass_, layers), original)
        assert torch.equal(run(target, tokens, pass_, [1]), original)


def test_zero_and_mean_write_zero_and_the_mean_but_not_at_the_first_position() -> None:
    target, tokens = make_tiny(1), some_tokens()
    with torch.inference_mode():
        block = target.model.h[0]
        h = target.model.wte(tokens)
        h = h + block.attn(block.rms_1(h))
        own = block.mlp(block.rms_2(h))
        for value, replacement in (
            (torch.zeros(D), ZeroReplacement([0])),
            (torch.ones(D), MeanReplacement([0], torch.ones(1, D))),
        ):
            written = torch.cat([own[:, :1], value.expand_as(own)[:, 1:]], 1)
            expected = target.model.lm_head(target.model.ln_f(h + written))
            torch.testing.assert_close(run(target, tokens, replacement.begin(), [0]), expected)


def test_a_failure_inside_a_patched_forward_leaves_the_model_unpatched() -> None:
    target, tokens = make_tiny(), some_tokens()

    class Fails(IdentityReplacement):
        def write(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
            if layer == 1:
                raise ValueError("deliberate")
            return torch.zeros_like(y)

    with torch.inference_mode():
        original = target.logits(tokens)
        with pytest.raises(ValueError, match="deliberate"):
            run(target, tokens, Fails(range(3)).begin(), range(3))
        assert torch.equal(target.logits(tokens), original)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in target.model.modules())


def test_an_mlp_that_nobody_reads_is_computed_at_first_positions_alone() -> None:
    """The logits are those of a replacement for which every MLP is computed in full."""
    target, tokens = make_tiny(), some_tokens()
    coders = [
        randomise(
            build_transcoder(EncoderConfig(layer=i, d_in=D, d_out=D, d_dict=F, rule=TopK(4)), torch.Generator()), i
        )
        for i in range(3)
    ]
    skims, reads = TranscoderReplacement(coders), TranscoderReplacement(coders)
    reads.reads_y = True
    seen: list[int] = []
    handles = [block.mlp.register_forward_hook(lambda _m, _a, y: seen.append(y.shape[1])) for block in target.model.h]
    with torch.inference_mode():
        assert torch.equal(*(run(target, tokens, r.begin(), range(3)) for r in (skims, reads)))
    for handle in handles:
        handle.remove()
    assert seen == [1] * 3 + [SEQ] * 3


def test_every_layer_is_replaced_by_its_own_function() -> None:
    target, tokens = make_tiny(), some_tokens()
    seen: list[tuple[int, Tensor]] = []
    means = torch.arange(3.0)[:, None].expand(3, D)
    with torch.inference_mode():
        replaced_logits(
            target, tokens, MeanReplacement(range(3), means).begin(), range(3), lambda i, y_hat: seen.append((i, y_hat))
        )
    assert [i for i, _ in seen] == [0, 1, 2]
    for i, y_hat in seen:
        assert (y_hat == i).all()


def test_frozen_free_and_single_agree_where_the_stream_is_still_clean() -> None:
    """In a one-layer model, and in the first layer of any."""
    tokens = some_tokens()
    for target in (make_tiny(1), make_tiny(3)):
        captured = clean(target, tokens, [0])
        for replacement in all_methods(target, [0]):
            free = run(target, tokens, replacement.begin(), [0])
            frozen = run(target, tokens, replacement.frozen(captured), [0])
            assert torch.equal(free, frozen), replacement.method


def test_free_codes_follow_the_replaced_stream_and_frozen_ones_do_not() -> None:
    target, tokens, layers = make_tiny(), some_tokens(), range(3)
    captured = clean(target, tokens, layers)
    for replacement in all_methods(target, layers):
        if isinstance(replacement, Coded):
            free, frozen = replacement.begin(), replacement.frozen(captured)
            run(target, tokens, free, layers)
            run(target, tokens, frozen, layers)
            x, y = (kept[2].flatten(0, 1) for kept in captured[:2])
            expected = to_dense(replacement.encode(2, x, y))
            assert torch.equal(to_dense(frozen.codes[2]), expected), replacement.method
            assert not torch.equal(to_dense(free.codes[2]), expected), replacement.method


def observed(target: TargetModel, tokens: Tensor, pass_: Pass, layers: Sequence[int]) -> dict[int, Tensor]:
    """What was written in place of each layer's output, first positions left out."""
    seen: dict[int, Tensor] = {}
    with torch.inference_mode():
        replaced_logits(target, tokens, pass_, layers, seen.__setitem__)
    return {layer: y_hat[:, 1:] for layer, y_hat in seen.items()}


def test_frozen_layers_write_what_each_writes_alone() -> None:
    """Whatever the method: codes, a skip, components and an affine map all read the clean stream."""
    target, tokens, layers = make_tiny(), some_tokens(), range(3)
    captured = clean(target, tokens, layers)
    spd = SPDReplacement(target, decomposition(target), top_k=4)
    for replacement in [*all_methods(target, layers), spd]:
        together = observed(target, tokens, replacement.frozen(captured), layers)
        for layer in layers:
            alone = observed(target, tokens, replacement.frozen(captured), [layer])[layer]
            torch.testing.assert_close(together[layer], alone, msg=f"{replacement.method} {layer}")


def test_gates_are_the_clean_passs_and_values_the_running_streams() -> None:
    target, tokens, layers = make_tiny(), some_tokens(), range(3)
    captured = clean(target, tokens, layers)
    for replacement in (r for r in all_methods(target, layers) if isinstance(r, Coded)):
        frozen, gated = replacement.frozen(captured), replacement.gated(captured)
        run(target, tokens, frozen, layers)
        run(target, tokens, gated, layers)
        clean_codes, codes = (to_dense(pass_.codes[2]) for pass_ in (frozen, gated))
        assert not codes[clean_codes == 0].any(), replacement.method
        both = (clean_codes != 0) & (codes != 0)
        assert both.sum() > 10 and (codes != clean_codes)[both].any(), replacement.method


@pytest.mark.parametrize("rule", [Relu(0.1), TopK(3), BatchTopK(3), JumpReLU(0.01), Gated(0.1)])
def test_where_a_latent_is_active_on_both_its_value_is_the_coders_own(rule: object) -> None:
    (coder,) = transcoders([0], rule)
    replacement, g = TranscoderReplacement([coder]), torch.Generator().manual_seed(3)
    x = torch.randn(40, D, generator=g)
    other = x + 0.3 * torch.randn(40, D, generator=g)
    on_x, on_other = replacement.encode(0, x, x), replacement.encode(0, other, other)
    moved, own = to_dense(replacement.values_at(0, other, other, on_x)), to_dense(on_other)
    both = (to_dense(on_x) != 0) & (own != 0)
    assert both.sum() > 40
    torch.testing.assert_close(moved[both], own[both])
    assert not moved[to_dense(on_x) == 0].any()


def test_where_all_parts_are_active_gates_are_free() -> None:
    """And `frozen` is neither: it is the values that differ."""
    target, tokens, layers = make_tiny(), some_tokens(), range(3)
    captured, open_ = clean(target, tokens, layers), transcoders(layers, TopK(F))
    with torch.no_grad():
        for coder in open_:
            coder.encoder.b_enc.fill_(100)
    spd = SPDReplacement(target, decomposition(target), top_k=max(C_FC, C_DOWN))
    for replacement in (TranscoderReplacement(open_), NeuronsReplacement(target, layers, H), spd):
        free = run(target, tokens, replacement.free(captured, lambda pass_: None), layers)
        torch.testing.assert_close(run(target, tokens, replacement.gated(captured), layers), free, rtol=1e-4, atol=1e-4)
    frozen = run(target, tokens, TranscoderReplacement(open_).frozen(captured), layers)
    free = run(target, tokens, TranscoderReplacement(open_).begin(), layers)
    assert not torch.allclose(frozen, free, rtol=1e-2, atol=1e-2)


def test_an_affine_map_that_reads_the_clean_stream_is_another_than_one_that_follows() -> None:
    target, tokens, layers = make_tiny(), some_tokens(), (0, 1, 2)
    (affine,) = [r for r in all_methods(target, layers) if r.method == "affine"]
    frozen, gates, free = evaluate(target, [affine], each_by_itself(tokens), ["frozen", "gates", "free"]).points
    assert gates.ce == free.ce != frozen.ce


def checkpoint(coder: Coder, **record: object) -> Checkpoint:
    own = dataclasses.replace(TrainingRecord.imported("a coder", "random"), **record)
    return Checkpoint(coder, own, f"{coder.config.layers}")


def test_coders_of_different_training_never_share_a_row() -> None:
    """Other tokens, another recipe, another seed: a row each, and none together when asked for."""
    first = [checkpoint(coder, train_tokens=100, recipe="lr 1") for coder in transcoders(range(2))]
    for other in ({"train_tokens": 200, "recipe": "lr 1"}, {"train_tokens": 100, "recipe": "lr 2"},
                  {"train_tokens": 100, "recipe": "lr 1", "seed": 1}):  # fmt: skip
        second = [checkpoint(coder, **other) for coder in transcoders(range(2))]
        found = as_replacements([first[0], second[0], second[1], first[1]])
        assert [r.layers for r in found] == [(0, 1), (0, 1)]
        told = [(r.origin.train_tokens, r.origin.seed) for r in found]
        assert told == [(100, 0), (other["train_tokens"], other.get("seed", 0))]
        with pytest.raises(ValueError, match="^a coder and a coder were trained differently: measure each as a"):
            as_replacement([first[0], second[1]])


def test_coders_of_one_k_each_stand_together_and_a_sweep_by_k() -> None:
    per_layer = [checkpoint(transcoders([layer], BatchTopK(k))[0]) for layer, k in enumerate((21, 8, 13))]
    (together,) = as_replacements(per_layer)
    assert together.layers == (0, 1, 2) and together.k is None
    sweep = [checkpoint(coder) for k in (4, 8) for coder in transcoders(range(2), BatchTopK(k))]
    assert [(r.layers, r.k) for r in as_replacements(sweep)] == [((0, 1), 4), ((0, 1), 8)]
    one_layer = [checkpoint(transcoders([1], BatchTopK(k))[0]) for k in (4, 8)]
    assert [(r.layers, r.k) for r in as_replacements(one_layer)] == [((1,), 4), ((1,), 8)]
    twice = [checkpoint(coder) for coder in [*transcoders(range(2)), *transcoders(range(2))]]
    assert [r.layers for r in as_replacements(twice)] == [(0, 1), (0, 1)]


def test_a_rule_other_than_batchtopk_is_told_by_the_method() -> None:
    rules = (BatchTopK(4), TopK(4), Relu(0.1), JumpReLU(0.1), Gated(0.1))
    assert [TranscoderReplacement(transcoders([0], rule, skip=True)).method for rule in rules] == [
        f"transcoder-skip{name}" for name in ("", "-per_token", "-relu", "-jumprelu", "-gated")
    ]
    assert CLTReplacement(clt(range(2), TopK(4)), top_k=2, variant="x").method == "clt-per_token-x-topk"


def test_dead_are_those_of_the_rows_layers_in_a_window_after_the_annealing() -> None:
    target, tokens, n = make_tiny(2), each_by_itself(some_tokens()), 1_000_000
    coders, both = transcoders(range(2)), clt(range(2))
    for encoder, silent in zip([*(c.encoder for c in coders), *both.encoders], (F, 0, F, 0)):
        encoder.tokens_since_fired[:silent] = n // 10
    origin = Origin(train_tokens=n)
    for replacement in (TranscoderReplacement(coders, origin=origin), CLTReplacement(both, origin=origin)):
        points = evaluate(target, [replacement], tokens, ["single", "free"]).points
        second = 0.5 if replacement.method == "clt" else 0.0  # a CLT's first layer writes to the second too
        assert [p.dead for p in points] == [1.0, second, 0.5]


def test_single_layer_of_a_clt_is_written_by_clean_codes_of_earlier_layers() -> None:
    target, tokens, coder = make_tiny(), some_tokens(), clt(range(3))
    captured = clean(target, tokens, range(3))
    x = captured.inputs.flatten(1, 2)
    replacement = CLTReplacement(coder)
    pass_ = replacement.frozen(captured)
    got: list[Tensor] = []
    with torch.inference_mode():
        replaced_logits(target, tokens, pass_, [1], lambda layer, y_hat: got.append(y_hat))
        coder.eval()
        expected = coder.decode_layer(1, [coder.encode_layer(0, x[0]), coder.encode_layer(1, x[1])])
    torch.testing.assert_close(got[0].flatten(0, 1), expected)
    assert set(pass_.active) == {(0, "latents"), (1, "latents")}
    assert [(m.layer, m.writes, m.part_parameters) for m in replacement.part_groups([1])] == [
        (0, 1, 2 * D),
        (1, 1, 2 * D),
    ]
    writes = [(m.layer, m.writes, m.part_parameters) for m in replacement.part_groups(range(3))]
    assert writes == [(0, 3, 4 * D), (1, 2, 3 * D), (2, 1, 2 * D)]


@pytest.mark.parametrize("rule", [Relu(0.1), TopK(3), BatchTopK(3), JumpReLU(0.01)])
def test_top_k_override_takes_the_largest_positive_pre_activations(rule: object) -> None:
    (coder,) = transcoders([0], rule)
    replacement = TranscoderReplacement([coder], top_k=6)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    pre = coder.encoder.pre_activations(x * coder.x_scale)
    expected = pre.relu() * torch.zeros_like(pre).scatter(1, pre.topk(6).indices, 1)
    torch.testing.assert_close(to_dense(replacement.encode(0, x, x)), expected)
    assert replacement.k == 6 and replacement.method == f"{TranscoderReplacement([coder]).method}-topk"
    assert coder.encoder.rule == rule and coder.training


@pytest.mark.parametrize("rule", [Relu(0.1), TopK(3), BatchTopK(3), JumpReLU(0.01), Gated(0.1)])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_deployed_view_holds_the_coders_own_tensors(rule: object, top_k: int | None) -> None:
    for coder in (transcoders([0], rule)[0], clt(range(2), rule)):
        own = dict([*coder.named_parameters(), *coder.named_buffers()])
        view = deployed(coder, top_k)
        shared = dict([*view.named_parameters(), *view.named_buffers()])
        assert shared.keys() <= own.keys() and all(value is own[name] for name, value in shared.items())
        assert not any(module.training for module in view.modules()) and all(e.training for e in coder.encoders)
    with pytest.raises(ValueError, match="k=99 exceeds d_dict"):
        deployed(coder, 99)


def test_top_k_override_opens_the_largest_gates() -> None:
    """Of a gated coder; where all may be open, the code is its own."""
    (coder,) = transcoders([0], Gated(0.1))
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    pre, whole = coder.encoder.pre_activations(x * coder.x_scale), to_dense(coder.encode(x))
    for k in (6, F):
        opened = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1)
        found = to_dense(TranscoderReplacement([coder], top_k=k).encode(0, x, x))
        torch.testing.assert_close(found, whole * opened)
    assert torch.equal(found, whole) and (whole > 0).sum() > 20 * 6


def test_a_replacement_never_mutates_its_coder() -> None:
    target, tokens, layers = make_tiny(), some_tokens(), range(3)
    coders: list[Coder] = [*transcoders(layers), *saes(layers), clt(layers)]
    before = [{key: value.clone() for key, value in coder.state_dict().items()} for coder in coders]
    for replacement in (
        TranscoderReplacement(coders[:3]),
        SAEReplacement(coders[3:6]),
        CLTReplacement(coders[6]),
        TranscoderReplacement(coders[:3], top_k=2),
    ):  # type: ignore
        run(target, tokens, replacement.begin(), layers)
    for coder, state in zip(coders, before):
        assert coder.training
        assert all(torch.equal(value, state[key]) for key, value in coder.state_dict().items())


def test_a_code_does_not_depend_on_neighbours() -> None:
    target, tokens, layers = make_tiny(), some_tokens(8), range(3)
    for replacement in all_methods(target, layers):
        together = run(target, tokens, replacement.begin(), layers)
        alone = run(target, tokens[2:3], replacement.begin(), layers)
        torch.testing.assert_close(together[2:3], alone, msg=replacement.method)


def test_all_neurons_are_the_mlp_and_fewer_are_the_largest_contributions() -> None:
    target, tokens = make_tiny(1), some_tokens()
    with torch.inference_mode():
        torch.testing.assert_close(
            run(target, tokens, NeuronsReplacement(target, [0], H).begin(), [0]), target.logits(tokens)
        )
    x = clean(target, tokens, [0]).inputs[0].flatten(0, 1)
    h, W = target.hidden(0, x), target.down_weight(0)
    contribution = (h[:, :, None] * W.T).norm(dim=2)
    kept = to_dense(NeuronsReplacement(target, [0], 5).encode(0, x, x)) != 0
    assert torch.equal(kept, torch.zeros_like(kept).scatter(1, contribution.topk(5).indices, True))


def test_affine_is_the_least_squares_fit_and_streams() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, D, generator=g) + 1
    y = torch.randn(2, 300, 5, generator=g)
    maps = fit_affine(zip(x.split(70, dim=1), y.split(70, dim=1)))
    torch.testing.assert_close(maps.y_mean, y.mean(1))
    for i in range(2):
        design = torch.cat([x[i], torch.ones(300, 1)], 1).double()
        solution = torch.linalg.lstsq(design, y[i].double()).solution.float()
        torch.testing.assert_close(maps.weight[i], solution[:D].T, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(maps.bias[i], solution[D], atol=1e-5, rtol=1e-4)


def test_affine_recovers_an_affine_map_also_from_inputs_that_span_less() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 200, 3, generator=g) @ torch.randn(1, 3, D, generator=g)
    W, b = torch.randn(1, D, 4, generator=g), torch.randn(1, 1, 4, generator=g)
    maps = fit_affine([(x, x @ W + b)])
    torch.testing.assert_close(x @ maps.weight.mT + maps.bias[:, None], x @ W + b, atol=1e-4, rtol=1e-4)


def test_two_coders_of_one_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one coder per layer, not layers \[0, 0\]"):
        TranscoderReplacement([*transcoders([0]), *transcoders([0])])


def test_capture_in_whatever_precision_gives_what_a_frozen_pass_needs() -> None:
    target, tokens = make_tiny(), some_tokens()
    replacement = TranscoderReplacement(transcoders(range(3)))
    logits = run(target, tokens, replacement.frozen(capture(target, tokens, range(3))), range(3))
    assert logits.isfinite().all()
