"""MLflow as a test sees it: its clients' calls noted, or failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dis_scale.tracking import mlflow


@contextmanager
def before_each_call(call: Callable[[str], object]) -> Iterator[None]:
    """Call a function with the name of each call of the block's clients of MLflow, which fail by what it raises."""
    open_client = mlflow.open_client

    class Client:
        def __init__(self, uri: str) -> None:
            self.client = open_client(uri)

        def __getattr__(self, name: str) -> Any:
            call(name)
            return getattr(self.client, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow, "open_client", Client)
        yield
