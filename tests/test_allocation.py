"""Theorems about parts shared out over layers, on small random models."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import SEQ, D, all_methods, clean, clt, each_by_itself, make_tiny, saes, some_tokens, transcoders
from torch import Tensor

from allocation import allocated, alone, by_layer, joint_threshold, jointly
from baselines import AffineReplacement, NeuronsReplacement, baselines
from checkpoints import Checkpoint, TrainingRecord
from coder_replacements import CLTReplacement, SAEReplacement, TranscoderReplacement, as_replacements
from config import BatchTopK, JumpReLU
from evaluation import evaluate
from replacement import Coded, CodedPass
from sparse_ops import from_dense, to_dense
from target_models import TargetModel

LAYERS = (0, 1, 2)


def with_k(target: TargetModel) -> list[Coded]:
    return [
        NeuronsReplacement(target, LAYERS, 5),
        TranscoderReplacement(transcoders(LAYERS)),
        TranscoderReplacement(transcoders(LAYERS, skip=True), top_k=3),
        SAEReplacement(saes(LAYERS)),
        CLTReplacement(clt(LAYERS)),
    ]


def unequal(target: TargetModel) -> TargetModel:
    """What the first MLP writes is eight times as large."""
    with torch.no_grad():
        target.model.h[0].mlp.down_proj.weight.mul_(8)
    return target


def test_every_method_with_a_k_has_its_joint_form_with_that_k_on_average() -> None:
    target, tokens = make_tiny(), some_tokens(12)
    for replacement in with_k(target):
        (joint,) = jointly(target, [replacement], tokens.split(4))
        assert joint.method == f"{replacement.method.removesuffix('-topk')}-joint" and joint.k == replacement.k
        point = evaluate(target, [joint], each_by_itself(tokens), ["frozen"]).points[0]
        assert point.l0 == pytest.approx(replacement.k, abs=0.02), replacement.method
        assert len(set(point.l0_by_layer)) > 1, replacement.method


def test_a_replacement_without_a_k_has_no_joint_form() -> None:
    target = make_tiny()
    assert jointly(target, [TranscoderReplacement(transcoders(LAYERS, JumpReLU(0.1)))], [some_tokens()]) == []


def test_a_size_is_the_norm_of_what_a_unit_of_the_part_writes() -> None:
    """Over all the layers that it writes to, each with its weight."""
    target, weights = make_tiny(), {0: 0.3, 1: 2.0, 2: 5.0}
    for replacement in with_k(target):
        for source in LAYERS:
            squared: Tensor | float = 0.0
            for layer in (j for j in LAYERS if j == source or (j > source and replacement.method == "clt")):
                parts = replacement.part_groups(LAYERS)[0].n_parts
                written = _written(replacement, source, layer, parts)
                squared = squared + weights[layer] * (written[1:] - written[:1]).square().sum(1)
            torch.testing.assert_close(replacement.sizes(source, weights), squared.sqrt())


def _written(replacement: Coded, source: int, layer: int, parts: int) -> Tensor:
    """What stands at `layer` where nothing is active, and where each part of `source` alone is, at 1."""
    units = torch.cat([torch.zeros(1, parts), torch.eye(parts)])
    pass_ = CodedPass(replacement, None)
    for other in LAYERS:
        values = units if other == source else torch.zeros_like(units)
        pass_.codes[other] = from_dense(values, values > 0)
    x = torch.zeros(parts + 1, D)
    with torch.inference_mode():
        return replacement.write(pass_, layer, x, x)


def test_what_is_kept_are_the_largest_scores_of_all_layers_and_tokens() -> None:
    target, tokens, k = make_tiny(), some_tokens(6), 4
    replacement, weights = NeuronsReplacement(target, LAYERS, k), {0: 0.5, 1: 2.0, 2: 1.0}
    sizes = {layer: replacement.sizes(layer, weights) for layer in LAYERS}
    theta = joint_threshold(target, replacement, sizes, tokens.split(2))
    with torch.inference_mode():
        x = clean(target, tokens, LAYERS).inputs[:, :, 1:].flatten(1, 2)
        contributions = [
            (target.hidden(i, x[i])[:, :, None] * target.down_weight(i).T).norm(dim=2) * weights[i] ** 0.5 for i in LAYERS
        ]  # fmt: skip
        kept = replacement.with_least({layer: theta / size for layer, size in sizes.items()})
        active = [to_dense(kept.encode(i, x[i], x[i])) != 0 for i in LAYERS]
    scores, active = torch.stack(contributions), torch.stack(active)
    assert active.sum() == k * len(LAYERS) * len(x[0]) - 1  # all but the smallest, at which θ stands
    assert scores[active].min() > scores[~active].max()


def test_what_a_layer_costs_alone_is_what_the_ruler_says() -> None:
    """KL per counted token, and squared error."""
    target, tokens = make_tiny(), some_tokens(6)
    for replacement in with_k(target):
        costs = alone(target, replacement, tokens.split(4))
        for point in evaluate(target, [replacement], each_by_itself(tokens), ["single"]).points:
            kl, squared = costs[point.layers[0]]
            assert kl == pytest.approx(point.kl * SEQ / (SEQ - 1), rel=1e-4), replacement.method
            assert squared == pytest.approx(point.mse * D, rel=1e-4), replacement.method


costs = st.lists(st.dictionaries(st.integers(1, 9), st.floats(0, 10), min_size=1, max_size=4), min_size=1, max_size=4)


@given(costs, st.integers(0, 40))
def test_the_allocation_is_the_best_of_all_that_fit(options: list[dict[int, float]], total: int) -> None:
    least = sum(min(own) for own in options)
    total = max(total, least)
    found = allocated(dict(enumerate(options)), total)
    fitting = [ks for ks in itertools.product(*options) if sum(ks) <= total]
    cheapest = min(sum(own[k] for own, k in zip(options, ks)) for ks in fitting)
    assert sum(own[found[i]] for i, own in enumerate(options)) == pytest.approx(cheapest)
    assert sum(found.values()) <= total


def test_coders_of_several_k_are_recombined_by_layer() -> None:
    """For each k between the least and the largest, natively trained coders of that mean k or less."""
    target, tokens = unequal(make_tiny()), some_tokens(8)
    record = TrainingRecord.imported("a coder", "random")
    found = [
        Checkpoint(coder, record, f"{k} of {coder.config.layer}")
        for k in (2, 4, 8, 16) for coder in transcoders(LAYERS, BatchTopK(k))
    ]  # fmt: skip
    mixed = by_layer(target, found, [tokens])
    assert [(m.method, m.k) for m in mixed] == [("transcoder-by_layer", 4), ("transcoder-by_layer", 8)]
    points = evaluate(target, [*as_replacements(found), *mixed], each_by_itself(tokens), ["single"]).points
    alone = {(p.method, p.k): 0.0 for p in points}
    for p in points:
        alone[p.method, p.k] += p.kl
    for m in mixed:
        assert sum(coder.k for coder in m.coders.values()) <= len(LAYERS) * m.k
        assert alone[m.method, m.k] <= alone["transcoder", m.k]


def test_one_threshold_serves_all_layers_and_parts() -> None:
    """A neuron's own is θ / (√λ ‖W_out‖), λ being what its layer costs alone for each unit of squared error."""
    target, tokens = make_tiny(), some_tokens(8)
    neurons = NeuronsReplacement(target, LAYERS, 5)
    (joint,) = jointly(target, [neurons], [tokens])
    costs = alone(target, neurons, [tokens])
    theta = torch.stack(
        [joint.least[i] * (costs[i].kl / costs[i].squared) ** 0.5 * target.down_weight(i).norm(dim=0) for i in LAYERS]
    )
    torch.testing.assert_close(theta, torch.full_like(theta, theta[0, 0].item()))


def test_a_layer_that_matters_more_gets_more_and_the_model_keeps_more() -> None:
    target, tokens = unequal(make_tiny()), some_tokens(16)
    equal = NeuronsReplacement(target, LAYERS, 8)
    both = [equal, *jointly(target, [equal], tokens.split(8))]
    measured = evaluate(target, both, each_by_itself(tokens), ["frozen", "free"])
    uniform, joint = measured.points[:2], measured.points[2:]
    for before, after in zip(uniform, joint):
        assert after.kl < 0.7 * before.kl, f"{before.kl=} {after.kl=}"
    assert joint[0].l0_by_layer[0] > 1.5 * max(joint[0].l0_by_layer[1:])


def test_a_layer_whose_output_nobody_feels_gets_nothing() -> None:
    target, tokens = make_tiny(), some_tokens(8)
    with torch.no_grad():
        target.model.h[1].mlp.down_proj.weight.zero_()
    joint = jointly(target, [NeuronsReplacement(target, LAYERS, 5)], [tokens])
    point = evaluate(target, joint, each_by_itself(tokens), ["frozen"]).points[0]
    assert point.l0_by_layer[1] == 0 and point.l0 == pytest.approx(5, abs=0.02)


def test_baselines_have_an_equal_k_and_one_threshold(small_target: TargetModel) -> None:
    found = baselines(small_target, (0, 1), (4, 8))
    assert [(r.method, r.k) for r in found][:4] == [
        ("neurons", 4), ("neurons", 8), ("neurons-joint", 4), ("neurons-joint", 8)
    ]  # fmt: skip


def test_a_joint_form_shares_its_tensors_and_leaves_the_first_alone() -> None:
    target, tokens = make_tiny(), some_tokens(8)
    for replacement in with_k(target):
        before = _rows(target, replacement, tokens)
        (joint,) = jointly(target, [replacement], [tokens])
        assert _rows(target, replacement, tokens) == before, replacement.method
        assert joint.layers == replacement.layers and joint.origin is replacement.origin


def _rows(target: TargetModel, replacement: Coded, tokens: Tensor) -> Sequence[object]:
    return evaluate(target, [replacement], each_by_itself(tokens), ["free"]).points


def test_all_methods_of_the_ruler_are_tried_here() -> None:
    coded = {type(r) for r in all_methods(make_tiny(), LAYERS) if isinstance(r, Coded)}
    assert coded == {type(r) for r in with_k(make_tiny())}


def test_what_baselines_fit_is_kept_for_the_next_run_of_equal_code_target_and_text(
    small_target: TargetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = baselines(small_target, (0, 1), (4, 8))
    with monkeypatch.context() as patch:
        patch.setattr("baselines.fit_affine", lambda _: pytest.fail("fitted again"))
        patch.setattr("baselines.jointly", lambda *_: pytest.fail("fitted again"))
        again = baselines(small_target, (0, 1), (4, 8))
    affine, as_before = (next(r for r in own if isinstance(r, AffineReplacement)) for own in (first, again))
    assert all(map(torch.equal, affine.maps, as_before.maps))
    for own, before in zip(again[2:4], first[2:4]):
        assert own.method == before.method == "neurons-joint" and own.least.keys() == {0, 1}
        assert all(torch.equal(own.least[layer], before.least[layer]) for layer in (0, 1))
    fitted = []
    monkeypatch.setattr("baselines.jointly", lambda target, equal: fitted.append(target) or jointly(target, equal))
    for other in (replace(small_target, fingerprint="another"), small_target):
        baselines(other, (0, 1), (4, 8))
    assert [target.fingerprint for target in fitted] == ["another"]
    monkeypatch.setattr("baselines.code_fingerprint", lambda: "other code")
    baselines(small_target, (0, 1), (4, 8))
    (Path(small_target.data.path) / "more.txt").write_text("another text")
    baselines(small_target, (0, 1), (4, 8))
    assert len(fitted) == 3
