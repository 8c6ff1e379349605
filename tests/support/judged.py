"""An evaluator with a verdict instead of kernels."""

import os
import time
from typing import Any, cast

from dis_scale.recipe import Evaluate
from dis_scale.sweep import Sampled
from pipelines.sharing import Deal
from pipelines.worker import Worker


class Judged(Worker):
    """An evaluator on a device whose kernels are right, or wrong, or that is lost when it is asked; or that lacks a file."""

    def __init__(self, right: bool | None, wrong: Exception) -> None:
        super().__init__()
        self._right, self._wrong = right, wrong

    def opens(self) -> bool:
        return bool(self._right)

    def right(self, _: Sampled, __: Evaluate, number: int | None = None) -> bool:
        if self._right is None:
            os._exit(1)
        return self._right and number == getattr(self._wrong, "block", None)

    def sample(self, _: Sampled, __: Evaluate, deal: Deal) -> int:
        for _number in iter(deal, None):
            if not self._right:
                raise self._wrong
            time.sleep(0.05)
        return 1

    def floor(self, deal: Deal) -> None:
        self.sample(cast(Any, None), cast(Any, None), deal)
