"""Encoding in bf16 against fp32: `python -m benchmarks.encoding`. The difference in latents, and in the distance.

With the digits' autoencoder and classifier, trained here for the purpose. Prints how far posterior means move, relative to the
deviation of the posterior that training samples from, and relative to the latents' own; and the distance under the classifier
between reconstructions of both, against that of two halves of the real images.
"""

import json
import tempfile
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


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        sweep = digits.prepare(digits.recipe_of(root, 30, quick=False), root, torch.device("cpu"))
        compute_exactly()
        encoder, source = vae.load(sweep), open_source(sweep.recipe.data, sweep.store)
        images = np.stack([source.pixels(i, sweep.recipe.data.resolution) for i in range(len(source))])
        (extractor,), batches = load_extractors(sweep, torch.device("cpu")), range(0, len(images), BATCH)
        means, deviations, features = {}, {}, {}
        for precision in ("fp32", "bf16"):
            moments = np.concatenate(
                [encode_images(encoder, images[i : i + BATCH], BATCH, precision)[:, 0] for i in batches]
            )
            mean, log_variance = np.split(moments.astype(np.float32), 2, axis=1)
            means[precision], deviations[precision] = mean, np.exp(log_variance / 2)
            latents = torch.from_numpy((mean - encoder.shift) * encoder.scale)
            decoded = [extractor(encoder.decode(latents[i : i + BATCH])).pooled for i in batches]
            features[precision] = metrics.fit(np.concatenate(decoded))
        moved = means["bf16"] - means["fp32"]
        reference = load_all(sweep)[extractor.name]
        row = {
            "name": "bf16 against fp32, digits",
            "of_the_posteriors_deviation": float(
                np.sqrt((moved**2).mean()) / np.sqrt((deviations["fp32"] ** 2).mean())
            ),
            "of_the_latents_deviation": float(np.sqrt((moved**2).mean()) / means["fp32"].std()),
            "distance_between_both": metrics.frechet(features["fp32"], features["bf16"]),
            "reconstruction_distance_fp32": metrics.frechet(features["fp32"], reference.pooled),
            "reconstruction_distance_bf16": metrics.frechet(features["bf16"], reference.pooled),
            "halves_of_real_images": reference.floor,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
