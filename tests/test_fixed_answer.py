"""The best one answer for all queries, by hand: in seconds, and in shares of the duration."""
import json

import numpy as np
import pytest

from lab import fixed_answer


def score(tmp_path, train, test):
    for name, text in (("train", train), ("test", test)):
        (tmp_path / name).write_text(text)
    return fixed_answer.main(fixed_answer.Config(train=str(tmp_path / "train"), annotations=str(tmp_path / "test")))


def test_seconds_where_durations_are_unknown(tmp_path, capsys):
    train = "".join(f"V{i} 2 6##he sits.\n" for i in range(9)) + "W 8 9##he eats.\n"
    found = score(tmp_path, train, "A 2 6##he sits.\nA 6 8##he eats.\nB 2 4##he runs.\nB 3 3##he naps.\n")
    assert json.loads(capsys.readouterr().out) == found
    assert found["fixed_answer"] == [2, 6] and found["mIoU"] == pytest.approx((1 + 0 + 0.5) / 4)
    assert found["right_event"] == 0.5 and found["same_answer"] == 1
    assert [found[name] for name in ("queries", "rejected", "rejected_as_0")] == [4, 1, 1]


def test_shares_where_they_are_better(tmp_path):
    halves = {f"v{i}": {"duration": 10 * i, "timestamps": [[5 * i, 10 * i]], "sentences": ["he sits"]}
              for i in (1, 3, 9)}
    test = {"x": {**halves["v1"], "duration": 8, "timestamps": [[4, 8]]}}
    found = score(tmp_path, json.dumps(halves), json.dumps(test))
    assert found["fixed_answer"] == [0.5, 1] and found["mIoU"] == 1
    same = {f"v{i}": {"duration": 10 * i, "timestamps": [[2, 6]], "sentences": ["he sits"]} for i in (1, 3, 9)}
    assert score(tmp_path, json.dumps(same), json.dumps(test))["fixed_answer"] == [2, 6]


def test_the_best_span():
    truths = np.array([[0, 10], [0, 9], [1, 10], [0, 11], [30, 31]], dtype=float)
    spans = [(start, end) for start in (0.0, 1.0, 30.0) for end in (9.0, 10.0, 11.0, 31.0) if end > start]
    means = [fixed_answer.mean_iou(span, truths) for span in spans]
    assert fixed_answer.best_span(truths) == spans[int(np.argmax(means))] == (0.0, 10.0)
