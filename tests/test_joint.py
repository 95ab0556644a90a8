"""Theorems about one threshold over all layers, on small random models."""

from collections.abc import Sequence

import pytest
import torch
from small import D, all_methods, clean, clt, make_tiny, saes, some_tokens, transcoders
from torch import Tensor

from baselines import NeuronsReplacement, baselines
from coder_replacements import CLTReplacement, SAEReplacement, TranscoderReplacement
from config import JumpReLU
from evaluation import evaluate
from joint import jointly, layer_weights, threshold
from replacement import Coded, CodedPass
from sparse_ops import from_dense, to_dense
from target_models import TargetModel
from token_stream import each_by_itself

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
    target, weights, tokens = make_tiny(), {0: 0.3, 1: 2.0, 2: 5.0}, 4
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
    with torch.inference_mode():
        theta = threshold(target, replacement, sizes, tokens.split(2))
        x = clean(target, tokens, LAYERS).inputs[:, :, 1:].flatten(1, 2)
        contributions = [
            (target.hidden(i, x[i])[:, :, None] * target.down_weight(i).T).norm(dim=2) * weights[i] ** 0.5 for i in LAYERS
        ]  # fmt: skip
        kept = replacement.with_least({layer: theta / size for layer, size in sizes.items()})
        active = [to_dense(kept.encode(i, x[i], x[i])) != 0 for i in LAYERS]
    scores, active = torch.stack(contributions), torch.stack(active)
    assert active.sum() == k * len(LAYERS) * len(x[0]) - 1  # all but the smallest, at which θ stands
    assert scores[active].min() > scores[~active].max()


def test_a_layers_weight_is_what_its_error_costs_alone() -> None:
    """The table's KL of the layer alone over its squared error."""
    target, tokens = make_tiny(), some_tokens(6)
    for replacement in with_k(target):
        with torch.inference_mode():
            weights = layer_weights(target, replacement, tokens.split(4))
        for point in evaluate(target, [replacement], each_by_itself(tokens), ["single"]).points:
            assert weights[point.layers[0]] == pytest.approx(point.kl / (point.mse * D), rel=1e-3), replacement.method


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
