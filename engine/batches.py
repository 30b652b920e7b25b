"""The batches of a run: in what order samples come, and preparing the next batch while one is used."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from engine.loader import Loader
from engine.video import VideoError


@dataclass(frozen=True)
class Picked:
    """One sample of a batch."""
    index: int                  # its place in the endless stream of samples
    sample: Any
    prepared: Any               # what was made of the sample
    errors: list[VideoError]    # of the samples in whose place it came


@dataclass(frozen=True)
class Batch:
    """This process's share of the samples of a step."""
    task: Any
    picked: list[Picked]        # B
    seed: int                   # of the run

    @property
    def samples(self) -> list:
        return [each.sample for each in self.picked]

    @property
    def prompts(self) -> list:
        return [each.prepared for each in self.picked]

    def repeated(self, times: int) -> list:
        """Each sample so many times, as the completions of its group follow each other."""
        return [sample for sample in self.samples for _ in range(times)]

    def generators(self) -> list[torch.Generator]:
        """One per sample; its random numbers follow from the run's seed and the sample's index alone."""
        seeds = [np.random.SeedSequence([self.seed, each.index]).generate_state(1)[0]
                 for each in self.picked]
        return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


class Batches:
    """The batches of `steps`, each prepared in a thread while the one before it is used.

        batches = Batches(steps, 16, seed, rank, world, choose, prepare, loader)
        with batches:
            for step in steps:
                batch = batches.next()

    A step has `size` samples over all processes; process `rank` of `world` prepares every world-th of them, from its
    rank on. `choose(step)` gives the step's task and the samples that may be drawn for it. They come from an endless
    stream, which depends on the seed alone and not on the number of processes: see `pick`. `prepare(sample, task)`
    makes of a sample what the step needs, such as a Prompt, decoding the sample's video through `loader`, as many
    videos at a time as the loader has workers. At the end of the block, however it ends, nothing is waited for: the
    loader is stopped, on which preparing fails.
    """

    def __init__(self, steps: range, size: int, seed: int, rank: int, world: int,
                 choose: Callable[[int], tuple[Any, Sequence]], prepare: Callable, loader: Loader):
        self.steps, self.size, self.seed, self.rank, self.world = steps, size, seed, rank, world
        self.choose, self.prepare, self.loader = choose, prepare, loader

    def make(self, step: int) -> Batch:
        task, samples = self.choose(step)
        share = range(step * self.size + self.rank, (step + 1) * self.size, self.world)
        prepare = partial(self.prepare, task=task)
        with ThreadPoolExecutor(len(self.loader.workers)) as threads:
            picked = list(threads.map(lambda index: pick(samples, index, self.seed, prepare),
                                      share))
        return Batch(task, picked, self.seed)

    def next(self) -> Batch:
        """The next step's batch. Raises what preparing it raised."""
        _, batch = next(self.upcoming)
        return batch

    def __enter__(self) -> None:
        self.background = ThreadPoolExecutor(1)
        self.upcoming = ahead(self.make, self.steps, self.background)

    def __exit__(self, *_) -> None:
        self.loader.stop()
        self.background.shutdown()


def ahead(make: Callable, items: Iterable, background: Executor) -> Iterator[tuple]:
    """(item, make(item)) of each item in order; the executor makes the next one while this one is used."""
    upcoming = None
    for item in items:
        after = item, background.submit(make, item)
        if upcoming:
            yield upcoming[0], upcoming[1].result()
        upcoming = after
    if upcoming:
        yield upcoming[0], upcoming[1].result()


def pick(samples: Sequence, index: int, seed: int, prepare: Callable) -> Picked:
    """The sample at `index` of an endless stream, with prepare(sample): a new order every epoch. Where prepare raises
    VideoError, a substitute drawn from (seed, index, attempt) takes the sample's place.

    Raises the last VideoError when a hundred samples in a row have no readable video.
    """
    epoch, position = divmod(index, len(samples))
    place = np.random.default_rng([seed, epoch]).permutation(len(samples))[position]
    errors = []
    for attempt in range(1, 101):
        try:
            return Picked(index, samples[place], prepare(samples[place]), errors)
        except VideoError as error:
            errors.append(error)
            place = np.random.default_rng([seed, index, attempt]).integers(len(samples))
    raise errors[-1]
