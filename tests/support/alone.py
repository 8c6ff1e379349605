"""Tests that need a process of their own."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

P = ParamSpec("P")
INSIDE = "DIS_SCALE_TEST_ALONE"


def in_its_own_process(test: Callable[P, None]) -> Callable[P, None]:
    """Run a test in a new Python, as the worker that it is about: what other tests left in this one does not reach it."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if os.environ.get(INSIDE):
            return test(*args, **kwargs)
        name = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
        others = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", name],
            cwd=Path(__file__).parents[2], env=others | {INSIDE: "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        return None

    return run
