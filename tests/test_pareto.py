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
    markdown_table,
    read_layers,
    read_points,
    write_layers,
    write_points,
)
from pareto_figure import BASELINES, STYLES, _Mark, _marks, _spread, base, draw, family, front

DESIGN = (
    "target, method, layers, k, seed, protocol, tokens, l0, l0_p95, l0_per_mlp, active_params, bits_per_token, ce, "
    "ce_degradation, ce_low, ce_high, ce_recovered_zero, ce_recovered_mean, kl, fvu, mse, dead, train_tokens, "
    "gate_params, train_seconds, checkpoint, commit"
)


def point(
    method: str = "transcoder", x: float | None = 8.0, y: float = 0.1, protocol: str = "free", **more: object
) -> ParetoPoint:
    default = ParetoPoint(
        target="tiny", method=method, layers=(0, 1), k=8, seed=0, protocol=protocol, tokens=1000, l0=x, l0_p95=x,
        l0_per_mlp=x, active_params=x, bits_per_token=x, ce=2 + y, ce_degradation=y, ce_low=0.9 * y, ce_high=1.1 * y,
        ce_recovered_zero=0.9, ce_recovered_mean=None, kl=0.2, fvu=0.1, mse=1 / 3, dead=None, train_tokens=10**6,
        gate_params=1234, train_seconds=1.5, checkpoint="checkpoints/a b", commit="abc", tail_p999=0.5, tail_max=0.75,
        l0_by_layer=(x, 1 / 3) if x is not None else None,
    )  # fmt: skip
    return dataclasses.replace(default, **more)


def test_columns_are_those_of_the_plan_and_the_tail_after_them(tmp_path: Path) -> None:
    write_points(tmp_path / "points.csv", [])
    assert (tmp_path / "points.csv").read_text() == DESIGN.replace(
        " ", ""
    ) + ",tail_p999,tail_max,documents,l0_by_layer\n"
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
        LayerPoint(
            target="tiny", method="clt", layers=(1,), k=4, seed=None, protocol="single", checkpoint="", layer=0,
            module="latents", l0=0.1, l0_median=3, l0_p95=7, fired=0.5, fvu=None, mse=None, tail_p999=None, tail_max=None,
        ),
        LayerPoint(
            target="tiny", method="mean", layers=(1,), k=None, seed=None, protocol="free", checkpoint="", layer=1,
            module="", l0=None, l0_median=None, l0_p95=None, fired=None, fvu=1 / 7, mse=2.0, tail_p999=3.0, tail_max=4.0,
        ),
    ]  # fmt: skip
    write_layers(tmp_path / "layers.csv", rows)
    assert read_layers(tmp_path / "layers.csv") == rows


def test_a_column_that_is_unknown_or_missing_without_a_default_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "points.csv"
    write_points(file, [point()])
    whole = file.read_text()
    file.write_text(whole.replace("kl,", "kj,"))
    with pytest.raises(ValueError, match=r"points.csv: column 'kj' of a ParetoPoint is unknown: write it anew"):
        read_points(file)
    file.write_text("target,method\ntiny,clt\n")
    with pytest.raises(ValueError, match="column 'active_params' of a ParetoPoint is missing"):
        read_points(file)


def test_a_column_with_a_default_may_be_absent_and_columns_stand_in_any_order(tmp_path: Path) -> None:
    """Tables of before a metric was added can be read, and drawn again."""
    file = tmp_path / "points.csv"
    write_points(file, [point()])
    rows = [line.split(",") for line in file.read_text().splitlines()]
    file.write_text("\n".join(",".join(reversed(row[:-4])) for row in rows) + "\n")
    assert read_points(file) == [point(tail_p999=None, tail_max=None, documents=None, l0_by_layer=None)]


def test_a_row_without_active_parts_has_no_place(tmp_path: Path) -> None:
    """Both axes are logarithmic: SPD without components stands in the table alone."""
    nothing, some = point("spd-zero", 0.0), point("spd-random", 8.0)
    assert [m.x for m in _marks([nothing, some], "l0", "ce_degradation")] == [8.0]
    draw([nothing, some], tmp_path / "pareto.png")


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(coordinates: list[tuple[int, int]]) -> None:
    marks = [_Mark(x, y, y, y) for x, y in coordinates]
    best = front(marks)

    def dominates(a: _Mark, b: _Mark) -> bool:
        return a.x <= b.x and a.y <= b.y and (a.x, a.y) != (b.x, b.y)

    assert best == sorted(best) and len(set(best)) == len(best)
    assert set(best) == {m for m in marks if not any(dominates(other, m) for other in marks)}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.3))
def test_labels_never_overlap_and_move_no_more_than_they_must(anchors: list[float], gap: float) -> None:
    places = _spread(anchors, gap, top=math.inf)
    ordered = sorted(places)
    assert all(b - a >= gap * (1 - 1e-9) for a, b in zip(ordered, ordered[1:]))
    assert sorted(range(len(places)), key=lambda i: (anchors[i], i)) == sorted(
        range(len(places)), key=places.__getitem__
    )
    assert math.isclose(sum(places), sum(anchors), abs_tol=1e-6)  # least squares leaves the mean where it is
    if all(b - a >= gap for a, b in zip(sorted(anchors), sorted(anchors)[1:])):
        assert places == pytest.approx(anchors)
    lower, top = _spread(anchors, gap, top=0.5), 0.5
    assert lower == pytest.approx(
        [min(place, top - gap * above) for place, above in zip(places, ranks_from_top(places))]
    )


def ranks_from_top(places: list[float]) -> list[int]:
    """How many places are above each."""
    return [sum(other > place for other in places) for place in places]


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
