"""The endless stream of samples, its substitutes for unreadable videos, and the batches that are prepared ahead."""
import time

import pytest
import torch

from engine.batches import Batch, Batches, Picked, pick
from engine.loader import Loader
from engine.video import VideoError

TEN = list(range(10))


def upper_half(sample):
    """As if the videos of the samples below 5 were broken."""
    if sample < 5:
        raise VideoError(f"{sample}: broken")
    return -sample


def shape(picked):
    """A Picked that compares: errors by their message."""
    return picked.index, picked.sample, picked.prepared, [str(error) for error in picked.errors]


def test_every_epoch_is_a_new_order_of_all_samples():
    orders = set()
    for seed in (5, 6):
        for epoch in (range(10), range(10, 20), range(20, 30)):
            order = [pick(TEN, index, seed, str).sample for index in epoch]
            assert sorted(order) == TEN
            orders.add(tuple(order))
    assert len(orders) == 6
    assert shape(pick(TEN, 17, 5, str)) == shape(pick(TEN, 17, 5, str))


def test_an_unreadable_video_is_replaced_and_named():
    picked = [pick(TEN, index, 0, upper_half) for index in range(10)]
    assert [each.index for each in picked] == TEN
    assert all(each.sample >= 5 and each.prepared == -each.sample for each in picked)
    first_errors = {str(each.errors[0]) for each in picked if each.errors}
    assert first_errors == {f"{sample}: broken" for sample in range(5)}
    with pytest.raises(VideoError, match="broken"):
        pick([1, 2, 3], 0, 0, upper_half)                   # a hundred attempts


def test_what_is_no_video_error_is_raised_at_once():
    attempts = []

    def prepare(sample):
        attempts.append(sample)
        raise RuntimeError("a mistake in the code")

    with pytest.raises(RuntimeError, match="a mistake in the code"):
        pick(TEN, 0, 0, prepare)
    assert len(attempts) == 1


def draw(world, workers=1, seed=7):
    """The Picked of three steps of 8 samples, over all of `world` processes, by index."""
    def prepare(sample, task):
        time.sleep(0.004 if sample % 3 else 0.012)          # so that threads end in another order
        return task, upper_half(sample)

    picked = []
    for rank in range(world):
        stream = Batches(range(2, 5), 8, seed, rank, world, lambda step: (f"task of {step}", TEN),
                         prepare, Loader(workers=workers))
        with stream:
            for _ in range(3):
                share = stream.next().picked
                assert len(share) == 8 // world
                picked += share
    return [shape(each) for each in sorted(picked, key=lambda each: each.index)]


def test_samples_and_substitutes_depend_on_seed_and_index_alone():
    alone = draw(1)
    assert draw(2) == alone and draw(4) == alone and draw(1, workers=4) == alone
    assert [index for index, *_ in alone] == list(range(16, 40))
    assert [task for _, _, (task, _), _ in alone] == [f"task of {i // 8}" for i in range(16, 40)]
    assert any(errors for *_, errors in alone)
    assert draw(1, seed=8) != alone


def test_videos_are_decoded_as_many_at_a_time_as_there_are_workers():
    running, most = [], []

    def prepare(sample, task):
        running.append(sample)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(sample)

    stream = Batches(range(2), 9, 0, 0, 1, lambda step: (None, TEN), prepare, Loader(workers=3))
    with stream:
        stream.next()
        stream.next()
    assert max(most) == 3


def test_a_batch_has_each_sample_for_every_completion_of_its_group():
    batch = Batch("a task", [Picked(4, "s", "S", []), Picked(6, "t", "T", [])], seed=3)
    assert batch.samples == ["s", "t"]
    assert batch.prompts == ["S", "T"]
    assert batch.repeated(3) == ["s", "s", "s", "t", "t", "t"]


def test_random_numbers_are_a_sample_s_own():
    """They follow from the run's seed and the sample's index, wherever it stands in a batch."""
    def numbers(seed, *indices):
        batch = Batch(None, [Picked(index, None, None, []) for index in indices], seed)
        return [torch.rand(1, generator=generator).item() for generator in batch.generators()]

    first, second = numbers(0, 4, 5)
    assert numbers(0, 5, 4) == [second, first] and numbers(0, 5) == [second]
    assert len({first, second, *numbers(1, 4, 5)}) == 4


def test_the_next_batch_is_prepared_while_this_one_is_used():
    prepared = []

    def prepare(sample, task):
        prepared.append(task)

    stream = Batches(range(3, 6), 1, 0, 0, 1, lambda step: (step, TEN), prepare, Loader())
    with stream:
        assert stream.next().task == 3
        end = time.monotonic() + 20
        while len(prepared) < 2 and time.monotonic() < end:
            time.sleep(0.001)
        assert prepared == [3, 4]
        assert [stream.next().task for _ in range(2)] == [4, 5]
    assert prepared == [3, 4, 5]


def test_a_batch_that_fails_fails_at_its_step_and_the_loader_is_stopped():
    def prepare(sample, task):
        if task == 1:
            raise RuntimeError("the second")

    loader, used = Loader(), []
    stream = Batches(range(3), 1, 0, 0, 1, lambda step: (step, TEN), prepare, loader)
    with pytest.raises(RuntimeError, match="the second"), stream:
        while True:
            used.append(stream.next().task)
    assert used == [0] and loader.stopped
