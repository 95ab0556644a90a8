"""Theorems about the table, its CSV, dominance and the figures."""

import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pareto import (
    LayerPoint,
    ParetoPoint,
    dominates,
    front,
    markdown_table,
    read_layers,
    read_points,
    write_layers,
    write_points,
)
from pareto_figure import BASELINES, STYLES, _spread, base, draw, family

DESIGN = (
    "target, method, layers, k, seed, protocol, tokens, l0, l0_p95, l0_per_mlp, active_params, bits_per_token, ce, "
    "ce_degradation, ce_low, ce_high, ce_recovered_zero, ce_recovered_mean, kl, fvu, mse, dead, train_tokens, "
    "gate_params, train_seconds, checkpoint, commit"
)


def point(
    method: str = "transcoder", x: float | None = 8.0, y: float = 0.1, protocol: str = "free", **more: object
) -> ParetoPoint:
    default = ParetoPoint(
        "tiny", method, (0, 1), 8, 0, protocol, 1000, x, x, x, x, x, 2 + y, y, 0.9 * y, 1.1 * y, 0.9, None, 0.2, 0.1,
        1 / 3, None, 10**6, 1234, 1.5, "checkpoints/a b", "abc", 0.5, 0.75,
    )  # fmt: skip
    return dataclasses.replace(default, **more)


def test_columns_are_those_of_the_plan_and_the_tail_after_them(tmp_path: Path) -> None:
    write_points(tmp_path / "points.csv", [])
    assert (tmp_path / "points.csv").read_text() == DESIGN.replace(" ", "") + ",tail_p999,tail_max\n"
    assert read_points(tmp_path / "points.csv") == []


numbers = st.one_of(st.none(), st.floats(allow_nan=False))
text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)


@given(
    x=numbers,
    mse=numbers,
    y=st.floats(allow_nan=False),
    k=st.none() | st.integers(),
    layers=st.lists(st.integers(0, 99)),
    name=text,
)
def test_csv_round_trip_is_exact(
    tmp_path_factory: pytest.TempPathFactory,
    x: float | None,
    mse: float | None,
    y: float,
    k: int | None,
    layers: list[int],
    name: str,
) -> None:
    path = tmp_path_factory.mktemp("csv") / "points.csv"
    points = [
        point(x=x, ce=y, k=k, layers=tuple(layers), checkpoint=name, mse=mse),
        point("clt-topk", 1e-300, 0.1 + 0.2),
    ]
    write_points(path, points)
    assert read_points(path) == points


def test_layer_rows_round_trip(tmp_path: Path) -> None:
    rows = [
        LayerPoint("tiny", "clt", (1,), 4, None, "single", "", 0, "latents", 0.1, 3, 7, 0.5, None, None, None, None),
        LayerPoint("tiny", "mean", (1,), None, None, "free", "", 1, "", None, None, None, None, 1 / 7, 2.0, 3.0, 4.0),
    ]
    write_layers(tmp_path / "layers.csv", rows)
    assert read_layers(tmp_path / "layers.csv") == rows


def test_a_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("target,method\ntiny,clt\n")
    with pytest.raises(ValueError, match="columns of a ParetoPoint"):
        read_points(tmp_path / "points.csv")


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(coordinates: list[tuple[int, int]]) -> None:
    points = [point(x=float(x), y=float(y)) for x, y in coordinates]
    best = front(points, "l0")
    assert best == sorted(best, key=lambda p: p.l0)
    assert not any(dominates(a, b, "l0") for a in best for b in best)
    assert all(p in best or any(dominates(q, p, "l0") for q in best) for p in points)
    assert not any(dominates(p, p, "l0") for p in points)


def test_a_point_without_the_axis_is_on_no_front() -> None:
    assert front([point("mean", None), point()], "l0") == [point()]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.3))
def test_labels_never_overlap_and_move_no_more_than_they_must(anchors: list[float], gap: float) -> None:
    places = _spread(anchors, gap)
    ordered = sorted(places)
    assert all(b - a >= gap * (1 - 1e-9) for a, b in zip(ordered, ordered[1:]))
    assert sorted(range(len(places)), key=lambda i: (anchors[i], i)) == sorted(
        range(len(places)), key=places.__getitem__
    )
    assert math.isclose(sum(places), sum(anchors), abs_tol=1e-6)  # least squares leaves the mean where it is
    if all(b - a >= gap for a, b in zip(sorted(anchors), sorted(anchors)[1:])):
        assert places == pytest.approx(anchors)


def test_every_method_has_one_colour_and_marker_of_its_own() -> None:
    for column in zip(*STYLES.values()):
        assert len(set(column)) == len(STYLES)
    assert {"sae", "transcoder", "clt", "spd", "neurons", *BASELINES, "identity"} == {*STYLES, *BASELINES, "identity"}
    assert (
        base("spd-delta-0.5") == "spd"
        and family("spd-delta-0.5") == "spd-delta"
        and family("transcoder-topk") == "transcoder-topk"
    )


def test_a_figure_comes_from_the_csv_alone_also_with_gains_and_missing_columns(tmp_path: Path) -> None:
    points = [
        point(k=k, x=float(k), y=1 / k, protocol=protocol)
        for k in (4, 8, 16)
        for protocol in ("single", "frozen", "free")
    ]
    points += [
        point("clt", 5.0, -0.01),
        point("spd-0.5", 3.0, 0.2, k=None),
        point("zero", None, 1.5),
        point("identity", None, 0.0),
    ]
    write_points(tmp_path / "points.csv", points)
    for name in ("a.png", "b.png"):
        draw(read_points(tmp_path / "points.csv"), tmp_path / name, axes=["l0", "bits_per_token"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_the_table_leaves_empty_columns_out_and_carries_intervals() -> None:
    table = markdown_table(
        [point(dead=None), point("mean", None, 1.25, k=None)], ["method", "k", "l0", "ce_degradation", "dead"]
    )
    assert table.splitlines() == [
        "| method | k | L0 | ΔCE [95 %] |",
        "|:--|--:|--:|--:|",
        "| transcoder | 8 | 8.000 | 0.100 [0.090, 0.110] |",
        "| mean |  |  | 1.250 [1.125, 1.375] |",
    ]
