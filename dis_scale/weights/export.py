"""Export: one safetensors file that describes its model, and a folder that diffusers can sample from; `open_checkpoint`.

    DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)(class_labels=[1, 7])

The folder's two Python files are the strings below. They need dis-scale and diffusers; this module needs only dis-scale.
Read next: models/public.py for the layouts of the public code.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dis_scale import diffusion
from dis_scale.models import build, check_finite
from dis_scale.models.public import read_public
from dis_scale.models.tokens import Backbone
from dis_scale.process.errors import UserError
from dis_scale.recipe import Flow, Gaussian, LatentShape, Recipe, Sampling
from dis_scale.recipe.models import from_sizes
from dis_scale.sweep import Sweep, state
from dis_scale.sweep.documents import EncodedBy, LatentsManifest
from dis_scale.vae import DiffusersVae, PixelVae, Vae
from dis_scale.vae.autoencoders import RepresentationVae
from dis_scale.vae.scaling import Scaling
from dis_scale.weights.checkpoints import PIPELINE_WEIGHTS

NET = "net."
"""Beginning of the weights' names in an exported folder."""

BACKBONE_PY = '''\
"""The denoiser as a diffusers model; its code is dis-scale's, its settings are in config.json."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from dis_scale.weights.export import from_description


class DisScaleBackbone(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, description: dict, diffusion: dict, scaling: dict = None, guidance: dict = None, guided: bool = True):
        super().__init__()
        self.net = from_description(description)

    def forward(self, x, t, y=None):
        return self.net(x, t, y)
'''

PIPELINE_PY = '''\
"""Samples images from a dis-scale backbone: noise depends only on the seed and the image number."""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.image_processor import VaeImageProcessor

from dis_scale.weights.export import process_of, sampler_for, scaling_of


class DisScalePipeline(DiffusionPipeline):
    _optional_components = ["vae"]

    def __init__(self, backbone, vae: ModelMixin = None):
        super().__init__()
        self.register_modules(backbone=backbone, vae=vae)

    @torch.no_grad()
    def __call__(
        self, class_labels=None, num_images=1, guidance_scale=1.0, num_inference_steps=50, sampler=None, seed=0,
        output_type="pil",
    ):
        from dis_scale.diffusion.generate import generate
        from dis_scale.recipe import Sampling

        if guidance_scale != 1 and not self.backbone.config.guided:
            raise ValueError("guidance_scale: the model did not learn to do without labels: set it to 1")
        process = process_of(self.backbone.config.diffusion, self.backbone.net.shape)
        count = num_images if class_labels is None else len(class_labels)
        given = {"sampler": sampler or sampler_for(process), "steps": num_inference_steps, "guidance": guidance_scale}
        sampling = Sampling.model_validate(given | (self.backbone.config.guidance or {}), strict=False)
        images = generate(
            self.backbone.net, process, class_labels, range(count), sampling, seed=seed, device=self.backbone.device
        )
        if self.backbone.config.scaling is not None:
            images = scaling_of(self.backbone.config.scaling).undo(images)
        if self.vae is not None:
            images = self.vae.decode(images).sample
        return ImagePipelineOutput(VaeImageProcessor().postprocess(images, output_type=output_type))
'''


@dataclass(frozen=True)
class SamplingFacts:
    """The facts that sampling needs besides the weights; stored in a published file, for its use outside the sweep."""

    diffusion: Gaussian | Flow
    vae: EncodedBy
    scaling: Scaling | None
    """Scaling of the model's latents; None for the VAE's own."""
    sampling: Sampling
    label_names: tuple[str, ...] = ()
    """Names of the classes by label; empty without names."""
    label_dropout: float = 0.1
    """Share of the images that were trained on without their label; guidance without a guiding model needs such images."""

    @property
    def scales_by(self) -> Scaling:
        """The scaling of the model's latents, also if it is the VAE's own."""
        return self.scaling or Scaling(self.vae.shift, self.vae.scale)

    @classmethod
    def of(cls, recipe: Recipe, latents: LatentsManifest) -> "SamplingFacts":
        """Return the facts of a sweep's models from its recipe and the manifest of its latents."""
        encoder = EncodedBy(**latents.encoding.model_dump(include=set(EncodedBy.model_fields)))
        normalise = recipe.data.normalise
        scaling = None if normalise == "vae" else Scaling.of(latents, normalise)
        return cls(
            recipe.diffusion, encoder, scaling, recipe.evaluate.sampling, latents.made_from.label_names, recipe.train.label_dropout
        )

    @classmethod
    def of_sweep(cls, sweep: Sweep) -> "SamplingFacts | None":
        """Return the facts of a stored sweep's models; None without latents."""
        latents = state.find_latents(sweep.folder)
        return cls.of(sweep.recipe, LatentsManifest.require(latents)) if latents else None


def trained_for(model: Backbone, facts: SamplingFacts | None) -> Gaussian | Flow:
    """Return the process that a model was trained for: by its facts, or as published for a public model, which has none."""
    if facts:
        return facts.diffusion
    return Flow(kind="flow") if model.process == "flow" else Gaussian(kind="gaussian")


def describe(model: Backbone, facts: SamplingFacts | None = None) -> dict[str, Any]:
    """Return settings, shape and number of classes as plain data for `from_description`; with the sampling facts, if known."""
    if model.as_ours() is not model:
        raise UserError(f"a public {type(model).__name__} is not described by settings of ours: sample from its own file")
    sampling = {} if facts is None else {"sampling": TypeAdapter(SamplingFacts).dump_python(facts, mode="json")}
    return sampling | {"model": model.settings.sizes, "shape": list(model.shape), "num_classes": model.num_classes}


def from_description(description: dict[str, Any]) -> Backbone:
    """Return the model with initial weights. UserError if the description is invalid."""
    try:
        settings = from_sizes(description["model"])
        shape = LatentShape(*map(int, description["shape"]))
        return build(settings, shape, description["num_classes"])
    except (KeyError, TypeError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise UserError(f"not the description of a model: {reason}") from None


def save(model: Backbone, path: str | Path, facts: SamplingFacts | None = None) -> None:
    """Write one safetensors file: weights by our names, the description in its metadata, with the sampling facts if given."""
    check_finite(model)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    safetensors.torch.save_file(weights, path, {"dis_scale": json.dumps(describe(model, facts))})


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Open a file of `save`; yield its description, None without one, and the file. UserError if the block cannot read it."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield json.loads((file.metadata() or {}).get("dis_scale", "null")), file
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot read weights from {path}: {error}") from None


def load(path: str | Path) -> Backbone:
    """Return the model in evaluation mode from a file of `save`. UserError for any other file or non-finite weights."""
    with _opened(path) as (description, file):
        weights = {name.removeprefix(NET): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if not isinstance(description, dict):
        raise UserError(f"{path} does not describe its model: expected a file that dis-scale wrote, or a public .pt")
    model = from_description(description)
    shapes, expected = ({name: w.shape for name, w in each.items()} for each in (weights, model.state_dict()))
    if mismatched := sorted(name for name in shapes | expected if shapes.get(name) != expected.get(name)):
        raise UserError(f"{path}: weights do not fit their description: {', '.join(mismatched[:3])}")
    model.load_state_dict(weights)
    check_finite(model)
    return model.eval()


def sampling_facts(path: str | Path) -> SamplingFacts | None:
    """Return the sampling facts in a file that `load` reads; None for any other file, and if it was saved without."""
    if Path(path).suffix != ".safetensors":
        return None
    with _opened(path) as (description, _):
        stored = description.get("sampling") if isinstance(description, dict) else None
    try:
        return None if stored is None else TypeAdapter(SamplingFacts).validate_json(json.dumps(stored))
    except ValidationError as error:
        raise UserError(f"{path}: invalid sampling facts: {error.errors()[0]['msg']}") from None


def open_checkpoint(path: str | Path, heads: int | None = None) -> Backbone:
    """Return a model in evaluation mode from a file of `save`, or from a public `.pt` (known by its keys)."""
    if Path(path).suffix == ".safetensors":
        return load(path)
    return read_public(read_weights(path), heads).eval()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a public `.pt` file: its EMA if it is a training state, else itself. UserError otherwise."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"cannot read weights from {path}: {' '.join(repr(error).split())[:200]}") from None
    weights = data.get("ema", data) if isinstance(data, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{path} holds no state dict: expected tensors by name, or a training state with 'ema'")
    return weights


def save_pipeline(
    folder: str | Path,
    model: Backbone,
    process: Gaussian | Flow,
    vae: Vae | None = None,
    guidance: Mapping[str, Any] | None = None,
    facts: SamplingFacts | None = None,
) -> None:
    """Write a diffusers folder: model_index.json, the backbone, and the VAE unless the model works on pixels.

    `guidance` has `guidance_channels` and `guidance_interval` of `Sampling`, which every call of the pipeline then uses.
    `vae` is the decoder of the model's samples: `dis_scale.vae.for_samples` returns it. UserError if it is not one of diffusers.
    With its `facts`, dis-scale's own commands can also open the folder.
    """
    if not isinstance(vae, DiffusersVae | PixelVae | None) or isinstance(vae, RepresentationVae):
        raise UserError(
            "diffusers' pipelines take one of its autoencoders of images in [-1, 1]: export the backbone alone, by `save`"
        )
    check_finite(model)
    folder = Path(folder)
    backbone = folder / "backbone"
    backbone.mkdir(parents=True, exist_ok=True)
    config = {
        "_class_name": "DisScaleBackbone",
        "description": describe(model),
        "diffusion": process.model_dump(mode="json"),
        "scaling": None if vae is None else asdict(vae.scaling),
        "guidance": dict(guidance or {}),
        "guided": facts is None or facts.label_dropout > 0,
    }
    index = {
        "_class_name": ["pipeline", "DisScalePipeline"],
        "backbone": ["backbone", "DisScaleBackbone"],
        "vae": ["diffusers", type(vae.net).__name__] if isinstance(vae, DiffusersVae) else [None, None],
    }
    weights = {f"{NET}{name}": weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()}
    safetensors.torch.save_file(
        weights, folder / PIPELINE_WEIGHTS, {"format": "pt", "dis_scale": json.dumps(describe(model, facts))}
    )
    for path, text in (
        (backbone / "config.json", json.dumps(config, indent=2)),
        (backbone / "backbone.py", BACKBONE_PY),
        (folder / "pipeline.py", PIPELINE_PY),
    ):
        path.write_text(text + "\n")
    if isinstance(vae, DiffusersVae):
        vae.net.save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")  # last: with it the folder looks complete


def scaling_of(settings: dict[str, Any]) -> Scaling:
    """Return the scaling of the latents of an exported folder."""
    return Scaling(**settings)


def process_of(settings: dict[str, Any], shape: LatentShape) -> Any:
    """Return the diffusion process of an exported folder."""
    return diffusion.build(TypeAdapter[Any](Gaussian | Flow).validate_json(json.dumps(settings)), shape)


def sampler_for(process: Any) -> str:
    """Return the default sampler of an exported folder."""
    return "heun" if process.settings.kind == "flow" else "ddpm"
