"""Statistics by hand: whether answers follow the query, the best fixed answer, and IoU of arrays."""
import numpy as np
import pytest

import rewards
from engine import scores


def row(number, query, truth, start, end, video="a"):
    return {"task": "TVG", "id": f"{video}:{number}", "video": video, "query": query, "truth": truth, "start": start,
            "end": end}


def test_right_event_and_same_answer_by_hand():
    rows = [row(1, "rise", [0, 4], 0, 4), row(2, "fall", [5, 9], 0, 4), row(3, "spin", [9, 12], 8, 12),
            row(1, "rise", [0, 4], None, None, "b"), row(2, "fall", [6, 8], 3, 7, "b"),
            row(1, "rise", [0, 4], 0, 4, "c"),                                                      # alone
            row(1, "rise", [0, 4], 0, 4, "d"), row(2, "fall", [3, 6], 0, 4, "d")]                   # not disjoint
    found = scores.grounding(rows)
    assert found["right_event"] == pytest.approx(3 / 5)     # a:1, a:3 and b:2
    assert found["same_answer"] == pytest.approx(1 / 4)     # a:1 and a:2, of three pairs in a and one in b
    assert found["event_queries"] == 5 and found["event_pairs"] == 4
    assert 0 <= found["right_event_95"][0] < 3 / 5 < found["right_event_95"][1] <= 1
    assert scores.grounding(rows[5:]) == {} == scores.grounding([])


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
    found = scores.measure([tie, 0.7 - 1e-6, 0.7 + 1e-12, 0.7 + 1e-6], [None] * 4)
    assert found["R1@0.7"] == 3 / 4 and found["R1>0.7"] == 1 / 4
    for m in scores.THRESHOLDS:         # every truth of n tenths of a second whose share m is exact
        ties = [rewards.iou((start, start + n / 10), (start, start + n * round(10 * m) / 100))
                for start in (0.0, 0.1, 7.3) for n in range(10, 400, 10)]
        found = scores.measure(ties, [None] * len(ties))
        assert found[f"R1@{m}"] == 1 and found[f"R1>{m}"] == 0 and len(set(ties)) > 1


def test_intervals_of_few_videos_are_doubted():
    ious = [0.1, 0.9] * 20
    few = scores.measure(ious, [str(i % 19) for i in range(40)])
    assert "mIoU_95" in few and "19 videos" in few["intervals"]
    assert "intervals" not in scores.measure(ious, [str(i % 20) for i in range(40)])
    assert "intervals" not in scores.measure(ious, ["one"] * 40)           # has no interval
    rows = [row(n, f"q{n}", [4 * n, 4 * n + 3], 0, 3, str(v)) for v in range(20) for n in range(2)]
    assert "19 videos" in scores.grounding(rows[:38])["event_intervals"]
    assert "event_intervals" not in scores.grounding(rows)


@pytest.mark.soak
def test_how_often_an_interval_covers_the_truth():
    """The figures that `doubt` gives: 10 queries a video, whose IoUs share a part of their own with their video's."""
    rng = np.random.default_rng(0)
    covered = {}
    for n in (2, 5, 20):
        hits = []
        for _ in range(300):
            values = rng.normal(size=(n, 1)) + rng.normal(size=(n, 10))
            (low,), (high,) = scores.interval(values.reshape(-1, 1), np.repeat(np.arange(n), 10).tolist())
            hits.append(low <= 0 <= high)
        covered[n] = np.mean(hits)
    assert covered[2] == pytest.approx(0.51, abs=0.08) and covered[5] == pytest.approx(0.8, abs=0.07)
    assert covered[20] == pytest.approx(0.92, abs=0.05)


def test_best_fixed_span_is_found():
    truths = np.array([[0, 10], [0, 9], [1, 10], [0, 11], [30, 31]], dtype=float)
    best = scores.best_fixed_span(truths)
    means = {(a, b): scores.ious(np.array([a, b]), truths).mean() for a in (0.0, 1.0, 30.0)
             for b in (9.0, 10.0, 11.0, 31.0) if b > a}
    assert best == max(means, key=means.get) == (0.0, 10.0)
