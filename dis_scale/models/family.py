"""A family of backbones as one value: its settings, its network, and everything else that the package needs from it.

No heavy import: reading a recipe needs only the settings. Read next: families.py (the registry of families), tokens.py (the
interface of a network), dis/ (an example).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dis_scale.models.settings import FamilySettings
from dis_scale.process.settings import LatentShape

if TYPE_CHECKING:
    from torch import Tensor

    from dis_scale.models.public_names import PublicWeight
    from dis_scale.models.tokens import Backbone


class PublicLayout(Protocol):
    """Names and shapes of the weights that a family's authors released. A module with these functions implements it."""

    def recognises(self, state_dict: "Mapping[str, Tensor]") -> bool:
        """Return whether a public file is of this family."""
        ...

    def model(self, state_dict: "Mapping[str, Tensor]", heads: int | None = None) -> "Backbone":
        """Return a model of a public file's sizes, without weights. UserError names a missing or misshapen weight."""
        ...

    def weights(self, ours: str, model: "Backbone") -> "list[PublicWeight]":
        """Return the public weights in the model's weight `ours`. UserError for options that the public code lacks."""
        ...

    def added(self, model: "Backbone", weights: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Return the tensors of a public file that are no weights of the model. UserError for a model without a public form."""
        ...


@dataclass(frozen=True, eq=False)
class Family:
    """A family of backbones. Attributes that need PyTorch are functions, which import it when called."""

    settings: type[FamilySettings]
    """Class of its settings; its `kind` is the family's name in a recipe."""
    network: Callable[..., "Backbone"]
    """Function that returns the network: `network(settings, shape, num_classes, scan, checkpointing)`."""
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Published sizes by name."""
    ladder: tuple[str, ...] = ()
    """Presets that a first recipe compares on GPUs, the smallest first."""
    small: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Sizes that a first recipe compares on a CPU, by the models' names, the smallest first; `patch` follows from the images."""
    marker: str = "D"
    """matplotlib's marker of its points in figures."""
    line: str = ":"
    """matplotlib's style of its lines."""
    scans: frozenset[str] = frozenset()
    """Values of `train.scan` with which the network runs the selected backend; empty if it runs none."""
    thop_gflops: Callable[[Any, LatentShape, int | None], float | None] = lambda *_: None
    """Function from settings, latent shape and number of classes to Gflops as the DiS paper counts them: thop x 2, without the
    mixers. It accepts sizes that the paper does not have. It returns None for models to which this count does not apply."""
    public: Callable[[], PublicLayout] | None = None
    """Function that returns the layout of the public weights; None if none were released."""

    code: str = ""
    """Origin of the family: package and version, or hash of its file. Set by families.py; empty for a built-in family."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        (kind,) = self.settings.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
        return str(kind)
