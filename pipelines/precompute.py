"""Precompute, a Ray job: workers encode images to posterior moments and write latent shards; the driver writes the manifest last.

Workers take shard numbers from one dealer, so a slow worker does not hold up the others. A shard's bytes do not depend on which
worker makes it: dis_scale/data/encode.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from dis_scale.data import shards, staging
from dis_scale.data.making import LatentSet, MissingShards
from dis_scale.data.sources import Source, open_source
from dis_scale.data.staging import MixedOrder
from dis_scale.process.errors import StorageError, UserError
from dis_scale.process.progress import listing_words
from dis_scale.storage.folder import Folder
from dis_scale.sweep import REAL, Sweep, state
from dis_scale.sweep.documents import Encoding, LatentsManifest
from dis_scale.training import devices
from pipelines.failures import WorkerFailure
from pipelines.nodes import choose_device
from pipelines.restarts import with_restarts
from pipelines.sharing import Deal, capacity, share
from pipelines.stage import StageJob
from pipelines.watching import Watch, watch
from pipelines.worker import Request, Worker, elsewhere, request_for, spawn

if TYPE_CHECKING:
    from dis_scale.vae import Vae


UNITS = {"encode": "images", "mix": "reads and writes of images, to mix them"}


class Encoder(Worker):
    """Encodes shards by number with the sweep's VAE; progress counts images."""

    def __init__(self, sweep: Sweep, device: str) -> None:
        super().__init__()
        self.sweep, self.device = sweep, device
        self._vae: Vae | None = None

    def encoding(self) -> Encoding:
        """Return the VAE's identity and scale, the device and PyTorch's version. Needs no GPU."""
        from dis_scale.data.encode import encoding_of  # imported here because the driver does not need torch

        return encoding_of(self._loaded(), self.sweep.recipe.data, self.device)

    def check(self) -> str:
        """Compare latents of another program with the VAE, and write the grid of their images; return what was measured."""
        from dis_scale.data import given
        from dis_scale.evaluation.sampling import real_grid

        recipe, source = self.sweep.recipe, open_source(self.sweep.recipe.data, self.sweep.store)
        measured = given.require_own(source, self._loaded(), recipe.data)
        images = given.as_images(source, self._loaded())
        self.sweep.folder.write(REAL, real_grid(images, recipe.data.resolution))
        return f"{measured}; look at {self.sweep.folder}/{REAL}"

    def encode(self, latents: Folder, encoding: Encoding, deal: Deal) -> None:
        """Write the shards that `deal` names. UserError if this worker would encode differently from `encoding`."""
        from dis_scale.data.encode import Setup, compute_exactly, put_shards, require_same_hardware

        compute_exactly(rounded=self.sweep.recipe.precompute.precision == "tf32")
        if (ours := self.encoding()) != encoding:
            raise UserError(f"{latents}: this worker encodes with {ours}, the first one with {encoding}: use equal nodes")
        recipe, vae = self.sweep.recipe, self._loaded()
        if recipe.data.given is None:  # copies are the same everywhere
            require_same_hardware(latents, self.device)
        self.report(0)
        device = devices.torch_device(self.device)
        devices.check_on_node(device)
        with devices.blaming_others(device):
            vae.net.to(device)
            setup = Setup(open_source(recipe.data, self.sweep.store), vae, recipe)
            self.emit("work")
            put_shards(setup, latents, iter(deal, None), self._count)

    def mix(self, latents: Folder, mixer: MixedOrder, deal: Deal) -> None:
        """Write the shards of the groups that `deal` names, from the parts that all encoders made. Needs no GPU."""
        self.report(0)
        mixing = staging.Mixing(latents, mixer, self._count)
        for group in iter(deal, None):
            mixing.mix(group)

    def _loaded(self) -> "Vae":
        from dis_scale import vae

        self._vae = self._vae or vae.load_in_stage(self.sweep)
        return self._vae

    def _count(self, images: int) -> None:
        self.report(self._done + images)
        self.raise_if_stopped("a rerun repeats the unfinished shards")


@dataclass
class RayEncoders:
    """Encoders on Ray, as many as the recipe names, and then workers that mix, as many as the cluster's CPUs and memory allow."""

    job: StageJob
    device: str
    work: str = "encode"
    workers: list[Any] = field(default_factory=list)
    """Workers that have ended this work and can do more of it."""

    def encoding(self) -> Encoding:
        """Return the encoding that all encoders have, asked of one that needs no GPU."""
        encoding: Encoding = self._ask("encoding")
        return encoding

    def check(self) -> str:
        """Compare latents of another program with the VAE: `Encoder.check`."""
        return str(self._ask("check"))

    def _ask(self, question: str) -> Any:
        """Return the answer of an encoder on the CPU, which also encodes if this is done on CPUs."""
        worker = self.workers.pop() if self.workers else self._spawn(elsewhere(self.job, request_for("precompute", "cpu", 1)))
        (answer,) = watch(self.job, [worker], [getattr(worker, question).remote()], policy=Watch(keep_logs=False))
        if self.device == "cpu":
            self.workers = [worker]
        return answer

    def encode(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
        """Encode the shards of these numbers, or parts to be mixed."""
        settings = self.job.recipe.precompute
        mixer = MixedOrder.of(len(source), settings, encoding)
        positions = [shards.shard_positions(n, len(source), settings) if source.mixed else mixer.part(n) for n in left]
        request = request_for("precompute", self.device, 1)
        self._share("encode", request, settings.workers, (latents, encoding), left, sum(map(len, positions)), len(source))

    def mix(self, latents: Folder, encoding: Encoding, source: Source, left: list[int]) -> None:
        """Write the shards of these groups from the encoded parts."""
        mixer = MixedOrder.of(len(source), self.job.recipe.precompute, encoding)
        images = sum(len(mixer.group(n)) for n in left)
        request = mixing_request(mixer)
        self._share("mix", request, capacity(request), (latents, mixer), left, 2 * images, 2 * len(source))

    def _share(
        self, work: str, request: Request, most: int, arguments: tuple[Any, ...], left: list[int], images: int, total: int
    ) -> None:
        """Let `most` workers share this work on the numbers in `left`, which have this many `images` of `total`.

        Workers for which the cluster has no capacity yet join when it has.
        """
        if work != self.work:  # the new work needs their GPUs or their memory
            for worker in self.workers:
                ray.kill(worker)
            self.work, self.workers = work, []
        count = min(most, len(left))
        for worker in self.workers[count:]:
            ray.kill(worker)  # the failure of an earlier attempt may keep its handle, and so its GPU
        workers, self.workers = self.workers[:count], []
        if missing := count - len(workers):
            placed = elsewhere(self.job, request)
            workers += [self._spawn(placed) for _ in range(missing)]
        self.workers, _, failure = share(
            self.job, workers, work, arguments, left,
            lambda done: self.job.progress(min(total - images + sum(done), total), total, UNITS[work]),
        )  # fmt: skip
        if failure:
            raise failure

    def _spawn(self, request: Request) -> Any:
        return spawn(self.job, Encoder, request, self.job.sweep, self.device)


def mixing_request(mixer: MixedOrder) -> Request:
    """Return the request of a worker that mixes: a CPU and memory, on the nodes that encode, however few encoders they hold."""
    amounts = request_for("precompute", "cpu", 1).amounts | {"memory": mixer.memory_bytes}
    return Request({name: 0.001 if name == "precompute" else amount for name, amount in amounts.items()})


def precompute_latents(job: StageJob) -> None:
    """Make the shards that are missing and write the manifest last."""
    job.connect()
    device, why = ("cpu", "latents are copied") if job.recipe.data.given else choose_device(job.recipe)
    job.say(f"encoding on {device} ({why})")
    with job.hold("precompute"):
        find_or_make_latents(job, RayEncoders(job, device))


def find_or_make_latents(job: StageJob, encoders: Any) -> None:
    """Find or make the sweep's latents and record them in the sweep. `encoders` has the methods of `RayEncoders`."""
    encoding = with_restarts(job, "precompute", lambda _: encoders.encoding(), lambda: 0)
    latents = shards.latents_folder(job.sweep, encoding.identity)
    job.say(f"latents  {latents}")
    complete = LatentsManifest.find(latents) is not None
    if job.recipe.data.given and not (complete and job.sweep.folder.exists(REAL)):
        try:
            job.say(f"given    {with_restarts(job, 'precompute', lambda _: encoders.check(), lambda: 0)}")
        except (UserError, StorageError) as error:
            if not complete:
                raise
            job.say(f"given    its images are not shown in the report: {error}", level="warning")
    if not complete:
        source = open_source(job.recipe.data, job.sweep.store, listing_words(job.say))
        encode, mix = (partial(work, latents, encoding, source) for work in (encoders.encode, encoders.mix))
        latent_set = LatentSet(job.recipe, latents, source, encoding, encode, mix, job.say, job.raise_if_stopped, job.require_held)
        latent_set.make(partial(retrying, job))
    staging.delete_parts(latents)
    shards.require_allowed(latents, job.recipe.data)
    job.require_held()
    state.use_latents(job.sweep, latents, encoding.identity)


def retrying(job: StageJob, attempt: Callable[[], None], stored: Callable[[], int]) -> None:
    """Run an attempt with restarts, also if it leaves shards out because a worker that had begun them was lost."""

    def attempt_or_fail(_: WorkerFailure | None) -> None:
        try:
            attempt()
        except MissingShards as error:
            raise WorkerFailure(str(error)) from error

    with_restarts(job, "precompute", attempt_or_fail, stored)
