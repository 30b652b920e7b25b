"""Statistics by hand: R1 and intervals, differences, whether answers follow the query, and IoU of arrays."""
import numpy as np
import pytest

import rewards
from engine import scores


def row(number, query, truth, start, end, video="a"):
    return {"id": f"{video}:{number}", "video": video, "query": query, "truth": truth, "start": start, "end": end}


def test_right_event_and_same_answer_by_hand():
    rows = [row(1, "rise", [0, 4], 0, 4), row(2, "fall", [5, 9], 0, 4), row(3, "spin", [9, 12], 8, 12),
            row(1, "rise", [0, 4], None, None, "b"), row(2, "fall", [6, 8], 3, 7, "b"),
            row(1, "rise", [0, 4], 2, 3, "c"), row(2, "fall", [6, 8], 2, 7, "c"),           # not the same: the end
            row(1, "rise", [0, 4], 0, 4, "d"), row(2, "rise", [5, 9], 0, 4, "d"),           # the same query
            row(1, "rise", [0, 4], 0, 4, "e"), row(2, "fall", [3, 6], 0, 4, "e")]           # not disjoint
    found = scores.grounding(rows)
    assert found["right_event"] == pytest.approx(4 / 7)     # a:1, a:3, b:2 and c:1
    assert found["same_answer"] == pytest.approx(1 / 5)     # a:1 and a:2, of three pairs in a, one in b, one in c
    assert found["event_queries"] == 7 and found["event_pairs"] == 5
    assert 0 <= found["right_event_95"][0] < 4 / 7 < found["right_event_95"][1] <= 1
    assert scores.grounding(rows[7:]) == {} == scores.grounding([])


def test_array_iou_is_that_of_the_reward():
    rng = np.random.default_rng(0)
    spans, truths = rng.integers(0, 9, (500, 2)) / 2, np.sort(rng.integers(0, 9, (500, 2)) / 2)
    truths[:, 1] += 0.5
    expected = [rewards.iou(tuple(span), tuple(truth)) for span, truth in zip(spans, truths)]
    np.testing.assert_allclose(scores.ious(spans, truths), expected, rtol=1e-12)
    assert 0 < np.mean(expected) < 1 and scores.ious(np.array([np.nan, 2.0]), truths[0]) == 0


def test_ties_are_no_matter_of_rounding():
    """9.1 / 13.0 is 0.7, but as it is computed a little less; others come out a little above."""
    tie = rewards.iou((0.0, 13.0), (0.0, 9.1))
    assert tie < 0.7
    found = scores.measure([tie, 0.7 - 1e-6, 0.7 + 1e-12, 0.7 + 1e-6], ["a"] * 4)
    assert found["R1@0.7"] == 3 / 4 and found["R1>0.7"] == 1 / 4
    for m in scores.THRESHOLDS:         # every truth of n tenths of a second whose share m is exact
        ties = [rewards.iou((start, start + n / 10), (start, start + n * round(10 * m) / 100))
                for start in (0.0, 0.1, 7.3) for n in range(10, 400, 10)]
        found = scores.measure(ties, ["a"] * len(ties))
        assert found[f"R1@{m}"] == 1 and found[f"R1>{m}"] == 0 and len(set(ties)) > 1


def test_interval_by_hand():
    """Two videos, all queries of one right, of the other wrong: of the draws a quarter is all wrong, one all right."""
    assert scores.measure([1.0] * 20 + [0.0] * 20, ["a"] * 20 + ["b"] * 20)["mIoU_95"] == [0, 1]
    binomial = scores.measure([0.0, 1.0] * 200, [str(i) for i in range(400)])
    assert binomial["R1@0.5_95"] == pytest.approx([0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025], abs=0.005)


def test_difference_is_of_the_same_queries():
    """In any order; the interval is of videos, of two queries each."""
    def rows(ious):
        return [{"id": str(i), "video": str(i // 2), "iou": iou} for i, iou in enumerate(ious)]

    assert scores.difference(rows([0.1] * 40), rows([0.3] * 40)) == pytest.approx((0.2, 0.2, 0.2))
    before, after = rows([0.5] * 200 + [0.1] * 200), rows([0.4, 0.4, 0.8, 0.8] * 50 + [0.0, 0.0, 0.4, 0.4] * 50)
    mean, low, high = scores.difference(before[::-1], after)
    assert mean == pytest.approx(0.1) and 0.06 < low < 0.09 and 0.11 < high < 0.14      # 0.2 / sqrt(200) * 1.96


def test_intervals_of_few_videos_are_doubted():
    ious = [0.1, 0.9] * 20
    few = scores.measure(ious, [str(i % 19) for i in range(40)])
    assert "mIoU_95" in few and "19 videos" in few["intervals"]
    assert "intervals" not in scores.measure(ious, [str(i % 20) for i in range(40)])
    assert scores.measure(ious, ["one"] * 40).keys() & {"mIoU_95", "intervals"} == set()     # says nothing of others
    rows = [row(n, f"q{n}", [4 * n, 4 * n + 3], 0, 3, str(v)) for v in range(20) for n in range(2)]
    assert "19 videos" in scores.grounding(rows[:38])["event_intervals"]
    assert "event_intervals" not in scores.grounding(rows)


@pytest.mark.soak
def test_how_often_an_interval_covers_the_truth():
    """The figures that `doubt` gives: 10 queries per video, whose IoUs have a share in common with their video's."""
    rng = np.random.default_rng(0)
    for videos, expected in ((2, 0.51), (5, 0.8), (20, 0.92)):
        covered = 0
        for _ in range(300):
            values = rng.normal(size=(videos, 1)) + rng.normal(size=(videos, 10))
            low, high = scores.interval(values.ravel(), np.repeat(np.arange(videos), 10).tolist())
            covered += low <= 0 <= high
        assert covered / 300 == pytest.approx(expected, abs=0.08)
