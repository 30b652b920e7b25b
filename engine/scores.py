"""Statistics of predictions: mIoU, R1@m, whether answers follow the query, and how sure all of it is.

A prediction is a dict with "id", "video", "query", "truth" (the true segment), "start" and "end" (the answer, or None)
in seconds, and "iou" (see evaluate.py).
"""
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np

THRESHOLDS = (0.3, 0.5, 0.7)        # m of R1@m
TIE = 1e-9      # an IoU this near to m is m: 9.1 / 13.0 is 0.7, but comes out as 0.6999999999999998
ENOUGH = 20     # videos; from fewer, a bootstrap's interval is too narrow


def measure(ious: Sequence[float],
            videos: Sequence[str]) -> dict[str, float | list[float] | str]:
    """mIoU, R1@m (IoU >= m) and R1>m (IoU > m) of the queries of these videos, with 95 % intervals where there is more
    than one video; "intervals" says so if these are too few."""
    iou = np.array(ious)                                    # (n,)
    values = {"mIoU": iou}
    for m in THRESHOLDS:
        values[f"R1@{m}"] = iou >= m - TIE
        values[f"R1>{m}"] = iou > m + TIE
    scores = {name: float(value.mean()) for name, value in values.items()}
    if len(set(videos)) > 1:
        for name, value in values.items():
            scores[f"{name}_95"] = list(interval(value, videos))
        scores |= doubt("intervals", videos)
    return scores


def doubt(name: str, videos: Sequence[str]) -> dict[str, str]:
    """{name: why intervals from so few videos are not to be trusted}; empty where they are."""
    n = len(set(videos))
    if n >= ENOUGH:
        return {}
    return {name: f"too narrow, from {n} videos: such a 95 % interval covers about 51 % with 2 "
                  f"videos, 80 % with 5, 92 % with {ENOUGH}"}


def interval(values: np.ndarray, videos: Sequence[str]) -> tuple[float, float]:
    """(low, high): the 95 % interval of the mean of `values` (n,), from a bootstrap over videos, since the queries of
    one video share its difficulty."""
    numbers = {video: number for number, video in enumerate(dict.fromkeys(videos))}
    number = [numbers[video] for video in videos]
    sums = np.bincount(number, weights=values)                                  # (videos,)
    counts = np.bincount(number)                                                # (videos,)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(numbers), size=(2000, len(numbers)))               # (2000, videos)
    means = sums[drawn].sum(1) / counts[drawn].sum(1)                           # (2000,)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def difference(before: list[dict], after: list[dict]) -> tuple[float, float, float]:
    """(mean, low, high): by how much mIoU rose from one list of predictions to another of the same queries, in any
    order, with its 95 % interval."""
    old = {row["id"]: row["iou"] for row in before}
    rises = np.array([row["iou"] - old[row["id"]] for row in after])
    return float(rises.mean()), *interval(rises, [row["video"] for row in after])


def ious(spans: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """IoU of time spans (..., 2) and true ones (..., 2); 0 where a span has a NaN, or no length."""
    start, end = spans[..., 0], spans[..., 1]
    true_start, true_end = truths[..., 0], truths[..., 1]
    shared = np.minimum(end, true_end) - np.maximum(start, true_start)
    union = end - start + true_end - true_start - shared
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((end > start) & (shared > 0), shared / union, 0.0)


def disjoint(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two segments, (start, end), have no time in common."""
    return one[1] <= other[0] or other[1] <= one[0]


def follows_query(predictions: list[dict],
                  ) -> tuple[dict[str, tuple[str, float]], dict[str, tuple[str, float]]]:
    """Over the pairs of queries of one video whose true segments are disjoint: {query: (video, whether its answer has
    more IoU with its own truth than with that of any other of them)}, and {pair: (video, whether both got the same
    answer)}."""
    in_video = defaultdict(list)
    for row in predictions:
        in_video[row["video"]].append(row)
    right, same = {}, {}
    for video, rows in in_video.items():
        for a, b in combinations(rows, 2):
            if a["query"] == b["query"] or not disjoint(a["truth"], b["truth"]):
                continue
            answers = np.array([[row["start"], row["end"]] for row in (a, b)], dtype=float)
            truths = np.array([a["truth"], b["truth"]], dtype=float)
            is_right = ious(answers, truths) > ious(answers, truths[::-1])      # (2,)
            for row, value in zip((a, b), is_right):
                right.setdefault(row["id"], (video, 1.0))
                if not value:
                    right[row["id"]] = video, 0.0
            # no answer is NaN, which equals nothing
            same[f"{a['id']} {b['id']}"] = video, float((answers[0] == answers[1]).all())
    return right, same


def grounding(predictions: list[dict]) -> dict[str, float | list[float] | str]:
    """Whether answers follow the query: the means of `follows_query`, right_event and same_answer. An answer that
    ignores the query is right for one event of a video at most, and always the same. Empty when no video has several
    queries of disjoint segments."""
    right, same = follows_query(predictions)
    if not right:
        return {}
    scores = {"event_queries": len(right), "event_pairs": len(same)}
    for name, judged in (("right_event", right), ("same_answer", same)):
        videos, values = zip(*judged.values())
        scores[name] = float(np.mean(values))
        if len(set(videos)) > 1:
            scores[f"{name}_95"] = list(interval(np.array(values), videos))
            scores |= doubt("event_intervals", videos)
    return scores
