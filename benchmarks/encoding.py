"""Encoding in bf16 and TF32 against fp32: `python -m benchmarks.encoding`. The difference in latents, and in the distance.

With the digits' autoencoder and classifier, trained here for the purpose. Prints how far posterior means move, relative to the
deviation of the posterior that training samples from, and relative to the latents' own; and the distance under the classifier
between reconstructions of both. A CPU has no TF32: the inputs of all products are
rounded to its 10 bits of mantissa, as a GPU rounds them; sums are float32 in both.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import digits
from dis_scale import vae
from dis_scale.data.encode import compute_exactly, encode_images
from dis_scale.data.sources import open_source
from dis_scale.evaluation import metrics
from dis_scale.evaluation.features import load_extractors
from dis_scale.evaluation.reference import load_all

BATCH = 64


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Round to 10 bits of mantissa, to nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@contextlib.contextmanager
def as_tf32(net: torch.nn.Module) -> Iterator[None]:
    """Round the inputs and the weights of all convolutions and linear layers of `net`."""
    layers = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    exact = [layer.weight.data for layer in layers]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: tuple(map(to_tf32, inputs))) for layer in layers]
    for layer in layers:
        layer.weight.data = to_tf32(layer.weight.data)
    yield
    for layer, weight, hook in zip(layers, exact, hooks, strict=True):
        layer.weight.data = weight
        hook.remove()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sweep = digits.prepare(digits.recipe_of(root, 30, quick=False), root, torch.device("cpu"))
        compute_exactly()
        encoder, source = vae.load(sweep), open_source(sweep.recipe.data, sweep.store)
        images = np.stack([source.pixels(i, sweep.recipe.data.resolution) for i in range(len(source))])
        (extractor,), batches = load_extractors(sweep, torch.device("cpu")), range(0, len(images), BATCH)
        means, deviations, features = {}, {}, {}
        for precision in ("fp32", "bf16", "tf32"):
            with as_tf32(encoder.net) if precision == "tf32" else contextlib.nullcontext():
                moments = np.concatenate(
                    [encode_images(encoder, images[i : i + BATCH], BATCH, precision)[:, 0] for i in batches]
                )
            mean, log_variance = np.split(moments.astype(np.float32), 2, axis=1)
            means[precision], deviations[precision] = mean, np.exp(log_variance / 2)
            latents = torch.from_numpy(encoder.scaling.apply(mean.copy()))
            decoded = [extractor(encoder.decode(latents[i : i + BATCH])).pooled for i in batches]
            features[precision] = metrics.fit(np.concatenate(decoded))
        reference, exact = load_all(sweep)[extractor.name], means["fp32"]
        print(
            json.dumps({"name": "fp32", "reconstruction_distance": metrics.frechet(features["fp32"], reference.pooled)})
        )
        for precision in ("bf16", "tf32"):
            moved = float(np.sqrt(((means[precision] - exact) ** 2).mean()))
            row = {
                "name": f"{precision} against fp32, digits",
                "of_the_posteriors_deviation": moved / float(np.sqrt((deviations["fp32"] ** 2).mean())),
                "of_the_latents_deviation": moved / float(exact.std()),
                "distance_between_both": metrics.frechet(features["fp32"], features[precision]),
                "reconstruction_distance": metrics.frechet(features[precision], reference.pooled),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
