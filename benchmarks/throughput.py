"""Speed and memory of the published sizes: `python -m benchmarks.throughput [--device cpu --quick]`.

One worker's training step through everything but storage; sampling; Stable Diffusion's autoencoder with random weights through
precompute's encoder, and alone; a block of DiT-XL/2 against fast-DiT's. benchmarks/settings.py runs the jobs of `VARIED`. Each job
is a process of its own, and runs before it is timed. A job that fails, for example for more memory than the device has, or that
gets no time, is a row that says so.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from benchmarks.bringup import Options, options
from benchmarks.dit_counts import PublicBlock, T
from benchmarks.record import MEASURED
from dis_scale import diffusion, models
from dis_scale.data import shards
from dis_scale.data.encode import begin_encoding, compute_exactly
from dis_scale.data.shards import Sample
from dis_scale.diffusion.generate import generate
from dis_scale.models.cost import price_model
from dis_scale.models.dit.network import DiTBlock
from dis_scale.models.dit.settings import Dit
from dis_scale.models.families import preset
from dis_scale.models.replay import replayed
from dis_scale.recipe import LatentShape, Recipe, Sampling, reading
from dis_scale.storage.folder import open_folder
from dis_scale.sweep import Sweep, state
from dis_scale.training.memory import plan_passes, state_bytes, worker_bytes
from dis_scale.training.profile import profile_training
from dis_scale.training.throughput import gpu_bytes, synchronize
from dis_scale.vae import DiffusersVae
from tests.support.documents import made_from

RECIPE = Path(__file__).parent.parent / "configs/imagenet256.yaml"
LATENTS, LATENT_SHAPE, CLASSES = 1536, LatentShape(4, 32), 1000
SIZES = ("DiS-S/2", "DiS-B/2", "DiS-M/2", "DiS-L/2", "DiS-H/2", "DiffuSSM-XL", "DiT-L/2", "DiT-XL/2", "DiS2-L/2")
BUDGET_S = 380.0
"""Time after which no further job starts: with the last one and the imports, less than benchmarks/gpu.sh's limit."""
PRELOADED = ["deepspeed", "dis_scale.training.profile"]  # 16 s of imports on an H200's host, once
JOB_S = 110.0
"""Longest time of one job: compilation and steps."""
SAMPLER: Final = "ddim"
SAMPLING_STEPS = 5
ENCODE_BATCHES = 4
SD_WIDTHS = (128, 256, 512, 512)
"""Widths of Stable Diffusion's autoencoder (83.7 million parameters)."""


class Job(NamedTuple):
    """A training job: a published size and its settings."""

    size: str
    images: int = 32
    checkpointing: str = "none"
    compile: bool = False
    steps: int = 10
    scan: str = "auto"
    latent: int = LATENT_SHAPE.size
    lanes: int = 1
    graphs: bool = False

    @property
    def name(self) -> str:
        extras = [", compiled"] * self.compile + [", graphs"] * self.graphs + [f", {self.scan} scan"] * (self.scan != "auto")
        extras += [f", {8 * self.latent} pixels"] * (self.latent != LATENT_SHAPE.size)
        return f"{self.size}, {self.images} images, checkpointing {self.checkpointing}{''.join(extras)}"

    @property
    def shape(self) -> LatentShape:
        return LatentShape(LATENT_SHAPE.channels, self.latent)


SIZED = [Job(size) for size in SIZES]
GOAL = Job("DiS-L/2", 128, lanes=2)
"""128 images a step: in two passes if a GPU holds no more with the states of their scans."""
VARIED = [
    GOAL,
    GOAL._replace(graphs=True),
    *(Job(size, graphs=True) for size in ("DiS-S/2", "DiS-B/2", "DiS-L/2", "DiS2-L/2", "DiT-L/2")),
]
VARIED += [Job("DiS-H/2", 16, "block", latent=64)]
VARIED += [Job("DiS-L/2", checkpointing=setting) for setting in ("block", "selective", "every_2")]
VARIED += [Job("DiS-L/2", compile=True), Job("DiT-L/2", compile=True), Job("DiS-L/2", 64)]
VARIED += [Job("DiS-L/2", 8), Job("DiS-S/2", 256), Job("DiS-H/2", 64, "block"), Job("DiS-L/2", scan="mamba")]
"""DiS-L/2 by its settings, and other models at settings of their own."""
QUICK_JOBS = [Job("DiT-S/8", 2, steps=1), Job("DiS-S/8", 2, "block", steps=1)]


def recipe_of(job: Job, device: str) -> Recipe:
    """The ImageNet recipe with one model."""
    changes = [
        f"models={{model: {{preset: {job.size}}}}}", "train.workers=1",
        f"train.batch_images={job.images}", f"train.lanes={job.lanes}",
        f"train.publish_images=[{1000 * job.images}]", f"train.resume_every_images={1000 * job.images}",
        f"train.checkpointing={job.checkpointing}", f"train.compile={json.dumps(job.compile)}",
        f"train.graphs={json.dumps(job.graphs)}", f"device={device}",
        f"train.precision={'bf16' if device == 'cuda' else 'fp32'}", "train.warmup_images=0",
        f"train.scan={job.scan}", f"data.resolution={8 * job.latent}",
    ]  # fmt: skip
    return reading.load(RECIPE, changes)


def random_latents(sweep: Sweep, shape: LatentShape = LATENT_SHAPE) -> None:
    """Latents of random numbers: speed does not depend on them."""
    rng, folder = np.random.default_rng(0), sweep.store / "latents/random"
    channels, size = shape
    samples = [
        Sample(i, f"{i}", i % CLASSES, rng.standard_normal((2, 2 * channels, size, size)).astype(np.float16))
        for i in range(LATENTS)
    ]
    shards.put_shard(folder, 0, samples, [])
    shards.write_manifest(folder, range(1), made_from("random", shape, num_classes=CLASSES))
    state.use_latents(sweep, folder, "random")


def train(job: Job, device: str) -> dict[str, Any]:
    """Return the rates of training, and the memory against its formula."""
    recipe = recipe_of(job, device)
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep.below(open_folder(scratch), recipe)
        random_latents(sweep, job.shape)
        rates = profile_training(sweep, "model", job.steps, None, lambda line: print(line, file=sys.stderr))
    row = rates | computed(job, recipe, gpu_bytes(torch.device(device)))
    if device == "cuda":  # on a CPU the measured memory is the process's
        row["memory_by_formula"] = row["memory_gib"] / row["formula_gib"]  # goal: 0.9 to 1.1
    return row


def computed(job: Job, recipe: Recipe, memory_bytes: int | None) -> dict[str, float]:
    """Memory in GiB by the formula of training/memory.py, and its part that does not depend on the images."""
    cost = price_model(recipe.models["model"], job.shape, CLASSES)
    passes, keeps = plan_passes("model", cost, recipe.train, 1, memory_bytes)
    images = job.images // passes
    complete = worker_bytes(cost, recipe.train, 1, images)
    if keeps:
        complete += images * cost.kept_in(recipe.train.precision).states
    return {"formula_gib": complete / 2**30, "states_gib": sum(state_bytes(cost, recipe.train, 1).values()) / 2**30}


def sample(size: str, images: int, device: str) -> dict[str, Any]:
    """Return the rate of guided sampling, in images per second for 50 steps."""
    compute_exactly()  # as an evaluator does
    where, recipe = torch.device(device), recipe_of(Job(size), device)
    precision = recipe.train.precision
    model = (
        models.build(recipe.models["model"], LATENT_SHAPE, CLASSES, precision=precision)
        .to(where)
        .eval()
        .requires_grad_(requires_grad=False)
    )

    def rate(drawn: Any) -> float:
        def run() -> None:
            generate(
                drawn, diffusion.build(recipe.diffusion, model.shape), [1] * images, range(images),
                Sampling(sampler=SAMPLER, steps=SAMPLING_STEPS, guidance=1.5), device=where,
            )  # fmt: skip
            synchronize(where)

        return images * SAMPLING_STEPS / 50 / timed(run)

    graphs, plain = rate(replayed(model, where, after=0)), rate(model)
    return {"images_per_s_50_steps": graphs, "images": images, "times_faster_by_graphs": graphs / plain}


def encode(resolution: int, images: int, device: str) -> dict[str, Any]:
    """Return the rate of batches and their flips through Stable Diffusion's architecture, as precompute encodes them in the
    recipe's precision, relative to the images on the device and nothing but the network (goal: 90 %)."""
    from diffusers import AutoencoderKL

    compute_exactly()
    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=SD_WIDTHS, latent_channels=4, layers_per_block=2, sample_size=resolution,
    )  # fmt: skip
    vae = DiffusersVae(net.to(device).eval().requires_grad_(requires_grad=False))
    changes = ["precompute.precision=fp32"] * (device == "cpu")  # bf16 takes minutes without AVX-512
    settings = reading.load(RECIPE, [f"precompute.encode_images={images}", *changes]).precompute
    pixels = list(np.random.default_rng(0).integers(0, 256, (images, resolution, resolution, 3), np.uint8))
    on_device = torch.randn(images, 3, resolution, resolution, device=device)

    def through() -> None:
        begun = [begin_encoding(vae, pixels, settings)]
        for _ in range(ENCODE_BATCHES - 1):
            begun.append(begin_encoding(vae, pixels, settings))
            begun.pop(0)()
        begun[0]()

    @torch.no_grad()
    def alone() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
            for _ in range(2 * ENCODE_BATCHES):
                vae.net.encode(on_device)
        synchronize(torch.device(device))

    seconds = timed(through)
    facts = {"images_per_s": ENCODE_BATCHES * images / seconds, "images": images, "precision": settings.precision}
    return facts | {"share_of_the_network_alone": timed(alone) / seconds}


def against_fast_dit(size: str, images: int, device: str) -> dict[str, Any]:
    """Return the time of the training pass of a block of DiT in bf16, times faster than the public code's block (goal: 1)."""
    settings = Dit(**preset(size))
    seconds = {}
    for name, block, stream in (
        ("ours", DiTBlock(settings), torch.bfloat16), ("fast-DiT", PublicBlock(settings), torch.float32),
    ):  # fmt: skip
        block = block.to(device)
        x_BTD = torch.randn(images, T, settings.width, dtype=stream, device=device, requires_grad=True)
        c_BD = torch.randn(images, settings.width, dtype=torch.bfloat16, device=device, requires_grad=True)

        def run(block: Any = block, x: Any = x_BTD, c: Any = c_BD) -> None:
            out = block(x, c)
            torch.autograd.grad(out, [x, c, *block.parameters()], torch.ones_like(out))
            synchronize(torch.device(device))

        seconds[name] = timed(run)
    ratio = seconds["fast-DiT"] / seconds["ours"]
    return {"times_faster": ratio, "ms": 1e3 * seconds["ours"], "images": images}


def timed(run: Any) -> float:
    """The least of three times, after a first run."""
    times = []
    for _ in range(4):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def print_row(name: str, facts: dict[str, Any]) -> None:
    print(json.dumps({"name": name} | facts), flush=True)


def in_a_process(name: str, target: Any, *arguments: Any) -> None:
    """Run a job, at most JOB_S long; a row says so if it fails."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # imports that ask for a GPU do not start CUDA, which cannot be forked
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(PRELOADED)
    process = forked.Process(target=_reported, args=(name, target, *arguments))
    process.start()
    process.join(JOB_S)
    if process.is_alive():
        process.kill()
        process.join()
        print_row(name, {"not measured": f"longer than {JOB_S:g} s"})
    elif process.exitcode:
        print_row(name, {"not measured": f"exit code {process.exitcode}"})


def _reported(name: str, target: Any, *arguments: Any) -> None:
    """Print a job's row, in its process. Any error is a row: the other jobs are measured."""
    try:
        print_row(name, target(*arguments))
    except Exception as error:
        print_row(name, {"not measured": " ".join(f"{type(error).__name__}: {error}".split())[:300]})


def run_all(jobs: list[tuple[Any, ...]], budget_s: float = BUDGET_S) -> None:
    """Run jobs (name, function, arguments) one after the other, as far as the time allows; not those that have a row."""
    began, measured = time.monotonic(), json.loads(os.environ.get(MEASURED, "[]"))
    for name, target, *arguments in jobs:
        if name in measured:
            continue
        if time.monotonic() - began > budget_s:
            print_row(name, {"not measured": f"no time left after {budget_s:g} s"})
        else:
            in_a_process(name, target, *arguments)


def training_jobs(jobs: list[Job], device: str) -> list[tuple[Any, ...]]:
    return [(f"train {job.name}", train, job, device) for job in jobs]


def main(chosen: Options) -> None:
    """The published sizes come first: the time may not be enough for all jobs."""
    device, quick = chosen.device.type, chosen.quick
    sampled, images, resolution, encoded = (["DiT-S/8"], 2, 32, 2) if quick else (["DiS-S/2", "DiS-L/2", "DiT-L/2"], 64, 256, 64)
    jobs = training_jobs(QUICK_JOBS if quick else SIZED, device)
    jobs += [(f"sample {size}", sample, size, images, device) for size in sampled]
    jobs += [(f"encode {resolution} pixels, with flips", encode, resolution, encoded, device)]
    block = "DiT-S/2" if quick else "DiT-XL/2"
    jobs += [(f"a block of {block} against fast-DiT's", against_fast_dit, block, images, device)]
    run_all(jobs)


if __name__ == "__main__":
    main(options(__doc__))
