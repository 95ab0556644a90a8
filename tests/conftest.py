"""A small random target with a local corpus: everything a test needs, offline and in milliseconds."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shapes import check_shapes

os.environ.setdefault("WANDB_MODE", "disabled")
modules = [file.stem for file in Path(__file__).parents[1].glob("*.py") if file.stem != "sparse_triton"]
check_shapes([*modules, "folded", "recovered", "probes", "path_methods", "path_scores", "planted_circuit"])

from small import make_small_target, write_corpus  # noqa: E402

from logs import cache_folder  # noqa: E402
from target_models import TargetModel  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests fit is kept with them alone; the list of the environment's files is everybody's."""
    theirs, own = cache_folder(), tmp_path_factory.mktemp("cache")
    for name in ("corpus", "smollm2"):
        (theirs / name).mkdir(parents=True, exist_ok=True)
        (own / name).symlink_to(theirs / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NN_CACHE_HOME", str(own))
        yield


@pytest.fixture
def small_target(tmp_path: Path) -> TargetModel:
    folder = tmp_path / "corpus"
    folder.mkdir()
    return make_small_target(write_corpus(folder))
