"""The documents of a sweep, of a set of latents and of a listing: each stored JSON file as one frozen type.

Leases have their own (storage/lease.py). A path of a document is in sweep/__init__.py, the base of all in storage/document.py.
"""

import hashlib
import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from dis_scale.process.errors import Damaged
from dis_scale.recipe import LatentShape, Sampling
from dis_scale.storage.document import Document
from dis_scale.storage.manifest import Digest, Manifest, Sealed

NUMBERS = float | tuple[float, ...]
"""One number, or one for each channel."""
Tables = dict[str, dict[str, tuple[int, int]]]
"""Segment (start, end) of each parameter, by file."""


class Fields(BaseModel):
    """Base of the parts of documents."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- of the sweep


class TrackingIds(Document):
    """Ids of the sweep's runs in MLflow, by its URI."""

    NAME: ClassVar[str] = "tracking.json"
    uri: str
    experiment: str
    sweep: str
    """Id of the sweep's own run."""
    life: str = ""
    """Tag of the sweep's runs in any MLflow; a later sweep in the same folder has another."""
    models: dict[str, str] = Field(default_factory=dict)


class LastRay(Document):
    """The Ray that a sweep last ran on; the only trace of a Ray that the command started itself."""

    NAME: ClassVar[str] = "ray.json"
    address: str | None = None
    """URL of the dashboard of a Ray that the command started itself; None for a cluster."""
    host: str
    """Machine of the command's process; on a cluster the node of its Ray job."""
    gpus: int = 0
    """GPUs of the cluster."""
    kuberay: str | None = None
    """Name of the RayCluster, which KubeRay's operator sets in each pod; None elsewhere."""
    slurm: str | None = None
    """ID of the Slurm job; None elsewhere."""
    at: float = 0.0
    """Unix time, by this machine's clock, at which the sweep began there."""


class StageProgress(Document):
    """Progress of the last stage other than training: `done` of `total` units at a time (Unix seconds)."""

    NAME: ClassVar[str] = "progress.json"
    stage: str
    done: int
    total: int
    unit: str
    at: float

    def __str__(self) -> str:
        return f"{self.stage} {self.done:,} of {self.total:,} {self.unit}"


class LatentsPointer(Document):
    """The latents that a sweep uses, which sweeps below one root share."""

    NAME: ClassVar[str] = "latents.json"
    folder: str
    """Folder below the storage root."""
    vae: str
    """Identity of the VAE."""


class StoredClassifier(Manifest):
    """A small classifier that the sweep trained: an extractor, or the judge."""

    kind: str
    num_classes: int
    held_out_accuracy: float


# --- of a run


class Ended(Document):
    """Why a training ended before its last count."""

    NAME: ClassVar[str] = "ended.json"
    why: str


class Origin(Document):
    """The resume point from which a forked run begins."""

    NAME: ClassVar[str] = "origin.json"
    model: str
    images: int
    resume_point: str = ""
    """Name of its folder."""


class TrainedDevice(Document):
    """Kind of device that the run's last attempt trained on."""

    NAME: ClassVar[str] = "device.json"
    device: str


class FailedNodes(Document):
    """Failures of devices, by the name of their node."""

    NAME: ClassVar[str] = "failed_nodes.json"
    failures: dict[str, tuple[str, ...]]


class TimeSpent(Fields):
    """Sums from which the next attempt continues to count goodput, in seconds; `_at` is a Unix time."""

    first_at: float
    """When the run's first attempt was requested."""
    lasting_s: float = 0.0
    """Time in lasting steps."""
    worker_s: float = 0.0
    """Time of all workers in lasting steps; for a branch with its trunk's."""


class RunCost(Fields):
    """Cost of a run up to a checkpoint."""

    trained_on: tuple[str, ...] = ()
    """Models of the GPUs or processors of rank 0 in all attempts."""
    memory_gib: float | None = None
    """Peak memory of rank 0's process, the largest of all attempts."""
    goodput: float | None = None
    worker_hours: float | None = None
    """Time of all workers in lasting steps; for a branch with its trunk's."""


class RunState(Fields):
    """State of a training at a step boundary, beside its tensors."""

    model: str
    latents: str
    """Identity of the latents (`Latents.identity`)."""
    adam_step: int
    at: float
    """Unix time."""
    skipped: int = 0
    """Steps of the run that were skipped, since their gradients were not finite."""
    cost: RunCost = RunCost()
    spent: TimeSpent | None = None


class ResumePointManifest(Manifest):
    """A resume point: each file's segments as (start, end) by parameter."""

    images: int
    attempt: int
    world: int
    tables: Tables
    progress: RunState


class Segments(Document):
    """Sidecar of one rank's files in a resume point."""

    files: dict[str, Digest]
    tables: Tables


class ImportedFrom(Fields):
    """File from which published weights were imported."""

    name: str
    sha256: str


WEIGHTS_FILE = "weights.safetensors"
"""Published weights that are evaluated and sampled from: the exponential average."""


def file_of(name: str, attempt: int) -> str:
    """Return the file in which an attempt writes an average."""
    return f"{name.removesuffix('.safetensors')}-{attempt:04d}.safetensors"


class PublishedManifest(Manifest):
    """Published weights: averages at one count of images seen."""

    images: int
    attempt: int = 0
    """Attempt that wrote them, which is a part of the files' names."""
    progress: RunState | None = None
    """None for imported weights."""
    imported: ImportedFrom | None = None

    @property
    def cost(self) -> RunCost:
        """Cost of the run up to here; empty if it is not known."""
        return self.progress.cost if self.progress else RunCost()

    def stored_file(self, name: str) -> str | None:
        """Return the file of an average, None if it has none."""
        file = file_of(name, self.attempt)
        return file if file in self.files else None


class BadStepManifest(Manifest):
    """Dump of a step whose gradient was not finite."""

    images: int
    attempt: int


class BadStep(Document):
    """Facts of one rank about such a step; the rank's batch and weights are beside this file."""

    loss_by_pass: tuple[float, ...]
    """Mean loss of each forward pass."""
    gradient_norm: float
    weights: dict[str, tuple[int, int]]
    """Elements (start, end) of each weight that this rank has."""
    weights_not_finite: tuple[str, ...]


# --- of an evaluation


class Metrics(Document):
    """One evaluation: what was sampled and measured, and its costs. Written last."""

    NAME: ClassVar[str] = "metrics.json"
    model: str = ""
    images: int = 0
    time: float = 0.0
    """Unix time."""
    samples: int = 0
    labels: str = "balanced"
    sampling: Sampling
    ema_width: float | None = None
    precision: str = "fp32"
    metrics: tuple[str, ...]
    values: dict[str, float]
    left_out: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """Values of a jackknife by metric, each without one group of samples, for the errors of differences."""
    weights: dict[str, str] = Field(default_factory=dict)
    """Identity of each extractor's weights."""
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    """Worker seconds of each part, and its images per second and worker."""
    sampled_on: tuple[str, ...] = ()
    """Models of the GPUs or processors that sampled."""
    cost: RunCost = RunCost()
    """Cost of the training up to the checkpoint."""


class FloorMetrics(Document):
    """Distances of real images and of their reconstructions."""

    NAME: ClassVar[str] = "metrics.json"
    images: int
    time: float = 0.0
    values: dict[str, dict[str, float]]
    missing: dict[str, str] = Field(default_factory=dict)
    """Reason for each metric without a value."""


class Skipped(Document):
    """Why an evaluation, or the floor, could not be measured."""

    NAME: ClassVar[str] = "skipped.json"
    why: str


# --- of a set of latents, and of a listing


class EncodedBy(Fields):
    """The VAE of a set of latents: its identity, whether its moments have a log-variance, its shift and scale."""

    identity: str
    posterior: bool = True
    shift: NUMBERS
    scale: NUMBERS


class Encoding(EncodedBy):
    """VAE, kind of device and version of PyTorch that encode a set of latents."""

    latent: LatentShape
    sides: int = 2
    """Latents of an image: its own and, if 2, its mirror image's."""
    device: str
    torch: str


class LatentsBegun(Document):
    """Everything that decides the bytes of a set, stored when it is begun."""

    NAME: ClassVar[str] = "begun.json"
    device: str
    torch: str
    listing: str
    order: str | None = None


class Hardware(Document):
    """Kind of hardware that encodes a set."""

    NAME: ClassVar[str] = "hardware.json"
    hardware: str


class ChannelSums(Fields):
    """Sums over the unflipped images of a shard by channel, of posterior means (count, mean, M2) and of posteriors' variances."""

    count: int
    mean: tuple[float, ...]
    m2: tuple[float, ...]
    variance: tuple[float, ...]


class ShardSidecar(Document):
    """One latent shard: facts with their own hash, since no manifest has it before the set is complete."""

    size_bytes: int
    """Size of the tar."""
    facts_sha256: str = ""
    count: int
    sha256: str
    refused: tuple[str, ...]
    """Names of the images that were left out."""
    labels: dict[str, int]
    """Images by label."""
    sums: ChannelSums

    def signed(self) -> Self:
        """Return the facts with their hash."""
        return self.changed(facts_sha256=self._hash())

    @classmethod
    def parse(cls, data: bytes, where: str) -> Self:
        """Return the facts; Damaged if they differ from their hash."""
        sidecar = super().parse(data, where)
        if sidecar.facts_sha256 != sidecar._hash():
            raise Damaged(where, "its facts have another sha256 than it says")
        return sidecar

    def _hash(self) -> str:
        facts = self.model_dump(mode="json", exclude={"facts_sha256"})
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class ShardEntry(Fields):
    """A shard in the manifest."""

    name: str
    count: int
    size_bytes: int
    sha256: str

    @property
    def digest(self) -> Digest:
        return Digest(self.size_bytes, self.sha256)


class MadeFrom(Fields):
    """Images and settings from which a set of latents was made."""

    source: dict[str, Any]
    """Settings of the source."""
    listing: str
    """Hash of its entries."""
    order: str | None = None
    """Hash of the mixed order."""
    images: int = 0
    """Images of the source, the refused ones included."""
    resolution: int
    encoding: Encoding
    num_classes: int | None = None
    label_names: tuple[str, ...] = ()
    shard_images: int
    encode_images: int
    precision: str


class LatentsManifest(Sealed):
    """A complete set of latent shards."""

    made_from: MadeFrom
    mixing: dict[str, float]
    """Distinct labels of a batch, relative to those of independent images, by the number of images in the batch."""
    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    posterior_variance: tuple[float, ...]
    labels: dict[str, int]
    refused: tuple[str, ...]
    shards: tuple[ShardEntry, ...]

    @property
    def encoding(self) -> Encoding:
        return self.made_from.encoding

    @property
    def size_bytes(self) -> int:
        """Size of all shards."""
        return sum(shard.size_bytes for shard in self.shards)


LeftOutByReason = dict[str, tuple[int, str]]
"""Number of a source's files that are not images of the set, and the name of the first one, by reason."""


class ListingManifest(Manifest):
    """A listing: its parts as files, in order."""

    source: Any = None
    """The declaration of its source."""
    count: int
    sha256: str
    order: str | None = None
    """Hash of the mixed order, if its entries are in it."""
    label_names: tuple[str, ...] | None = None
    final_labels: tuple[int, ...] | None = None
    """Label of each id; None if each label is its id."""
    largest: int
    left_out: LeftOutByReason = Field(default_factory=dict)
    """Files that the source has beside its images."""
    version: str = ""
    """Version of the file that has the labels, if this is not the file of the images."""
