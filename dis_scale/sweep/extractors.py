"""Identity of extractors and of the reference statistics under them, without loading any network."""

import hashlib
import json

from dis_scale.process.settings import FORMAT
from dis_scale.recipe import ExportedExtractor, ExtractorSettings, InceptionExtractor, TrainedExtractor
from dis_scale.recipe.evaluate import INCEPTION_SHA256
from dis_scale.storage.programs import read_programs
from dis_scale.sweep import Sweep
from dis_scale.sweep.documents import WEIGHTS_FILE, StoredClassifier

REFERENCE_PART_IMAGES, REFERENCE_PARTS = 20_000, 256
"""Fewest images of a part of the statistics, and most parts. ImageNet has 65, each a file of 100 MB under Inception until the
statistics are complete; a hundred million images have 256 of 390,625."""


def weights_identity(sweep: Sweep, extractor: ExtractorSettings) -> str:
    """Return the sha256 of an extractor's weights; of a program followed by its input size, if any."""
    if isinstance(extractor, InceptionExtractor):
        return INCEPTION_SHA256
    if isinstance(extractor, TrainedExtractor):
        return StoredClassifier.require(sweep.extractor(extractor.name)).files[WEIGHTS_FILE].sha256
    size = str(extractor.size) if extractor.size else ""
    read_extractor(extractor)  # checks that it exists and has the recipe's hash
    return f"{extractor.sha256}{size}"


def read_extractor(extractor: ExportedExtractor) -> bytes:
    """Return a program; UserError if it is missing or the recipe does not have its hash."""
    (data,) = read_programs([extractor.path], extractor.sha256, f"extractor {extractor.name}")
    return data


def reference_file(sweep: Sweep, name: str, identity: str) -> str:
    """Return the name below `sweep.references` of an extractor's statistics, a fingerprint of their inputs."""
    key = json.dumps(reference_facts(sweep, name, identity), sort_keys=True)
    return f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"


def reference_part(sweep: Sweep, name: str, identity: str, number: int) -> str:
    """Return the name below `sweep.reference_parts` of one part of an extractor's statistics."""
    return f"{reference_file(sweep, name, identity).removesuffix('.npz')}-{number:05d}.npz"


def part_positions(number: int, images: int) -> range:
    """Return the positions of a part's images."""
    size = _part_images(images)
    return range(number * size, min((number + 1) * size, images))


def part_count(images: int) -> int:
    """Return the number of parts of a reference from this many images."""
    return -(-images // _part_images(images))


def _part_images(images: int) -> int:
    return max(REFERENCE_PART_IMAGES, -(-images // REFERENCE_PARTS))


def reference_facts(sweep: Sweep, name: str, identity: str) -> dict[str, str]:
    """Return the inputs of the statistics under one extractor, which are stored with them."""
    recipe = sweep.recipe
    source = recipe.data.source.model_dump(mode="json")
    crop = {"crop": recipe.data.crop} if recipe.data.crop else {}
    declared = {"source": source} | crop
    images = recipe.evaluate.reference_of(name) or json.dumps(declared, sort_keys=True)
    return {
        "format": str(FORMAT), "extractor": name, "weights": identity,
        "resolution": str(recipe.data.resolution), "images": images,
    }  # fmt: skip
