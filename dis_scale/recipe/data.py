"""Settings of images and latents: the source, the VAE, and how latent shards are made."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from dis_scale.process.settings import Count, InferencePrecision, Settings, absolute, pin, runtime


class DigitsSource(Settings):
    """scikit-learn's 1,797 handwritten digits, 8x8, in 10 classes; part of the package."""

    kind: Literal["digits"]


class StoredSource(Settings):
    """Images in storage, local or at any fsspec URL. A declared source is listed once; a new `version` lists it again."""

    url: Annotated[str, AfterValidator(absolute)]
    """Folder, file or URL that all nodes reach. A local path is made absolute: two projects may have a folder of one name."""
    version: str | None = None
    """Any word; change it if images were added, removed or replaced under the same URL."""


class FolderSource(StoredSource):
    """A folder of class folders (ImageNet's layout); labels are the sorted folder names. Unlabelled images need no such folders."""

    kind: Literal["folder"]


Files = str | tuple[str, ...]
"""Files of a folder to read, as a shell pattern, or as several: those of one pattern are of one part of a set."""


class TarSource(StoredSource):
    """Tar files of images, such as WebDataset shards: a folder of them, or a single `.tar`."""

    kind: Literal["tar"]
    files: Files = "*.tar"
    """Files of the folder to read, as a shell pattern or several."""
    image: str | None = None
    """End of an image's name after its key, if a sample has several images: `jpg` beside `seg.png`. Default: any image."""
    label: Literal["cls", "json", "folder", "tar"] = "cls"
    """Source of an image's class: `<key>.cls` or `<key>.json` beside it, its folder in the tar, or the tar's own name."""
    json_key: str = "label"
    """Key of the class in `<key>.json`."""


class ParquetSource(StoredSource):
    """Parquet files with image bytes (Hugging Face's layout): a folder of them, or a single `.parquet`."""

    kind: Literal["parquet"]
    files: Files = "*.parquet"
    """Files of the folder to read, as a shell pattern: `train-*.parquet` leaves other splits out; a list reads several."""
    image: str = "image"
    """Column of images: bytes, or a struct with a field `bytes`."""
    label: str = "label"
    """Column of classes, integers or names."""


class CsvSource(StoredSource):
    """A CSV file with a header and one row per image; paths start at the file's own folder. See `data.csv_outside`."""

    kind: Literal["csv"]
    path: str = "path"
    """Column of paths or URLs."""
    label: str = "label"
    """Column of classes, integers or names."""


class LatentsSource(StoredSource):
    """Latents that another program encoded with the autoencoder `vae`; their images are not needed."""

    kind: Literal["latents"]
    layout: Literal["edm2", "repa", "webdataset", "safetensors"]
    """How they are stored: EDM2's folder or zip, REPA's (the folder with `vae-sd/`), MaskDiT's tars or LightningDiT's files."""
    files: Files | None = None
    """Tars or safetensors files of the folder to read, as a shell pattern or several; default: all."""

    @property
    def posterior(self) -> bool:
        """Whether the layout has mean and variance; otherwise latents."""
        return self.layout != "safetensors"

    @model_validator(mode="after")
    def _files_are_of_the_layout(self) -> Self:
        if self.files is not None and self.layout in ("edm2", "repa"):
            raise ValueError(f"files: layout {self.layout} is read as a whole, by its dataset.json: remove it")
        return self


SourceSettings = DigitsSource | FolderSource | TarSource | ParquetSource | CsvSource | LatentsSource


Normalise = Literal["vae", "channels"]
Crop = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Count]
"""Left, top and side of a square, in pixels of the upright image."""


def _classes(value: Any) -> Any:
    if value is None:
        raise ValueError("got null, expected: a number of classes, or none for unconditional models")
    return None if value == "none" else value


NumClasses = Annotated[
    Count | None,
    BeforeValidator(_classes, json_schema_input_type=Count | Literal["none"]),
    PlainSerializer(lambda n: "none" if n is None else n),
]


class Data(Settings):
    """Images, labelled or not, resized to `resolution` x `resolution` and cropped to their centre."""

    source: Annotated[SourceSettings, Field(discriminator="kind")]
    """Location of the images, and how they are labelled."""
    resolution: Count
    """Side of the images in pixels."""
    num_classes: NumClasses
    """Number of classes; `none` for unconditional models: labels are not read, and the source needs none."""
    crop: Crop | None = None
    """Square that is cut out of each image first, such as CelebA's faces, [25, 57, 128]; default: the complete image."""
    undecodable: Literal["refuse", "skip"] = runtime("refuse")
    """Treatment of empty, damaged or bomb-sized images: stop with an error that names it, or skip, count and list it."""
    csv_outside: Literal["refuse", "allow"] = runtime("refuse")
    """Treatment of a CSV's images outside its own folder: `../`, a complete path or a URL. Allow it only for a CSV of your own."""
    mirror: bool = True
    """Flip each image horizontally with probability 1/2 in training."""
    normalise: Normalise = "vae"
    """Normalise latents by the VAE's scale and shift, or each channel by its own mean and deviation over the set's posteriors."""
    held_out_images: int = Field(0, ge=0)
    """Images that training never sees, selected by the seed; their loss is measured at each published count."""

    @property
    def declared(self) -> dict[str, Any]:
        """Declaration of the listed images, by which sweeps share a listing and latents."""
        sides = {"sides": self.sides} if self.given else {}
        return self.source.model_dump(mode="json") | sides | ({"labels": "none"} if self.num_classes is None else {})

    @property
    def given(self) -> LatentsSource | None:
        """The latents of another program, from which the sweep's are copied; None for images, which it encodes."""
        return self.source if isinstance(self.source, LatentsSource) else None

    @property
    def sides(self) -> int:
        """Latents of an image in a shard: its own and its mirror image's, unless those of another program have none."""
        return 1 + (self.mirror or self.given is None)

    @model_validator(mode="after")
    def _latents_are_used_as_they_are(self) -> Self:
        if self.given and self.crop:
            raise ValueError("crop: latents cannot be cropped: leave it out")
        if self.given and self.given.posterior and self.mirror:
            raise ValueError(f"mirror: {self.given.layout} has no latents of mirror images: set it to false")
        return self


class TrainedVae(Settings):
    """A small diffusers AutoencoderKL, trained on the sweep's own images by the prepare stage."""

    kind: Literal["trained"]
    widths: tuple[Count, ...] = Field((16, 32, 32), min_length=1)
    """Channels of each level; each level but the last halves the side."""
    norm_groups: Count = 8
    """Groups of channels that are normalised together; divides each of `widths`. One group keeps the colours of an image: with as
    many groups as channels, each has mean 0 and deviation 1 in every image, and what distinguishes images is lost."""
    latent_channels: Count = 4
    """Channels of a latent."""
    steps: Count = 600
    """Training steps."""
    batch_images: Count = 64
    """Images in a step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Learning rate of its training."""
    kl_weight: float = Field(1e-2, ge=0)
    """Weight of the KL divergence (nats per pixel value), added to the mean squared error."""

    @model_validator(mode="after")
    def _groups_divide_widths(self) -> Self:
        if bad := [width for width in self.widths if width % self.norm_groups]:
            raise ValueError(f"widths: {bad[0]} is not a multiple of norm_groups {self.norm_groups}: choose groups that divide it")
        return self


class PretrainedVae(Settings):
    """An autoencoder for images in diffusers' layout: a local folder or a hub id. Its config names its class."""

    kind: Literal["pretrained"]
    path: str
    """Local folder or hub id."""
    subfolder: str | None = None
    """Folder of the autoencoder within a pipeline, such as `vae`."""


class ExportedVae(Settings):
    """Two programs of `torch.export`: `encode.pt2`, float32 images (B, 3, H, W) in [-1, 1] to latents, and `decode.pt2`, back."""

    kind: Literal["exported"]
    path: str = runtime(...)
    """Path or URL of their folder."""
    sha256: str | None = pin(pattern=r"^[0-9a-f]{64}$")
    """Hash of `encode.pt2` followed by `decode.pt2`, checked whenever they are loaded, and required then: they are programs."""
    posterior: bool
    """Whether `encode.pt2` returns mean and log-variance, (B, 2C, h, w), or latents, (B, C, h, w)."""
    scale: float = Field(1.0, gt=0)
    """The backbone sees latents as (z - shift) scale."""
    shift: float = 0.0
    """See `scale`."""


class NoVae(Settings):
    """Pixel space: a latent is the image itself, 3 channels in [-1, 1]; decoding is the identity."""

    kind: Literal["none"]


VaeSettings = TrainedVae | PretrainedVae | ExportedVae | NoVae


class Precompute(Settings):
    """Latent shards: how images are grouped (identity) and who encodes them (runtime)."""

    shard_images: Count = 1024
    """Images in a shard."""
    encode_images: Count = 64
    """Images that are encoded together."""
    precision: InferencePrecision = "fp32"
    """Precision of the autoencoder's products."""
    workers: Count = runtime(1)
    """Number of encoders, and of those that compute the reference."""
