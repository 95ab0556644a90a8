"""The house stands where it should: no foreign module wins, every module is installed."""

import importlib
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_top_level_modules_are_the_repositorys_own() -> None:
    for file in REPOSITORY.glob("*.py"):
        module = importlib.import_module(file.stem)
        assert Path(module.__file__).resolve() == file.resolve(), f"{file.stem} was imported from {module.__file__}"


def test_every_module_is_installed() -> None:
    listed = (REPOSITORY / "pyproject.toml").read_text()
    missing = [file.stem for file in REPOSITORY.glob("*.py") if f'"{file.stem}"' not in listed]
    assert not missing, f"py-modules in pyproject.toml lacks {missing}"
