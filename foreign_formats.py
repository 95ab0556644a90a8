"""The formats of other libraries that this project knows, and every dictionary that a folder in one of them holds."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoints import CONFIG, ENCODER, resolve
from foreign_files import NoSite, Place
from foreign_readers import (
    Dictionary,
    Files,
    read_circuit_tracer,
    read_crosslayer_coding,
    read_dictionary_learning,
    read_saelens,
    read_sparsify,
    read_upstream,
)
from foreign_writers import (
    write_circuit_tracer,
    write_dictionary_learning,
    write_saelens,
    write_sparsify,
    write_upstream,
)


class Format(NamedTuple):
    marker: str  # the file that tells a dictionary's folder
    weights: str  # pattern of the files that lie beside it
    read: Callable[[Path, Place], list[Dictionary]]  # of one folder that holds the marker
    write: Callable[[Sequence[Dictionary]], Files] | None  # None: import only
    names_hooks: bool = False  # whether what is written names TransformerLens' hook points


FORMATS: dict[str, Format] = {
    "upstream": Format(CONFIG, ENCODER, read_upstream, write_upstream),
    "saelens": Format("cfg.json", "sae_weights.safetensors", read_saelens, write_saelens, names_hooks=True),
    "sparsify": Format("cfg.json", "sae.safetensors", read_sparsify, write_sparsify),
    "dictionary_learning": Format("config.json", "ae.pt", read_dictionary_learning, write_dictionary_learning),
    "circuit-tracer": Format("config.yaml", "*.safetensors", read_circuit_tracer, write_circuit_tracer, True),
    "crosslayer-coding": Format("cfg.json", "*.safetensors", read_crosslayer_coding, None),
}


def format_named(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: use one of {', '.join(FORMATS)}")
    return FORMATS[name]


def dictionary_folders(form: Format, root: Path) -> list[Path]:
    """The folders that hold the marker, at any depth; one without weights that has others beneath it is only their parent.

    Hidden folders are passed over, and what lies beneath a dictionary, as its checkpoints.
    """
    marked = [path.parent for path in sorted(root.rglob(form.marker), key=natural)]
    marked = [folder for folder in marked if not any(part.startswith(".") for part in folder.relative_to(root).parts)]
    whole = [folder for folder in marked if any(folder.glob(form.weights))]
    beneath = [folder for folder in marked if any(parent in whole for parent in folder.parents)]
    parents = [folder for folder in marked if folder not in whole and any(folder in other.parents for other in marked)]
    return [folder for folder in marked if folder not in beneath and folder not in parents]


def natural(path: Path) -> list[tuple[int, str]]:
    """A key that sorts layers.2 before layers.10."""
    return [(int(number or 0), word) for number, word in re.findall(r"(\d+)|(\D+)", str(path))]


def import_dictionaries(name: str, source: str, given: Place) -> list[Dictionary]:
    """Every dictionary of a folder (or W&B artifact), or of the folders in it at any depth; nothing is written.

    Of several, each is named by its folder, and one that stands at no site known here is passed over with a line.
    """
    form, root = format_named(name), resolve(source)
    if given.layer is not None and given.layer < 0:
        raise ValueError(f"--layer {given.layer} is no layer: they count from 0")
    folders = dictionary_folders(form, root)
    if not folders:
        raise ValueError(f"{source} holds no {form.marker}, nor does a folder in it: no {name} dictionary")
    if folders == [root]:
        found = form.read(root, given)
    else:
        each = given._replace(alone=len(folders) == 1)
        found = [entry for folder in folders for entry in read_one_of_many(form, root, folder, each)]
    if not found:
        raise ValueError(f"{source} holds {len(folders)} dictionaries, none at a site known here: name one with --site")
    for entry in found:
        check_given(entry, given)
    return found


def check_given(entry: Dictionary, given: Place) -> None:
    """Raises ValueError where a dictionary stands at another layer or site than it was said to, for its format knows better."""
    layers, site = entry.coder.config.layers, entry.coder.config.site
    if given.layer is not None and layers != (given.layer,):
        where = ", ".join(map(str, layers))
        raise ValueError(f"--layer {given.layer} was named, and {entry.name} is of layer {where}: leave --layer out")
    if given.site is not None and site != given.site:
        raise ValueError(f"--site {given.site} was named, and {entry.name} is a {entry.coder.config.kind} of {site}")


def read_one_of_many(form: Format, root: Path, folder: Path, given: Place) -> list[Dictionary]:
    try:
        found = form.read(folder, given)
    except NoSite as reason:
        print(f"passed over: {reason}")
        return []
    place = str(folder.relative_to(root))
    return [entry._replace(name=place if len(found) == 1 else f"{place}/{entry.name}") for entry in found]
