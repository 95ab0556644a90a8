"""The frame of every experiment: settings from the command line, and a report with table, figure and settings."""

import sys
import time
from pathlib import Path
from typing import Any

from evaluation import Measurement
from logs import errors_in_one_line, write_settings
from pareto import markdown_table, read_points, write_layers, write_points
from pareto_figure import draw

FIGURE = "![Pareto curves](pareto.png)"  # in a report, the table follows it


def write_report(
    folder: Path, measured: Measurement, settings: Any, title: str, text: str, began: float, device: str
) -> None:
    """points.csv, layers.csv, pareto.png, settings.json and a README with figure and table; prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    write_points(folder / "points.csv", measured.points)
    write_layers(folder / "layers.csv", measured.layers)
    write_settings(folder, settings, device, time.perf_counter() - began)
    (folder / "README.md").write_text(f"# {title}\n\n{text}\n\n{FIGURE}\n")
    replot(folder)


def replot(folder: Path) -> None:
    """Draw pareto.png and write the README's table from points.csv alone; prints the table."""
    points, readme = read_points(folder / "points.csv"), folder / "README.md"
    draw(points, folder / "pareto.png")
    table = markdown_table(points)
    readme.write_text(f"{readme.read_text().partition(FIGURE)[0]}{FIGURE}\n\n{table}\n")
    print(table)


def settings_for[S](presets: dict[str, S], doc: str | None) -> S:
    """The command line's settings; the preset of the named `--target` (or the first one) gives the defaults."""
    import tyro

    errors_in_one_line()
    named = dict(zip(sys.argv, sys.argv[1:])).get("--target", next(iter(presets)))
    preset = presets.get(named, next(iter(presets.values())))
    return tyro.cli(type(preset), default=preset, description=doc)
