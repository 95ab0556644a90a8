"""What prose quotes stands in the tables, and the tables are of code that was committed."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from quoted import matching, quoted, rows_of, shown

REPOSITORY = Path(__file__).parent.parent
EXPERIMENTS = REPOSITORY / "experiments"
HEADLINES = tomllib.loads((EXPERIMENTS / "headlines.toml").read_text())
CLAIMS = HEADLINES["claims"]
DECIMAL = r"(?<![\w.])[+-]?\d*\.\d+(?![\w.])"


def sentences(claim: dict[str, Any]) -> list[str]:
    """What a claim says, with its figures; once for each row where it is of several."""
    folder = REPOSITORY / claim["folder"]
    if "each" not in claim:
        return [quoted(text, folder) for text in claim["says"]]
    rows = matching(rows_of(folder / "points.csv"), claim["each"].split())
    return [
        re.sub(r"\{(\S+) (\S+)\}", lambda part, row=row: shown(row, part[1], part[2]), text)
        for text in claim["says"] for row in rows
    ]  # fmt: skip


def prose(file: str) -> str:
    """Its text without code and the table that table.py writes, lines joined."""
    text = (REPOSITORY / file).read_text().replace("\n  ", " ")
    text = re.sub(r"<!-- table.py writes.*?to here -->|```.*?```", "", text, flags=re.DOTALL)
    return " ".join(text.split())


@pytest.mark.parametrize("claim", CLAIMS, ids=[f"{claim['file']}-{i}" for i, claim in enumerate(CLAIMS)])
def test_prose_says_what_the_tables_say(claim: dict[str, Any]) -> None:
    missing = [sentence for sentence in sentences(claim) if " ".join(sentence.split()) not in prose(claim["file"])]
    assert not missing, f"{claim['file']} should say: {missing}"


@pytest.mark.parametrize("file", sorted(HEADLINES["other_figures"]))
def test_every_decimal_of_prose_is_quoted_from_a_table(file: str) -> None:
    text = prose(file)
    for claim in CLAIMS:
        for sentence in sentences(claim) if claim["file"] == file else ():
            text = text.replace(" ".join(sentence.split()), "")
    found = set(re.findall(DECIMAL, re.sub(r"\]\([^)]*\)", "]", text)))
    assert found == set(HEADLINES["other_figures"][file])


def test_headlines_have_no_figure_of_their_own() -> None:
    """All decimals are quoted; the table that they make is checked where experiments are."""
    for name, entry in HEADLINES["headlines"].items():
        assert not re.findall(DECIMAL, re.sub(r"\{[^{}]*\}", "", entry["headline"])), name
        assert quoted(entry["headline"], EXPERIMENTS / name / "output")


def test_every_readme_with_figures_of_its_own_has_claims() -> None:
    """But for those that a script writes whole, from its docstring and its tables."""
    listed = subprocess.run(
        ["git", "ls-files", "*README.md"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    by_hand = {
        file for file in listed.stdout.split()
        if re.match(r"README|experiments/README|assets/|experiments/exp_0(08|12)[^/]*/output/README", file)
    }  # fmt: skip
    assert by_hand <= {claim["file"] for claim in CLAIMS}


def test_committed_outputs_are_of_committed_code() -> None:
    """A commit with a + names code that nobody can check out; the list in headlines.toml is of those still to be made again."""
    listed = subprocess.run(["git", "ls-files", "*.json"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    blobs = {file: json.loads((REPOSITORY / file).read_text()) for file in listed.stdout.split()}
    commits = {
        file: blob.get("record", blob).get("commit") or "" for file, blob in blobs.items() if isinstance(blob, dict)
    }
    assert sorted(file for file, commit in commits.items() if commit.endswith("+")) == sorted(HEADLINES["dirty"])
    for table in REPOSITORY.glob("**/output/**/points.csv"):
        rows = rows_of(table)
        if "commit" in rows[0] and any(row["commit"].endswith("+") for row in rows):
            assert str(table.with_name("settings.json").relative_to(REPOSITORY)) in HEADLINES["dirty"], table


def test_committed_outputs_name_no_path_of_a_machine() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "*output/*.csv", "*output/*.json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {
        file: place.group() for file in listed.stdout.split()
        if (place := re.search(r'(?<![^\s",])/(tmp|home|root|work|Users)/[^",\s]*', (REPOSITORY / file).read_text()))
    }  # fmt: skip
    assert not found and listed.stdout


def test_a_figure_is_the_rounded_value_of_the_one_row_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text(
        "method,k,protocol,layers,ce_degradation,ce_low,ce_high\n"
        "clt,8,free,0 1,0.12345,0.1,0.2\nclt,8,frozen,0 1,0.9,0.8,1\nneurons,8,free,1,-0.25,-1,1\n"
    )
    (tmp_path / "settings.json").write_text('{"seconds": 90}')
    said = {
        "{clt k8 free: ce_degradation .3f}": "0.123", "{clt free: interval .2f}": "0.12 [0.10, 0.20]",
        "{neurons layer1: ce_degradation*4 +.1f}": "-1.0", "{clt layers=0~1 frozen: ce_degradation .1}": ".9",
        "{clt: mean ce_degradation .2f} and {clt: largest ce_degradation .1f}": "0.51 and 0.9",
        "{@settings.json: seconds/60 .1f} min": "1.5 min", "no figure": "no figure", "{neurons: ce_degradation .2}": "-.25",
    }  # fmt: skip
    for text, expected in said.items():
        assert quoted(text, tmp_path) == expected
    for wrong in ("{clt k8: ce_degradation .3f}", "{clt k9 free: ce_degradation .3f}", "{sae: ce_degradation .3f}"):
        with pytest.raises(ValueError, match="is said of [02] rows of .*points.csv: name one$"):
            quoted(wrong, tmp_path)


def test_another_table_is_told_from_the_one_that_is_quoted(tmp_path: Path) -> None:
    """A changed digit in the table changes what prose should say."""
    claim = next(claim for claim in CLAIMS if claim["file"] == "README.md")
    shutil.copytree(REPOSITORY / claim["folder"], tmp_path, dirs_exist_ok=True)
    table = tmp_path / "points.csv"
    table.write_text(re.sub(r",([0-9])\.([0-9])", lambda m: f",{9 - int(m[1])}.{m[2]}", table.read_text()))
    before, after = sentences(claim), sentences(claim | {"folder": str(tmp_path)})
    assert all(one != two for one, two in zip(before[1:], after[1:]))
