"""Location of one checkpoint: a published folder, or a file with weights, on this machine or in an object store; its classes."""

import csv
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from dis_scale.process.errors import StorageError, UserError, nearest
from dis_scale.process.progress import some
from dis_scale.storage.folder import WEB, Folder, locate, missing, open_folder
from dis_scale.sweep import Run, Sampled, Sweep, folder_around, state
from dis_scale.sweep.documents import WEIGHTS_FILE, LatentsManifest, PublishedManifest

PIPELINE_WEIGHTS = "backbone/diffusion_pytorch_model.safetensors"
"""Weights in an exported folder, by diffusers' name."""
MOST_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file, by its format."""


class _Names(BaseModel):
    label_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Located:
    """The file of a checkpoint's weights, and its sweep if it is in one."""

    folder: Folder
    name: str
    sweep: Sweep | None

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def published(self) -> Sampled | None:
        """Model and images seen of the checkpoint, if it is a published folder of its sweep."""
        if self.sweep is None:
            return None
        runs = {model: self.sweep.run(model) for model in self.sweep.recipe.models}
        counts = ((model, images) for model, run in runs.items() for images in state.published_counts(run))
        return next((Sampled(*each) for each in counts if runs[each[0]].published_at(each[1]) == self.folder), None)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, from its sweep's images or else from its file; empty without names or if it is unreadable."""
        return (class_names(self.sweep) if self.sweep else ()) or _names_in(self.folder, self.name)

    @contextmanager
    def fetched(self) -> Iterator[Path]:
        """Yield a local path of the file: its own, or a temporary copy's; Damaged if it differs from the folder's manifest."""
        manifest = None if _has_query(str(self)) else PublishedManifest.find(self.folder)
        data = manifest.read_file(self.folder, self.name) if manifest and self.name in manifest.files else None
        if self.folder.local:
            yield self.folder.local / self.name
            return
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / Path(_without_query(self.name)).name
            copy.write_bytes(self.folder.read(self.name) if data is None else data)
            yield copy


def find_checkpoint(at: str) -> Located:
    """Return the checkpoint at a path or URL, for a run's folder its newest; UserError if it does not exist."""
    folder = open_folder(at)
    a_file = not folder.local.is_dir() if folder.local else _has_query(at)  # a server answers also for what is behind it
    if not a_file and (counts := state.published_counts(Run(folder))):
        folder = Run(folder).published_at(counts[-1])
    if not a_file and (folder.local or PublishedManifest.exists(folder) or _has_files(folder)):
        manifest = PublishedManifest.find(folder)
        name = (manifest.stored_file(WEIGHTS_FILE) if manifest else None) or WEIGHTS_FILE
        if not manifest and folder.exists(PIPELINE_WEIGHTS):
            name = PIPELINE_WEIGHTS
    else:
        folder, name = locate(folder.url)
    around = folder_around(folder)
    if not _without_query(name) or not folder.exists(name):
        raise UserError(
            f"no checkpoint at {at}{missing(open_folder(at))}: expected a published or exported folder, a run of a sweep, a "
            f".safetensors file or a public .pt{_published_in(around) if around else ''}"
        )
    return Located(folder, name, Sweep.open(around.url) if around else None)


def _without_query(name: str) -> str:
    return name.partition("?")[0]


def _has_query(url: str) -> bool:
    return "?" in url and url.startswith(WEB)


def _has_files(folder: Folder) -> bool:
    """Return whether a URL is a folder's: a file lists at most itself. False for web servers, which would send the file."""
    return not folder.url.startswith("http") and bool({*folder.list()} - {folder.name})


def _published_in(folder: Folder) -> str:
    """Return words on what a sweep has published."""
    sweep = Sweep.open(folder.url)
    if not (models := [model for model in sweep.recipe.models if state.published_counts(sweep.run(model))]):
        return f"; {sweep} has published nothing yet"
    return f", such as {sweep.run(models[0]).folder}" + (f"; this sweep's models are {some(models)}" if len(models) > 1 else "")


def _names_in(folder: Folder, name: str) -> tuple[str, ...]:
    """Return the names of the classes in a safetensors file, from its header only: eight bytes for its length, then JSON."""
    if not _without_query(name).endswith(".safetensors"):
        return ()
    # Errors are reported when the file is opened; a server may support no ranges.
    with suppress(StorageError, ValueError, LookupError, TypeError, RecursionError):
        length = min(int.from_bytes(folder.read(name, 0, 8), "little"), MOST_HEADER_BYTES)
        description = json.loads(json.loads(folder.read(name, 8, 8 + length))["__metadata__"]["dis_scale"])
        return _Names.model_validate(description["sampling"]).label_names
    return ()


def class_names(sweep: Sweep) -> tuple[str, ...]:
    """Return the names of the classes of a sweep's images by label; empty without names, or before the latents are complete."""
    latents = state.find_latents(sweep.folder)
    return LatentsManifest.require(latents).made_from.label_names if latents else ()


def labels_in_words(names: Sequence[str], words: str | Sequence[str]) -> list[int]:
    """Return the labels of words, or of a text with commas between its words.

    Each word is a class name or a label; a name takes precedence. A name with a comma is in double quotes. UserError for others.
    """
    labels = list[int]()
    if isinstance(words, str):
        line = ", ".join(line.strip().removesuffix(",") for line in words.splitlines())
        words = [words] if words in names else [word.strip() for word in next(csv.reader([line], skipinitialspace=True), [""])]
    for word in words:
        if word not in names and not (word.isdecimal() and len(word) < 10):
            known = f", or names: {some(list(names))}" if names else ", for example 1,7"
            raise UserError(f"classes: got {word!r}{nearest(word, names)}, expected labels with commas between them{known}")
        label = names.index(word) if word in names else int(word)
        if names and label > len(names):  # the label after the last one is that of no class
            raise UserError(f"classes: got {word}, expected a label from 0 to {len(names) - 1}, or names: {some(list(names))}")
        labels.append(label)
    return labels
