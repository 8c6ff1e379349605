"""All files of a sweep by what they are: one listing of its folder, behind `verify`, `gc` and `delete`."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from dis_scale.storage.document import Document
from dis_scale.storage.folder import Folder
from dis_scale.storage.manifest import Manifest
from dis_scale.sweep.documents import (
    BadStepManifest,
    FloorMetrics,
    Metrics,
    PublishedManifest,
    ResumePointManifest,
    StoredClassifier,
)


@dataclass(frozen=True)
class Kind:
    """A kind of folder in a sweep: its name, and the document without which its files count as nothing."""

    name: str
    pattern: str
    document: type[Document] | None = None


KINDS = (
    Kind("autoencoder", "vae(/[0-9a-f]{16})?", Manifest),
    Kind("classifier", "extractors/[^/]+(/[0-9a-f]{16})?", StoredClassifier),
    Kind("reference", "reference(/parts)?"),
    Kind("floor", "floor", FloorMetrics),
    Kind("lease", "leases/[^/]+|runs/(?P<model>[^/]+)/lease"),
    Kind("resume point", "runs/(?P<model>[^/]+)/resume/[^/]+", ResumePointManifest),
    Kind("published", "runs/(?P<model>[^/]+)/published/[^/]+", PublishedManifest),
    Kind("failed step", "runs/(?P<model>[^/]+)/evidence/[^/]+", BadStepManifest),
    Kind("evaluation", "evaluation/(?P<model>[^/]+)/[0-9]+(/.+)?", Metrics),
    Kind("other", "(?s).*"),
)


@dataclass(frozen=True)
class Stored:
    """One folder of a sweep: its kind, its model if it belongs to one, and the bytes of each file in it."""

    kind: Kind
    folder: Folder
    model: str | None
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        """Whether it has its document."""
        return self.kind.document is not None and self.kind.document.NAME in self.sizes


def walk(sweep: Folder, *, behind_links: bool = False) -> list[Stored]:
    """Return the folders of a sweep that have files, by path; folders behind links only if wanted."""
    sizes: dict[str, dict[str, int]] = defaultdict(dict)
    for path, size in sweep.tree(behind_links=behind_links).items():
        sizes[str(PurePosixPath(path).parent)][PurePosixPath(path).name] = size
    return [_part(sweep, path, sizes[path]) for path in sorted(sizes)]


def _part(sweep: Folder, path: str, sizes: dict[str, int]) -> Stored:
    kind, match = next((kind, match) for kind in KINDS if (match := re.fullmatch(kind.pattern, path)))
    return Stored(kind, sweep if path == "." else sweep / path, match.groupdict().get("model"), sizes)
