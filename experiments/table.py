"""The table of experiments in README.md: what each asks and found, and what it cost.

    python experiments/table.py        # writes the table anew, between its two marker lines

A question is the first line of the script that bears its folder's name; what it found is said in headlines.toml, with figures
that `quoted` reads from the output; cost, date and commit are those of the output's settings.json (+: the working tree
differed from the commit).
"""

import ast
import json
import tomllib
from pathlib import Path
from typing import Any

from quoted import quoted

from logs import atomic_path, read_csv

HERE = Path(__file__).parent
BEGIN, END = "<!-- table.py writes from here -->", "<!-- to here -->"
HEAD = "| | question | headline on `tiny` | figure | cost | date, commit |\n|---|---|---|---|---|---|"


def question(folder: Path) -> str:
    """The first line of an experiment's script; headlines.toml has it where an experiment is several scripts."""
    script = folder / f"{folder.name.split('_', 2)[2]}.py"
    return (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]


def records(output: Path) -> list[dict[str, Any]]:
    """settings.json of an experiment, or of each of its parts; none where an output is older than that file."""
    whole = output / "settings.json"
    files = [whole] if whole.exists() else sorted(output.glob("*/settings.json"))
    return [json.loads(file.read_text()) for file in files]


def seconds(output: Path, settings: list[dict[str, Any]]) -> float:
    """Of all parts together. exp_012's toys ran one by one: points.csv has the seconds of each, settings.json of the last."""
    rows = read_csv(output / "points.csv") if (output / "points.csv").exists() else []
    if rows and "toy" in rows[0]:
        return sum({row["toy"]: float(row["seconds"]) for row in rows}.values())
    return sum(part["seconds"] for part in settings)


def table_row(folder: Path, entry: dict[str, str]) -> str:
    output, number = folder / "output", folder.name.split("_")[1]
    settings = records(output)
    cost = f"{seconds(output, settings) / 60:.0f} min, {settings[0]['device']}" if settings else "–"
    when = sorted({f"{part['date']}, {part['commit']}" for part in settings})
    image = f"{folder.name}/output/{entry.get('figure', 'pareto.png')}"
    cells = (f"[{number}]({folder.name}/output/README.md)", entry.get("question") or question(folder),
             quoted(entry["headline"], output), f'<img src="{image}" width="180">', cost, "; ".join(when) or "–")  # fmt: skip
    return f"| {' | '.join(cells)} |"


def with_table(readme: str) -> str:
    """The README's text with the table as it should be now."""
    assert BEGIN in readme and END in readme, f"README.md lacks the lines {BEGIN} and {END}"
    headlines = tomllib.loads((HERE / "headlines.toml").read_text())["headlines"]
    rows = [table_row(folder, headlines[folder.name]) for folder in sorted(HERE.glob("exp_*"))]
    before, after = readme.partition(BEGIN)[0], readme.partition(END)[2]
    return "\n".join([f"{before}{BEGIN}", HEAD, *rows, f"{END}{after}"])


if __name__ == "__main__":
    with atomic_path(HERE / "README.md") as temporary:
        temporary.write_text(with_table((HERE / "README.md").read_text()))
