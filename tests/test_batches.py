"""The endless stream of samples, its replacements, and preparing ahead."""
import time

import pytest

from engine.loader import Loader
from engine.video import VideoError


def test_every_epoch_is_a_new_order_of_all_samples():
    picked = [batches.pick(list(range(10)), i, 5, lambda s: -s) for i in range(30)]
    epochs = [[one.item for one in picked[i:i + 10]] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert all(one.made == -one.item and not one.errors and one.index == i for i, one in enumerate(picked))
    assert batches.pick(list(range(10)), 17, 5, str).item == picked[17].item


def test_unreadable_video_is_replaced_and_named():
    def make(sample):
        if sample < 5:
            raise VideoError(f"{sample}: broken")
        return sample

    picked = [batches.pick(list(range(10)), i, 0, make) for i in range(10)]
    assert all(one.item >= 5 for one in picked)
    assert {str(one.errors[0]) for one in picked if one.errors} == {f"{i}: broken" for i in range(5)}
    assert [one[:3] for one in picked] == [batches.pick(list(range(10)), i, 0, make)[:3] for i in range(10)]
    with pytest.raises(VideoError, match="broken"):
        batches.pick([1, 2, 3], 0, 0, make)


def test_what_is_no_video_error_is_not_replaced():
    made = []
    with pytest.raises(RuntimeError, match="a mistake in the code"):
        batches.pick([1, 2, 3], 0, 0, lambda item: made.append(item) or fail("a mistake in the code"))
    assert len(made) == 1


def fail(message):
    raise RuntimeError(message)


def test_any_number_of_threads_picks_the_same():
    running, most = [], []

    def make(sample):
        running.append(sample)
        most.append(len(running))
        time.sleep(0.01 if sample % 3 else 0.03)        # so that they end in another order
        running.remove(sample)
        if sample % 4 == 0:
            raise VideoError(f"{sample}: broken")
        return -sample

    alone, together = (batches.pick_all(list(range(20)), range(3, 15), 7, make, threads) for threads in (1, 4))
    plain = lambda picked: [(*one[:3], [str(error) for error in one.errors]) for one in picked]
    assert plain(alone) == plain(together) == plain([batches.pick(list(range(20)), i, 7, make) for i in range(3, 15)])
    assert any(one.errors for one in alone) and 1 < max(most) <= 4
    with pytest.raises(VideoError, match="broken"):
        batches.pick_all([4, 8], range(2), 0, make, 2)


def test_prefetched_makes_each_item_once_in_order():
    made = []
    with batches.prefetched(lambda step: made.append(step) or step ** 2, range(3, 6), Loader()) as batches:
        assert list(batches) == [(3, 9), (4, 16), (5, 25)] and made == [3, 4, 5]
    with batches.prefetched(made.append, range(3, 3), Loader()) as batches:
        assert list(batches) == [] and made == [3, 4, 5]


def test_prefetched_fails_where_making_failed_and_stops_the_loader():
    load, used = Loader(), []
    with pytest.raises(RuntimeError, match="the second"), \
            batches.prefetched(lambda item: item == "b" and fail("the second"), "abc", load) as made:
        for item, _ in made:
            used.append(item)
    assert used == ["a"] and load.stopped
