"""Checks of this machine for a recipe: each part is good, bad with its cure, or not needed. Behind `dis-scale doctor`.

A sweep makes the same checks itself. Heavy libraries are imported in the checks, so that a missing one is a finding.
"""

import os
import platform
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from dis_scale.models import families
from dis_scale.process.errors import DisScaleError, UserError
from dis_scale.process.redaction import redact
from dis_scale.recipe import ExportedExtractor, ExportedVae, InceptionExtractor, PretrainedVae, Recipe, Train
from dis_scale.storage.folder import Folder
from dis_scale.training.devices import check_device, device_of, smallest_gpu_bytes, usable_gpus

State = Literal["good", "bad", "not needed"]
DRIVER = Path("/proc/driver/nvidia/version")
PROBE_BYTES = 16 * 2**20
INSTALL = "make venv"
SCANS: list[str] = [name for name in get_args(Train.model_fields["scan"].annotation) if name != "auto"]
"""Backends of the scan. The scan's own list would need PyTorch, which may be what is broken."""


class Result(NamedTuple):
    """Outcome of a check that did not fail."""

    words: str
    needed: bool = True


@dataclass(frozen=True)
class Finding:
    """One part of the machine."""

    part: str
    state: State
    words: str


def _scan_problem(name: str, device: str) -> DisScaleError | None:
    from dis_scale.scan import problem  # needs PyTorch

    return problem(name, device)


@dataclass(frozen=True)
class Here:
    """Facts of this machine that are queried, not tried."""

    gpus: Callable[[], tuple[int, str]] = usable_gpus
    gpu_bytes: Callable[[], int] = smallest_gpu_bytes
    scan_problem: Callable[[str, str], DisScaleError | None] = _scan_problem
    version: Callable[[str], str] = metadata.version


@dataclass(frozen=True)
class Needs:
    """A recipe, and the storage root that its sweep would use, on this machine."""

    recipe: Recipe
    store: Folder
    here: Here = field(default_factory=Here)

    @cached_property
    def gpus(self) -> tuple[int, str]:
        """Number of GPUs here that PyTorch can use, and the fault of others."""
        return self.here.gpus()

    @property
    def device(self) -> str:
        """Device that the recipe's sweep computes on here."""
        return device_of(self.recipe, self.gpus[0])[0]


Check = Callable[[Needs], Result]
"""Tries one part."""


def checks() -> dict[str, Check]:
    """Return the check of each part but Ray, by the part's name."""
    parts: dict[str, Check] = {"python": _python, "packages": packages, "torch": _torch, "gpu": _gpus}
    parts |= {f"scan {name}": partial(scan, name) for name in SCANS}
    parts |= {"deepspeed": _deepspeed, "storage": storage, "mlflow": mlflow, "extractors": extractors, "vae": vae}
    return parts


def tried(part: str, check: Check, needs: Needs) -> Finding:
    """Return the finding of a check. After any error the part is bad; this project's errors name their cure. A check deletes the
    files that it writes."""
    try:
        words, needed = check(needs)
    except Exception as error:
        kind = "" if isinstance(error, DisScaleError) else f"{type(error).__name__}: "
        cure = f"; install it again: {INSTALL}" if isinstance(error, ImportError) else ""
        return Finding(part, "bad", redact(f"{kind}{' '.join(str(error).split())}{cure}"))
    return Finding(part, "good" if needed else "not needed", words)


def _python(_: Needs) -> Result:
    return Result(platform.python_version())


def packages(needs: Needs) -> Result:
    """Compare the installed packages with the versions that the project allows."""
    from packaging.requirements import Requirement

    allowed = [Requirement(line) for line in metadata.requires("dis-scale") or []]
    allowed = [each for each in allowed if not each.marker]  # requirements of extras have one
    other = []
    for each in allowed:
        try:
            version = needs.here.version(each.name).partition("+")[0]
        except metadata.PackageNotFoundError:
            version = "none"
        if version == "none" or not each.specifier.contains(version, prereleases=True):
            other.append(f"{each.name} {version} instead of {each.specifier}")
    if other:
        raise UserError(f"{', '.join(other)}: {INSTALL}")
    return Result(f"all {len(allowed)} in versions that are allowed; the tested ones are in constraints.txt")


def _torch(_: Needs) -> Result:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU only"
    return Result(f"{torch.__version__}, built for {build}; {torch.get_num_threads()} threads")


def _gpus(needs: Needs) -> Result:
    """Let each GPU allocate memory and multiply."""
    import torch

    gpus, fault = needs.gpus
    if fault:
        raise UserError(fault)
    device, why = device_of(needs.recipe, gpus)
    if not gpus:
        if device == "cuda":
            raise UserError("no NVIDIA GPU, and the recipe names device cuda: set device to auto")
        return Result(f"no NVIDIA GPU; the device is {device} ({why})", needed=False)
    for number in range(gpus):
        check_device(torch.device("cuda", number))
    version = re.search(r"Kernel Module\s+(?:for \w+\s+)?(\S+)", DRIVER.read_text()) if DRIVER.exists() else None
    driver = f", driver {version[1]}" if version else ""
    each = f"{torch.cuda.get_device_name(0)}, {needs.here.gpu_bytes() / 2**30:.0f} GiB"
    return Result(f"{gpus} x {each}{driver}; the device is {device} ({why})")


def _models_on(needs: Needs, name: str) -> list[str]:
    """Return the models that use this backend: the recipe names it, or `auto` should select it on the recipe's device."""
    best, wanted = {"cpu": "native", "cuda": "triton"}[needs.device], needs.recipe.train.scan
    if name != (best if wanted == "auto" else wanted):
        return []
    return [model for model, settings in needs.recipe.models.items() if wanted in families.find(settings.kind).scans]


def scan(name: str, needs: Needs) -> Result:
    """Compare a backend with the reference, if it can run here: on a GPU at the sizes of the recipe's models, otherwise small."""
    import torch

    from dis_scale.scan import GPU_BACKENDS, selftest

    device, models = "cuda" if name in GPU_BACKENDS else "cpu", _models_on(needs, name)
    if device == "cuda" and not needs.gpus[0] and not models:
        return Result("for NVIDIA GPUs, and none is here: not verified", needed=False)
    if error := needs.here.scan_problem(name, device):
        if models:
            raise error
        return Result(str(error), needed=False)
    if models and needs.device == "cuda":
        for model in models:
            _verify_on_gpu(needs, model)
        return Result(f"equal to the definition on cuda at the sizes of the recipe's models: {', '.join(models)}")
    precisions = {needs.recipe.train_of(model).precision for model in models} or {"fp32"}
    for precision in precisions:
        selftest.verify(name, torch.device(device), torch.bfloat16 if precision == "bf16" else torch.float32)
    return Result(f"usable on {device}, equal to the definition{'; the recipe uses it' if models else ''}")


def _verify_on_gpu(needs: Needs, model: str) -> None:
    """Verify the kernels that a model's training on the most workers, and its sampling, select on this machine's smallest GPU.

    Triton caches the kernels that it compiles here, so the sweep reuses them.
    """
    import torch

    from dis_scale import models, vae
    from dis_scale.evaluation.sampling import verify_sampling
    from dis_scale.models.cost import price_model
    from dis_scale.training.lanes import forward_passes, image_counts
    from dis_scale.training.memory import plan_passes

    recipe, device = needs.recipe.for_model(model), torch.device("cuda")
    train, settings, world = recipe.train, recipe.models[model], recipe.train.most_workers
    sizes = settings, vae.planned_shape(recipe.vae, recipe.data.resolution), recipe.data.num_classes
    memory = needs.here.gpu_bytes(), recipe.evaluate.shared(needs.gpus[0] - world)
    cost = price_model(*sizes)
    count, keeps = plan_passes(model, cost, train, world, *memory)
    passes = [one for rank in range(world) for one in forward_passes(train.lanes, rank, world, count)]
    with torch.device("meta"):
        net = models.construct(*sizes, scan=train.scan, checkpointing=train.checkpointing)
    net.precision, net.keeps_states = train.precision, keeps
    models.verify_kernels(net, device, image_counts(passes, train.lane_images), training=True)
    for sampling in recipe.evaluate.samplings.values():
        verify_sampling(net, sampling, device)


def _deepspeed(needs: Needs) -> Result:
    import torch

    from dis_scale.training.profile import process_group

    with process_group(torch.device(needs.device)):
        return Result(f"{metadata.version('deepspeed')}, with a process group on {needs.device}")


def storage(needs: Needs) -> Result:
    """Try every operation that a sweep needs of storage, then time an object of 16 MiB and a listing."""
    needs.store.require_usable()
    probe, data, times_s = needs.store / f".probe-{uuid.uuid4().hex}", os.urandom(PROBE_BYTES), []
    try:
        for action in (lambda: probe.write("data", data), lambda: probe.read("data"), probe.list):
            began_s = time.monotonic()
            action()
            times_s.append(time.monotonic() - began_s)
    finally:
        probe.delete()
    write, read, listing = times_s
    return Result(
        f"{needs.store}: creates only if absent, lists what others write; writes {PROBE_BYTES / write / 1e6:,.0f} MB/s, reads "
        f"{PROBE_BYTES / read / 1e6:,.0f} MB/s, lists in {1000 * listing:,.1f} ms"
    )


def mlflow(needs: Needs) -> Result:
    """Read from the MLflow that tracks the recipe, if there is one."""
    from dis_scale.tracking import mlflow

    uri = needs.recipe.tracking.uri or mlflow.default_uri(needs.store)
    try:
        return Result(mlflow.require_usable(uri))
    except Exception as error:  # whatever MLflow raises
        why = " ".join(str(error).split())[:200]
        raise DisScaleError(f"{uri} does not answer: start it, or change tracking.uri; sweeps run without it ({why})") from error


def extractors(needs: Needs) -> Result:
    """Load the weights that the recipe does not train; Inception's are downloaded if it names no file."""
    from dis_scale.evaluation import features, inception

    loaded = []
    for extractor in needs.recipe.evaluate.extractors:
        if isinstance(extractor, InceptionExtractor):
            inception.load(extractor.weights)
        elif isinstance(extractor, ExportedExtractor):
            features.require_weights(extractor)
        else:
            continue
        loaded.append(extractor.name)
    if loaded:
        return Result(f"{', '.join(loaded)}: the weights are those that the recipe expects")
    return Result("the sweep trains its own; Inception's weights are for recipes with {kind: inception}", needed=False)


def vae(needs: Needs) -> Result:
    """Load the autoencoder that the recipe names; one of a hub is downloaded."""
    from dis_scale import vae

    settings = needs.recipe.vae
    if isinstance(settings, PretrainedVae):
        return Result(f"{settings.path}, {type(vae.load_pretrained(settings).net).__name__}")
    if isinstance(settings, ExportedVae):
        vae.load_exported(settings)
        return Result(settings.path)
    return Result("the sweep trains its own" if settings.kind == "trained" else "the models see pixels", needed=False)
