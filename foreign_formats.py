"""The formats of other libraries that this project knows, every dictionary that a folder in one of them holds, and the opening
of whatever a command line names: those, checkpoints of this project, and decompositions."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from checkpoints import (
    CONFIG,
    ENCODER,
    Checkpoint,
    Decomposition,
    TrainingRecord,
    check_target,
    load_checkpoint,
    resolve,
)
from foreign_files import NoSite, Place, fitted
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
from spd_runs import GateInputs, is_decomposition, load_decomposition
from target_models import TargetModel, at_site


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


def load_coders(reference: str, target: TargetModel, form: str, given: Place) -> list[Checkpoint]:
    """One checkpoint, or every dictionary of a folder in another library's format, on the target's device."""
    if form:
        found = import_dictionaries(form, reference, given)
        paths = [reference if len(found) == 1 else f"{reference}/{entry.name}" for entry in found]
        loaded = [
            Checkpoint(
                entry.coder.to(target.device).eval(), TrainingRecord.imported(path, target.name, entry.hooks), path
            )
            for entry, path in zip(found, paths)
        ]
    else:
        loaded = [load_checkpoint(reference, str(target.device))]
    for checkpoint in loaded:
        check_target(checkpoint, target)
        config = checkpoint.coder.config
        if outside := [i for i in config.layers if not 0 <= i < target.n_layers]:
            raise ValueError(f"{reference} is for layer {outside[0]}: {target.name!r} has {target.n_layers} from 0 on")
        if {config.d_in, config.d_out} != {target.d_model}:
            raise ValueError(f"{reference} reads {config.d_in} dimensions: {target.name!r} has {target.d_model}")
    return [replace(c, coder=fitted(c.coder, c.record.hooks, target).to(target.device)) for c in loaded]


class Opened(NamedTuple):
    """What the references of a command line hold."""

    target: TargetModel  # read and written at the site of the dictionaries
    coders: list[Checkpoint]
    decompositions: dict[str, Decomposition]  # by reference


class Named(NamedTuple):
    """What a command line names: folders, W&B artifacts, or runs of Goodfire's."""

    references: tuple[str, ...]
    format: str  # of another library; empty: our own
    place: Place  # of a foreign dictionary whose files do not say it

    def check(self) -> None:
        """Raises ValueError for what can be told to be wrong before anything is loaded."""
        if not self.references:
            raise ValueError("name at least one checkpoint: a folder or a W&B artifact")
        if twice := [reference for reference in self.references if self.references.count(reference) > 1]:
            raise ValueError(f"{twice[0]} was named {len(twice)} times: once is enough")
        if not self.format and (self.place.layer, self.place.site) != (None, None):
            raise ValueError(
                "--layer and --site are of foreign dictionaries, named with --format: ours say where they stand"
            )

    def open(self, target: TargetModel, *, unproven: bool, gate_inputs: GateInputs | None) -> Opened:
        """Raises ValueError for what is not of this target, and for dictionaries of several sites."""
        coders: list[Checkpoint] = []
        decompositions: dict[str, Decomposition] = {}
        for reference in self.references:
            if not self.format and is_decomposition(reference):
                decompositions[reference] = load_decomposition(
                    reference, target, unproven=unproven, gate_inputs=gate_inputs
                )
            else:
                coders += load_coders(reference, target, self.format, self.place)
        sites = {checkpoint.coder.config.site for checkpoint in coders} or {"mlp_out"}
        if len(sites) > 1 or (decompositions and sites != {"mlp_out"}):
            raise ValueError(
                f"these dictionaries stand at several sites ({', '.join(sorted(sites))}): take each by itself"
            )
        return Opened(at_site(target, sites.pop()), coders, decompositions)
