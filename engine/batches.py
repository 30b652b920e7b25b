"""In what order samples come, endlessly and the same for any number of processes, and prepared ahead of their use."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from engine.loader import Loader
from engine.video import VideoError


class Picked(NamedTuple):
    index: int                  # in the stream
    item: Any
    made: Any                   # of the item
    errors: list[VideoError]    # of the items in whose place it came


def pick(items: Sequence, index: int, seed: int, make: Callable) -> Picked:
    """The item at `index` of an endless stream, with make(item): a new order every epoch. Where make raises VideoError,
    a substitute drawn from (seed, index, attempt) takes its place.

    Raises the last VideoError when a hundred items in a row have no readable video.
    """
    epoch, position = divmod(index, len(items))
    place, errors = np.random.default_rng([seed, epoch]).permutation(len(items))[position], []
    for attempt in range(1, 101):
        try:
            return Picked(index, items[place], make(items[place]), errors)
        except VideoError as error:
            errors.append(error)
            place = np.random.default_rng([seed, index, attempt]).integers(len(items))
    raise errors[-1]


def pick_all(items: Sequence, indices: Iterable[int], seed: int, make: Callable, threads: int) -> list[Picked]:
    """What `pick` returns for each of `indices`, in their order; it does not depend on the number of threads."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda index: pick(items, index, seed, make), indices))


@contextmanager
def prefetched(make: Callable, items: Sequence, load: Loader | None) -> Iterator[Iterator[tuple]]:
    """An iterator over (item, make(item)), which makes the next one in a thread while this one is used. At the end of
    the block, however it ends, nothing is waited for: `load` is stopped, on which `make` fails. With None, what is
    being made is waited for."""
    def ahead() -> Iterator[tuple]:
        upcoming = [background.submit(make, item) for item in items[:1]]
        for number, item in enumerate(items, 1):
            made = upcoming.pop().result()
            upcoming = [background.submit(make, after) for after in items[number:number + 1]]
            yield item, made

    with ThreadPoolExecutor(1) as background:
        try:
            yield ahead()
        finally:
            if load:
                load.stop()
