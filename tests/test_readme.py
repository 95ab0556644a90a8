"""The README says what is so: its example runs, its commands parse, every file of the project stands in its table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?<=python )[\w/]+\.py(?: [^`#\n]*)?", README)))


def run(arguments: list[str], folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "WANDB_MODE": "disabled"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_trains_and_measures(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert re.fullmatch(r"transcoder \(2,\) L0 1\d\.\d, ΔCE 0\.\d{3}\n", run(["-c", example], tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_file_and_options_that_it_has(command: str) -> None:
    file, *words = command.split()
    assert (REPOSITORY / file).exists()
    subcommand = [words[0]] if file == "interop.py" else []
    usage = run([file, *subcommand, "--help"], REPOSITORY)
    for option in (word.partition("=")[0] for word in words if word.startswith("--")):
        assert option in usage, f"{file} has no {option}"


def test_every_module_stands_in_the_table_once() -> None:
    table = README.partition("## What is where")[2].partition("## Formats")[0]
    named = re.findall(r"`(\w+\.py)`", table)
    assert sorted(named) == sorted(file.name for file in REPOSITORY.glob("*.py"))


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (REPOSITORY / link).exists(), link
