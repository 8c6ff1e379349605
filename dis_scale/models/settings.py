"""Base of a family's settings: what all of them have, and what other parts ask of them. No heavy import."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from dis_scale.process.settings import Settings


class FamilySettings(Settings):
    """Sizes and options of a network; base of a family's settings, which add `kind: Literal["name"]`, `width`, `patch` and more."""

    if TYPE_CHECKING:
        kind: str
        width: int
        patch: int

    beside: ClassVar[frozenset[str]] = frozenset()
    """Fields that a recipe adds to those of the family: what the network is does not depend on them."""
    only_initial: ClassVar[frozenset[str]] = frozenset()
    """Fields that shape the random start or the training, and not what the network computes from its weights."""

    def __hash__(self) -> int:
        """Of any fields: a family of another package may have lists."""
        return hash(self.model_dump_json())

    @property
    def needed_code(self) -> str:
        """Package and version, or hash of the file, that the settings were made for."""
        return str(getattr(self, "code", ""))

    @property
    def curve(self) -> str:
        """Name of the curve on which the model's points lie: its kind, and ` + ` with options that make it another backbone."""
        return self.kind

    @property
    def sizes(self) -> dict[str, Any]:
        """What the network is, apart from its training."""
        return self.model_dump(exclude=set(self.beside))

    def at_width(self, width: int) -> Self:
        """Return the settings at another width, of a network between which and this one learning rates transfer."""
        return self.model_copy(update={"width": width})

    def base_width_refusal(self, base_width: int, others: Mapping[str, Self]) -> str | None:
        """Return why rates cannot follow from a base width; None if they can. `others`: models of this kind and base width."""
        del base_width, others
        return None

    @property
    def transfers(self) -> bool:
        """Whether theory covers the transfer of its learning rates over widths."""
        return False

    @property
    def heads_in_file(self) -> int | None:
        """Heads of a public file of these settings, which its weights do not determine."""
        return None
