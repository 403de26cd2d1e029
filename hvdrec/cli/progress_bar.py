"""Show a progress bar on standard error if tqdm is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that updates the bar; it takes the number of units done and their total."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:  # the slim install does not have it
        yield lambda done, total: None
        return
    with tqdm(unit=unit, unit_scale=True, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
