"""The time that a test lets the product see."""

from collections.abc import Callable

UseClock = Callable[[Callable[[], float]], None]
"""The fixture `use_clock`: called with a function that returns seconds, which then is `time.monotonic`."""
