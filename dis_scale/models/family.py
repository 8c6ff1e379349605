"""A family of backbones as one value: its settings, its network, and all that other parts ask of it.

No heavy import: reading a recipe needs the settings only. Read next: families.py (which families exist), tokens.py (the
interface of a network), dis/ (a room).
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
    """Names and shapes of the weights that the authors of a family released; a module has these functions."""

    def recognises(self, state_dict: "Mapping[str, Tensor]") -> bool:
        """Whether a public file is of this family."""
        ...

    def model(self, state_dict: "Mapping[str, Tensor]", heads: int | None = None) -> "Backbone":
        """Return a model of a public file's sizes, without weights. UserError names what is missing or misshapen."""
        ...

    def weights(self, ours: str, model: "Backbone") -> "list[PublicWeight]":
        """Return the public weights that one of the model's holds. UserError for options that the public code lacks."""
        ...

    def added(self, model: "Backbone", weights: "Mapping[str, Tensor]") -> "Mapping[str, Tensor]":
        """Return what a public file has beside the model's renamed weights. UserError for a model that has no public form."""
        ...


@dataclass(frozen=True, eq=False)
class Family:
    """A family of backbones. What needs PyTorch is a function, which imports when it is called."""

    settings: type[FamilySettings]
    """Class of its settings; its `kind` is the family's name in a recipe."""
    network: Callable[..., "Backbone"]
    """Makes the network: `network(settings, shape, num_classes, scan, checkpointing)`."""
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
    """Values of `train.scan` under which it runs the backend that they select."""
    thop_gflops: Callable[[Any, LatentShape, int | None], float | None] = lambda *_: None
    """Returns Gflops as the DiS paper counts them for settings, latent shape and number of classes: thop x 2, which leaves out the
    mixers. Of any size, also of those that the paper has not; None for a family that is not counted so."""
    public: Callable[[], PublicLayout] | None = None
    """Returns the layout of its public weights, if any were released."""

    code: str = ""
    """Package and version, or hash of the file, that it is from; set by families.py, and empty for a built-in one."""

    @property
    def kind(self) -> str:
        """Its name in a recipe."""
        (kind,) = self.settings.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]
        return str(kind)
