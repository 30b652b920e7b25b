"""Statistics by hand: whether answers follow the query, the best fixed answer, and IoU of arrays."""
import numpy as np
import pytest

import rewards
from support import scores


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


def test_best_fixed_span_is_found():
    truths = np.array([[0, 10], [0, 9], [1, 10], [0, 11], [30, 31]], dtype=float)
    best = scores.best_fixed_span(truths)
    means = {(a, b): scores.ious(np.array([a, b]), truths).mean() for a in (0.0, 1.0, 30.0)
             for b in (9.0, 10.0, 11.0, 31.0) if b > a}
    assert best == max(means, key=means.get) == (0.0, 10.0)
