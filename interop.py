"""Dictionaries in the field's formats, both ways.

    python interop.py import FORMAT SRC DEST            foreign dictionaries become checkpoints, for measure.py
    python interop.py export FORMAT CHECKPOINT… DEST    checkpoints become files that another library's own loader opens
    python interop.py upload FOLDER REPO_ID             either goes to the Hugging Face hub, with a model card

Nothing is written before everything is read and found right.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from huggingface_hub import HfApi, get_token
from safetensors.torch import save_file

from checkpoints import Checkpoint, TrainingRecord, check_target, load_checkpoint, save_checkpoint, save_tensors
from config import Site
from foreign_files import NORMALISED, Place, fitted, hook_points, model_name, same_site
from foreign_formats import Dictionary, Files, format_named, import_dictionaries
from logs import atomic_path, errors_in_one_line, write_json
from target_models import TARGETS, TargetModel, load_target


def prove_hooks(checkpoint: Checkpoint, target: TargetModel) -> None:
    """Raises ValueError unless TransformerLens' hooks that an export names hold what the coder reads and writes of the target."""
    check_target(checkpoint, target)
    for hook in hook_points(checkpoint.coder.config):
        same_site(target, hook)


def is_named(checkpoint: Checkpoint) -> bool:
    """Whether its hooks need no proof: the stream's is one tensor on every model, or the file it comes from has named them."""
    named = hook_points(checkpoint.coder.config)
    return checkpoint.coder.config.site == "resid" or set(named) <= set(checkpoint.record.hooks)


def export_files(name: str, dictionaries: Sequence[Dictionary]) -> Files:
    """The files another library reads, with a model card; a lone dictionary needs no folder of its own."""
    write, names = format_named(name).write, [entry.name for entry in dictionaries]
    if write is None:
        raise ValueError(f"{name} is read, not written: choose another format")
    if not names:
        raise ValueError("name at least one checkpoint to export")
    files = write(dictionaries)
    if twice := [own for own in names if names.count(own) > 1 and any(path.startswith(f"{own}/") for path in files)]:
        raise ValueError(f"several dictionaries are called {twice[0]!r}, each needs a folder: export them apart")
    folders = {path.rpartition("/")[0] for path in files}
    if folders == {dictionaries[0].name}:
        files = {path.removeprefix(f"{dictionaries[0].name}/"): value for path, value in files.items()}
    return files | {"README.md": model_card(name, dictionaries)}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name of `folder` once all is in it, so that a killed writer leaves none of that name.

    Raises ValueError where something is already there, or where nothing can take the name, as that of a mounted disk.
    """
    if folder.is_mount():
        raise ValueError(f"{folder} is a disk of its own: name a folder in it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another destination")
    with atomic_path(folder.resolve()) as temporary:
        yield temporary


def write_files(folder: Path, files: Files) -> None:
    """All files in a folder that is new, or empty; raises ValueError where something is already there."""
    with new_folder(folder) as temporary:
        for name, value in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            match path.suffix:
                case ".pt":
                    save_tensors(path, {key: tensor.contiguous() for key, tensor in value.items()})
                case ".safetensors":
                    save_file({key: tensor.contiguous() for key, tensor in value.items()}, path)
                case ".json":
                    write_json(path, value)
                case _:
                    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False))


def model_card(format_name: str, dictionaries: Sequence[Dictionary]) -> str:
    """README.md of a hub repository: what each dictionary reads and writes, its rule and its size."""
    target = model_name(dictionaries[0].target)
    library = {"saelens": "saelens", "circuit-tracer": "circuit-tracer"}.get(format_name, "nn_decompositions")
    front = {
        "library_name": library,
        "tags": ["mechanistic-interpretability", "sparse-dictionary", "nn_decompositions"],
    }
    front |= {"base_model": target} if "/" in target else {}
    rows = [
        f"| {name} | {type(c.config).__name__.removesuffix('Config')} | {', '.join(map(str, c.config.layers))} | "
        f"{c.config.d_in} → {c.config.d_dict} → {c.config.d_out} | {c.config.rule} |"
        for name, _, c, _ in dictionaries
    ]
    heading = f"# Sparse dictionaries of {target or 'an unnamed model'} ({format_name} format)"
    note = "Trained and measured with nn_decompositions. Scales are folded: inputs and outputs are raw activations."
    table = ["| dictionary | kind | layers | widths | rule |", "|---|---|---|---|---|", *rows]
    return "\n".join(["---", yaml.safe_dump(front).strip(), "---", "", heading, "", note, "", *table, ""])


def with_gains(found: Sequence[Dictionary], target: str) -> list[Dictionary]:
    """The dictionaries as they are of the MLP's own input, which `ln2.hook_normalized` lacks the norm's gain of."""
    lacking = [entry.name for entry in found if any(hook.endswith(NORMALISED) for hook in entry.hooks)]
    if not lacking:
        return list(found)
    if not target:
        raise ValueError(f"{lacking[0]} reads {NORMALISED}, which lacks the norm's gain: name the --target that has it")
    model = load_target(target, "cpu")
    return [
        entry._replace(
            coder=fitted(entry.coder, entry.hooks, model),
            hooks=tuple(hook.replace(NORMALISED, "mlp.hook_in") for hook in entry.hooks),
        )
        for entry in found
    ]


def import_(
    format: str,
    source: str,
    destination: Path,
    layer: int | None = None,
    site: Site | None = None,
    target: str = "",
) -> None:
    """Turn foreign dictionaries into checkpoints.

    Args:
        format: upstream, saelens, sparsify, dictionary_learning, circuit-tracer or crosslayer-coding.
        source: Folder (or W&B artifact) with one dictionary, or with folders of them at any depth.
        destination: New folder; several dictionaries get a folder each, as they lay in the source.
        layer: Layer of the target, where the files do not say.
        site: What an SAE reads, where the files do not say.
        target: The target it belongs to, as measure.py's --target; needed, and loaded, where it reads ln2.hook_normalized.
    """
    found = with_gains(import_dictionaries(format, source, Place(layer, site)), target)
    with new_folder(destination) as temporary:
        for name, model, coder, hooks in found:
            folder = temporary if len(found) == 1 else temporary / name
            save_checkpoint(folder, coder, TrainingRecord.imported(name, target or model, hooks))
    print("\n".join(str(destination if len(found) == 1 else destination / entry.name) for entry in found))


def export(format: str, checkpoints: tuple[str, ...], destination: Path, target: str = "") -> None:
    """Turn checkpoints into another library's files.

    Args:
        format: upstream, saelens, sparsify, dictionary_learning or circuit-tracer.
        checkpoints: Folders or W&B artifacts.
        destination: New folder.
        target: The target they belong to, as measure.py's --target; empty: the one they say. It is loaded where the files
            name TransformerLens' hooks, some of which are other tensors on some models.
    """
    loaded = [load_checkpoint(reference, "cpu") for reference in checkpoints]
    unproven = [c for c in loaded if format_named(format).names_hooks and not is_named(c)]
    for name in dict.fromkeys(target or c.record.target for c in unproven):
        if name not in TARGETS and not name.startswith(("hf:", "tl:")):
            raise ValueError(
                f"{format} names hooks, which are other tensors on some models: name the --target, not {name!r}"
            )
        model = load_target(name, "cpu")
        for checkpoint in (c for c in unproven if (target or c.record.target) == name):
            prove_hooks(checkpoint, model)
    entries = [Dictionary(c.record.name, c.record.target, c.coder) for c in loaded]
    write_files(destination, export_files(format, entries))
    print(destination)


def upload(folder: Path, repo_id: str, private: bool = False, dry_run: bool = False) -> None:
    """Send an exported folder, or a checkpoint, to the Hugging Face hub with its model card.

    Args:
        folder: What `export` wrote, or a checkpoint.
        repo_id: OWNER/NAME.
        private: Create the repository private.
        dry_run: Only write the card and list what would be sent.
    """
    if not (folder / "README.md").exists():
        checkpoint = load_checkpoint(str(folder), "cpu")
        entry = Dictionary(checkpoint.record.name, checkpoint.record.target, checkpoint.coder)
        (folder / "README.md").write_text(model_card("nn_decompositions", [entry]))
    print("\n".join(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()))
    if not dry_run:
        if get_token() is None:
            raise ValueError(
                "the hub takes files only after a login: run `hf auth login`, or look first with --dry-run"
            )
        HfApi().create_repo(repo_id, private=private, exist_ok=True)
        print(HfApi().upload_folder(repo_id=repo_id, folder_path=folder))


def main(arguments: Sequence[str] | None = None) -> None:
    import tyro

    errors_in_one_line()
    app = tyro.extras.SubcommandApp()
    app.command(import_, name="import")
    app.command(export)
    app.command(upload)
    app.cli(args=arguments, description=__doc__, config=(tyro.conf.PositionalRequiredArgs,))


if __name__ == "__main__":
    main()
