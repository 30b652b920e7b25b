"""Statistics of answers: mIoU, R1@m, whether they follow the query, and how sure all of it is."""
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

THRESHOLDS = (0.3, 0.5, 0.7)        # m of R1@m
TIE = 1e-9      # an IoU this near to m is m: 9.1 / 13.0 is 0.7, but comes out as 0.6999999999999998
ENOUGH = 20     # videos; from fewer, a bootstrap's interval is too narrow


def measure(ious: Sequence[float], videos: Sequence[str | None]) -> dict[str, float | list[float] | str]:
    """mIoU, R1@m (IoU >= m) and R1>m (IoU > m), with 95 % intervals where the videos are known, and more than one;
    "intervals" says so if these are too few."""
    iou = np.array(ious)
    values = {"mIoU": iou}
    for m in THRESHOLDS:
        values.update({f"R1@{m}": iou >= m - TIE, f"R1>{m}": iou > m + TIE})
    scores = {name: float(value.mean()) for name, value in values.items()}
    if None not in videos and len(set(videos)) > 1:
        lows, highs = interval(np.stack(list(values.values()), axis=1), videos)
        scores.update((f"{name}_95", [low, high]) for name, low, high in zip(values, lows.tolist(), highs.tolist()))
        scores.update(doubt("intervals", videos))
    return scores


def doubt(name: str, videos: Sequence[str]) -> dict[str, str]:
    """{name: why intervals from so few videos are not to be trusted}; empty where they are."""
    n = len(set(videos))
    return {} if n >= ENOUGH else {name: f"too narrow, from {n} videos: such a 95 % interval covers about 51 % with 2 "
                                         f"videos, 80 % with 5, 92 % with {ENOUGH}"}


def interval(values: np.ndarray, videos: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(low, high), each (k,): 95 % intervals of the means of `values` (n, k), from a bootstrap over videos, since the
    queries of one video share its difficulty."""
    number = {path: i for i, path in enumerate(dict.fromkeys(videos))}
    sums = np.zeros((len(number), values.shape[1] + 1))                                         # (videos, k + 1)
    np.add.at(sums, [number[path] for path in videos], np.column_stack([values, np.ones(len(values))]))
    drawn = np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))                # (2000, videos)
    *totals, counts = (column[drawn].sum(1) for column in sums.T)                               # (2000,) each
    return tuple(np.quantile(np.stack(totals) / counts, (0.025, 0.975), axis=1))


def difference(before: list[dict], after: list[dict], key: str = "iou") -> tuple[float, float, float]:
    """(mean, low, high): by how much the mean of `key` rose from one list of prediction rows to another of the same
    queries, with its 95 % interval."""
    old = {row["id"]: row[key] for row in before}
    rises = np.array([row[key] - old[row["id"]] for row in after])
    low, high = interval(rises[:, None], [row["video"] for row in after])
    return float(rises.mean()), float(low[0]), float(high[0])


def ious(spans: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """IoU of time spans (..., 2) and true ones (..., 2); 0 where a span has a NaN, or no length."""
    shared = np.minimum(spans[..., 1], truths[..., 1]) - np.maximum(spans[..., 0], truths[..., 0])
    union = spans[..., 1] - spans[..., 0] + truths[..., 1] - truths[..., 0] - shared
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((spans[..., 1] > spans[..., 0]) & (shared > 0), shared / union, 0.0)


def follows_query(rows: list[dict]) -> tuple[dict[str, tuple[str, float]], dict[str, tuple[str, float]]]:
    """Over the pairs of queries of one video whose true segments are disjoint: {query: (video, whether its answer has
    more IoU with its own truth than with that of any other of them)}, and {pair: (video, whether both got the same
    answer)}."""
    videos, right, same = {}, {}, {}
    for row in rows:
        videos.setdefault(row["video"], []).append(row)
    for pairs in (combinations(of_one, 2) for of_one in videos.values()):
        for a, b in pairs:
            disjoint = a["truth"][1] <= b["truth"][0] or b["truth"][1] <= a["truth"][0]
            if a["query"] == b["query"] or not disjoint:
                continue
            answers = np.array([[row["start"], row["end"]] for row in (a, b)], dtype=float)     # NaN: no answer
            truths = np.array([a["truth"], b["truth"]], dtype=float)
            for row, beats in zip((a, b), ious(answers, truths) > ious(answers, truths[::-1])):
                right[row["id"]] = row["video"], float(beats) * right.get(row["id"], (None, 1.0))[1]
            same[f"{a['id']} {b['id']}"] = a["video"], float((answers[0] == answers[1]).all())
    return right, same


def grounding(rows: list[dict]) -> dict[str, float | list[float] | str]:
    """Whether answers follow the query: the means of `follows_query`, right_event and same_answer. An answer that
    ignores the query is right for one event of a video at most, and always the same. Empty when no video has several
    queries of disjoint segments."""
    right, same = follows_query(rows)
    if not right:
        return {}
    found = {"event_queries": len(right), "event_pairs": len(same)}
    for name, of in (("right_event", right), ("same_answer", same)):
        videos, values = zip(*of.values())
        found[name] = float(np.mean(values))
        if len(set(videos)) > 1:
            low, high = interval(np.array(values)[:, None], videos)
            found[f"{name}_95"] = [float(low[0]), float(high[0])]
            found.update(doubt("event_intervals", videos))
    return found


def swap_queries(samples: list) -> list:
    """The samples with another event in their video, each with that one's query, the next in the file. A model that
    grounds finds that event and scores about 0; one that guesses scores as before."""
    disjoint = lambda a, b: a.query != b.query and (a.end <= b.start or b.end <= a.start)
    swapped, videos = [], {}
    for sample in samples:
        videos.setdefault((sample.video, sample.video_start, sample.video_end), []).append(sample)
    for sample in samples:
        of_one = videos[sample.video, sample.video_start, sample.video_end]
        place = of_one.index(sample)
        others = [other for other in of_one[place + 1:] + of_one[:place] if disjoint(sample, other)]
        swapped += [replace(sample, query=others[0].query)] if others else []
    if not swapped:
        raise ValueError("--swap_queries: no video has two queries whose segments do not overlap")
    return swapped


def best_fixed_span(truths: np.ndarray, points: int = 60) -> tuple[float, float]:
    """The time span with the highest mean IoU with all of `truths` (n, 2), among those between `points` quantiles of
    their starts and as many of their ends."""
    starts, ends = (np.unique(np.quantile(column, np.linspace(0, 1, points), method="nearest")) for column in truths.T)
    spans = np.array([(start, end) for start in starts for end in ends if end > start])
    means = [ious(span, truths).mean() for span in spans]
    return tuple(spans[int(np.argmax(means))].tolist())
