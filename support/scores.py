"""Statistics of answers: mIoU, R1@m, and how sure they are."""
from collections.abc import Sequence

import numpy as np

THRESHOLDS = (0.3, 0.5, 0.7)        # m of R1@m


def measure(ious: Sequence[float], videos: Sequence[str | None]) -> dict[str, float | list[float]]:
    """mIoU, R1@m (IoU >= m) and R1>m (IoU > m), with 95 % intervals where the videos are known, and more than one."""
    iou = np.array(ious)
    values = {"mIoU": iou}
    for m in THRESHOLDS:
        values.update({f"R1@{m}": iou >= m, f"R1>{m}": iou > m})
    scores = {name: float(value.mean()) for name, value in values.items()}
    if None not in videos and len(set(videos)) > 1:
        lows, highs = interval(np.stack(list(values.values()), axis=1), videos)
        scores.update((f"{name}_95", [low, high]) for name, low, high in zip(values, lows.tolist(), highs.tolist()))
    return scores


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
