"""Workers of an evaluation: an `Evaluator` samples and stores blocks of a checkpoint; `RayEvaluators` are all of them as one.

Evaluators reserve no CPU and run at low priority: on a small machine a reserved CPU would block training's placement for ever.
"""

import contextlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import ray

from dis_scale.evaluation.run import Spent, block_name
from dis_scale.process.errors import BrokenDevice, DisScaleError, NotFinite, OutOfMemory, StorageError, UserError, WrongKernel
from dis_scale.recipe import Evaluate
from dis_scale.sweep import Sampled, Sweep, state
from dis_scale.sweep.documents import LatentsPointer
from dis_scale.training import devices
from pipelines import nodes, ray_private
from pipelines.failures import WorkerFailure, cause_of, describe, failure_of, may_pass
from pipelines.places import Places, own_gpus
from pipelines.ray_private import actor_id
from pipelines.sharing import Deal, share
from pipelines.stage import StageJob
from pipelines.waiting import Wait
from pipelines.watching import watch
from pipelines.worker import Request, Worker, spawn

if TYPE_CHECKING:
    from dis_scale.diffusion.generate import Generator

NICE = 5
"""Niceness of an evaluator, which gives it a quarter of a CPU beside a busy training process. At 19 the first samples of a sweep on
CPUs came only when a training ended."""
WAITS_EVERY_S = 2.0
"""Interval at which a GPU to share is looked for."""
OTHER_S = 300.0
"""Time for an evaluator on another node to find capacity, to open its networks and to compare a kernel."""
Seat = tuple[int | None, str | None, int]
"""Key of an evaluator: the GPU that it shares and that GPU's node, both None for a GPU of its own; and its number among the
evaluators that are equal in both."""


class NotOpened(UserError):
    """An evaluator cannot load the decoder or an extractor. No checkpoint is to blame."""


class Evaluator(Worker):
    """Samples blocks and measures the held-out loss; progress counts the images that it sampled, without stored ones.

    Progress is reported within a block: on a shared GPU a block may take an hour, and a worker without progress is killed.
    """

    def __init__(self, sweep: Sweep, device: str, shared_gpu: int | None = None) -> None:
        super().__init__()
        self._checked = False
        self._broken: Exception | None = None
        os.nice(NICE)
        if shared_gpu is not None:
            devices.hide_others(shared_gpu)
        self._shared = 0.0 if shared_gpu is None else 1.0  # training may hold all memory that it leaves
        try:
            with devices.blaming_others(devices.torch_device(device), self._shared):
                self._open(sweep, device, shares=shared_gpu is not None)
        except Exception as error:  # if the process died of it, Ray would only report a lost worker
            self._broken = error

    def _open(self, sweep: Sweep, device: str, *, shares: bool) -> None:
        import torch

        from dis_scale import vae
        from dis_scale.data.encode import compute_exactly
        from dis_scale.evaluation.sampling import open_sampler

        compute_exactly()
        self._sampling = threading.Lock()
        where = devices.torch_device(device)
        if shares:
            torch.cuda.set_per_process_memory_fraction(sweep.recipe.evaluate.gpu_share, 0)
        decoder = vae.for_samples(sweep, vae.load_in_stage(sweep))
        state.require_same_vae(sweep.folder, LatentsPointer.read(sweep.folder).vae, decoder.identity)
        decoder.net.to(where)
        self.sweep, self.sampler = sweep, open_sampler(sweep, decoder, where)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Let one call at a time run the block, on a checked device; BrokenDevice if the device fails."""
        from dis_scale.data.encode import compute_exactly

        if isinstance(self._broken, DisScaleError) and not may_pass(self._broken):
            raise NotOpened(f"{describe(self._broken)} (on node {socket.gethostname()})") from self._broken
        if self._broken:
            raise self._broken
        with self._sampling:  # after another worker failed, an earlier call may still be in its last block
            compute_exactly()  # the number of threads is set per thread
            if not self._checked:
                devices.check_on_node(self.sampler.device, self._shared)
                self._checked = True
            with devices.blaming_others(self.sampler.device, self._shared):
                yield

    def opens(self) -> bool:
        """Return whether its networks were loaded; raise the error instead if the next attempt may do better."""
        if self._broken and may_pass(self._broken):
            raise self._broken
        return self._broken is None

    def right(self, sampled: Sampled, settings: Evaluate, number: int | None = None) -> bool:
        """Return whether a model's kernels agree with their definition on this device, and the samples of block `number`, if given,
        are finite."""
        with self._working():
            try:
                guide, model = self.sampler.guide(settings), self.sampler.model(sampled.model, sampled.images_seen, settings)
                if number is not None:
                    self.sampler.sample(model, settings, number, guide)
            except (WrongKernel, NotFinite):
                return False
            return True

    def sample(self, sampled: Sampled, settings: Evaluate, deal: Deal) -> Spent:
        """Sample and store the blocks that `deal` names; return what this took."""
        from dis_scale.models.replay import replayed
        from dis_scale.training.throughput import machine_name

        with self._working():
            folder, images, before = self.sweep.evaluation(sampled), 0, dict(self.sampler.seconds)

            @cache
            def models() -> "tuple[Generator, Generator | None]":
                """Return the model and the one that guides it, loaded for the first block; not at all if no block is left."""
                guide = self.sampler.guide(settings)
                model = self.sampler.model(sampled.model, sampled.images_seen, settings)
                self.emit("work")
                device = self.sampler.device
                return replayed(model, device), guide and replayed(guide, device)

            for number in iter(deal, None):
                if self.stop_requested():
                    break
                model, guide = models()
                try:
                    block = self.sampler.sample(model, settings, number, guide, self._count)
                except NotFinite as error:
                    error.block = number
                    raise
                folder.write(block_name(number), block.to_bytes())
                images += len(block.right)
            seconds = {part: s - before[part] for part, s in self.sampler.seconds.items()}
            return Spent(images, machine_name(self.sampler.device), seconds)

    def _count(self, images: int) -> None:
        self.report(self._done + images)

    def floor(self, deal: Deal) -> None:
        """Measure and store the blocks of real images that `deal` names."""
        from dis_scale.data.sources import open_source
        from dis_scale.evaluation import floor

        with self._working():
            source = open_source(self.sweep.recipe.data, self.sweep.store)
            chosen = floor.chosen_images(source.listing.labels(), self.sweep.recipe.evaluate.samples)
            for number in iter(deal, None):
                if self.stop_requested():
                    break
                try:
                    block = floor.make_block(self.sampler, source, chosen, number)
                except BrokenDevice as error:  # missing images, which no other work needs
                    raise StorageError(str(error)) from None
                self.sweep.floor.write(block_name(number), block.to_bytes())
                self._count(len(block.numbers))

    def held_out(self, sampled: Sampled) -> dict[str, float]:
        """Return the loss on the images that training never saw."""
        from dis_scale import diffusion
        from dis_scale.data.latents import Latents
        from dis_scale.evaluation import held_out

        with self._working():
            recipe, settings = self.sweep.recipe, self.sweep.recipe.evaluate
            latents = Latents(
                state.require_latents(self.sweep.folder), recipe.seed, recipe.data.held_out_images,
                normalise=recipe.data.normalise,
            )  # fmt: skip
            model = self.sampler.model(sampled.model, sampled.images_seen, settings)
            process = diffusion.build(recipe.diffusion, model.shape)
            return held_out.losses(model, process, latents, recipe.seed, settings.batch_images)


@dataclass
class RayEvaluators:
    """Evaluators on Ray, as one: as many as the recipe names and the cluster has capacity for. A lost one is replaced."""

    job: StageJob
    device: str
    gpus: int
    """Number of evaluators with a GPU of their own."""
    report: Callable[[int], None]
    """Gets the number of images that were sampled here."""
    _workers: dict[Seat, Any] = field(default_factory=dict)
    """Living evaluators."""
    _images: dict[str, int] = field(default_factory=dict)
    """Images sampled by each evaluator, lost ones included, by the actor's id."""

    def spawn(self) -> None:
        """Start the evaluators that are missing: all of them, or those that were lost or had no capacity.

        Nodes whose devices failed are avoided while others can hold an evaluator. If all would share GPUs and none is there, wait.
        """
        with Wait(self.job.gauge) as wait:
            while not (seats := self._seats()):
                wait.log(self.job, 1, {"GPU": 1.0})
                self.job.pause(WAITS_EVERY_S)
        missing = [seat for seat in seats if seat not in self._workers]
        for seat in missing[: max(0, len(seats) - len(self._workers))]:
            self._workers[seat] = spawn(self.job, Evaluator, seats[seat], self.job.sweep, self.device, seat[0])

    def _seats(self) -> dict[Seat, Request]:
        places = Places.now(self.job.recipe)
        bad = nodes.excluded(self.job, places.nodes, lambda bad: places.without(bad).evaluates(self.device))
        seats, alike = dict[Seat, Request](), Counter[tuple[int | None, str | None]]()
        for gpu, request in places.without(bad).evaluators(self.device, self.gpus):
            seats[gpu, request.node, alike[gpu, request.node]] = request
            alike[gpu, request.node] += 1
        return seats

    def sample(self, sampled: Sampled, settings: Evaluate, blocks: list[int]) -> list[Spent]:
        """Let the evaluators share the blocks of a checkpoint; return what each spent."""
        try:
            return self._share("sample", (sampled, settings), blocks)
        except WrongKernel as error:
            raise self._blame(error, "right", sampled, settings) from error
        except NotFinite as error:
            cause = cause_of(error)
            assert isinstance(cause, NotFinite)
            raise self._blame(error, "right", sampled, settings, cause.block) from error

    def floor(self, blocks: list[int]) -> None:
        """Let the evaluators share the blocks of the floor."""
        self._share("floor", (), blocks)

    def _share(self, method: str, arguments: tuple[Any, ...], blocks: list[int]) -> list[Any]:
        """Let the evaluators share blocks. If one fails, raise its failure; the others stop after their current block."""
        self.spawn()
        before, workers = self._workers, list(self._workers.values())
        self._workers = {}

        def count(done: list[int]) -> None:
            for worker, images in zip(map(actor_id, workers), done, strict=True):  # 0 before a worker's first answer
                self._images[worker] = max(images, self._images.get(worker, 0))
            self.report(sum(self._images.values()))

        try:
            living, spent, failure = share(self.job, workers, method, arguments, blocks, count)
        except (OutOfMemory, ray.exceptions.RayTaskError) as error:
            self._workers = before  # the checkpoint, or an image, is to blame
            if isinstance(error, NotOpened):
                raise self._blame(error, "opens") from error
            raise
        self._workers = {seat: worker for seat, worker in before.items() if worker in living}
        if failure:
            raise failure
        return spent

    def _blame(self, error: WrongKernel | NotFinite | NotOpened, check: str, *arguments: Any) -> Exception:
        """Return the error to raise for an evaluator's error: a WorkerFailure if the `check` passes on another evaluator.

        Evaluators whose check fails are ended, and count against their nodes: a device computes wrongly, or a node lacks a file. If
        a kernel is wrong for all of them, an evaluator on another node is also asked.
        """
        placed = {seat: worker for seat, worker in self._workers.items() if ray_private.has_process(worker)}
        calls = [getattr(worker, check).remote(*arguments) for worker in placed.values()]
        try:
            passed = watch(self.job, [*placed.values()], calls)
        except WorkerFailure as failure:
            self.end()
            return failure
        others = sum(passed)
        if not others and isinstance(error, WrongKernel):
            others += self._right_elsewhere(check, *arguments)
        if not others:
            return error
        what = "node" if isinstance(error, NotOpened) else "device"
        words = f"this {what} fails where those of {others} other evaluators do not: {describe(error)}"
        failed = [seat for seat, right in zip(placed, passed, strict=True) if not right]
        for node in {ray_private.node_of(placed[seat]) for seat in failed}:
            nodes.record_failure_of(self.job, node, words)
        for seat in failed:
            ray.kill(self._workers.pop(seat))
        return WorkerFailure(words)

    def _right_elsewhere(self, check: str, *arguments: Any) -> bool:
        """Return whether a check passes on a node without evaluators; false if no such node has capacity soon."""
        here = {ray_private.node_of(worker) for worker in self._workers.values() if ray_private.has_process(worker)}
        bad, places = {*here, *nodes.failed(self.job.sweep, nodes.living())}, Places.now(self.job.recipe)
        if not places.without(bad).evaluates(self.device):
            return False
        request = places.request("evaluate", self.device, 0)
        other = self._spawn_other(request.on(label_selector=nodes.avoiding(bad)))
        call, until_s = getattr(other, check).remote(*arguments), self.job.now_s() + OTHER_S
        try:
            while not ray.wait([call], timeout=WAITS_EVERY_S)[0] and self.job.now_s() < until_s:
                self.job.raise_if_stopped()
            return bool(ray.wait([call], timeout=0)[0]) and failure_of(call) is None and ray.get(call)
        finally:
            ray.kill(other)

    def _spawn_other(self, request: Request) -> Any:
        return spawn(self.job, Evaluator, request, self.job.sweep, self.device)

    def held_out(self, sampled: Sampled) -> dict[str, float]:
        """Let one evaluator measure the held-out loss."""
        if not self._workers:
            self.spawn()
        seat, worker = next(iter(self._workers.items()))
        try:
            (values,) = watch(self.job, [worker], [worker.held_out.remote(sampled)])
        except WorkerFailure:
            del self._workers[seat]
            raise
        except WrongKernel as error:
            raise self._blame(error, "right", sampled, self.job.recipe.evaluate) from error
        return values

    def move(self) -> bool:
        """Return whether new evaluators have to continue, because training needs more or fewer GPUs than before."""
        sweep = self.job.sweep
        return self.device == "cuda" and own_gpus(sweep, Places.now(sweep.recipe)) != self.gpus

    def end(self) -> None:
        """End the evaluators, so that their GPUs are free now: a handle that is kept somewhere would keep them."""
        for worker in self._workers.values():
            ray.kill(worker)
        self._workers = {}
