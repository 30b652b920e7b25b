"""Two evaluations of the same queries, query by query: the difference of every score and its 95 % interval.

    python -m lab.compare A B                 A minus B; folders that evaluate.py wrote
    python -m lab.compare A0 B0 A1 B1 ...     several pairs, such as seeds, and the mean over them

The interval is of a bootstrap over videos: it tells how sure the difference is for these two models, not for other
seeds. What else a folder has in narrated.jsonl (of toy.py) is compared, too.
"""
import json
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from engine import scores
from engine.flags import command_line, flag

NO_SCORES = {"start", "end"}        # other numbers of a prediction


@dataclass(kw_only=True)
class Config:
    """comparison"""
    folders: list[str] = flag(MISSING, "A B, or A0 B0 A1 B1 ...", positional=True)


def read_scores(folder: str) -> pd.DataFrame:
    """The scores of an evaluation, one row per score and query: score (its name), query (its id), video, value.
    Raises ValueError when there are none."""
    predictions = []
    for name in ("predictions.jsonl", "narrated.jsonl"):
        path = Path(folder) / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            predictions += [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON lines file ({error}); evaluate again") from error
    if not predictions:
        raise ValueError(f"{folder}: has no predictions.jsonl; give folders that evaluate.py wrote "
                         "to")
    rows = []
    for prediction in predictions:
        for name, value in scores_of(prediction).items():
            rows.append((name, prediction["id"], prediction["video"], value))
    grounded = [row for row in predictions if row.get("task") == "TVG"]
    judged = zip(("right_event", "same_answer"), scores.follows_query(grounded))
    for name, values in judged:
        rows += [(name, query, video, value) for query, (video, value) in values.items()]
    return pd.DataFrame(rows, columns=["score", "query", "video", "value"])


def scores_of(prediction: dict) -> dict[str, float]:
    """All scores of one prediction by name; the format of each task but TVG is a score of its own."""
    values = {}
    for name, value in prediction.items():
        if type(value) in (int, float) and name not in NO_SCORES:
            values[name] = float(value)
    if "iou" in values:
        for m in scores.THRESHOLDS:
            values[f"R1@{m}"] = float(values["iou"] >= m - scores.TIE)
    if "format" in values:
        name = "format" if prediction["task"] == "TVG" else f"format {prediction['task']}"
        values[name] = values.pop("format")
    return values


def compare(one: str, other: str) -> dict[str, tuple[float, float, float, float, float]]:
    """{score: (mean of one, of the other, difference, low, high)} over the queries that both folders have."""
    both = read_scores(one).merge(read_scores(other).drop(columns="video"), on=["score", "query"])
    differences = {}
    for name, rows in both.groupby("score", sort=False):
        if rows.video.nunique() > 1:
            ones, others = rows.value_x.to_numpy(), rows.value_y.to_numpy()
            low, high = scores.interval(ones - others, list(rows.video))
            differences[name] = (float(ones.mean()), float(others.mean()),
                                 float((ones - others).mean()), low, high)
    return differences


def main(config: Config) -> None:
    """Print a line per score and pair, and of several pairs the mean."""
    folders = config.folders
    if len(folders) % 2:
        raise ValueError(f"{len(folders)} folders: give pairs")
    pairs = [compare(one, other) for one, other in zip(folders[::2], folders[1::2])]
    for name in pairs[0]:
        differences = []
        for pair in pairs:
            if name in pair:
                one, other, difference, low, high = pair[name]
                differences.append(difference)
                print(f"{name:14}{one:8.3f} - {other:.3f} = {difference:+.3f} "
                      f"({low:+.3f} to {high:+.3f})")
        if len(pairs) > 1:
            print(f"{'':14}mean {np.mean(differences):+.3f}, from {min(differences):+.3f} to "
                  f"{max(differences):+.3f}")


if __name__ == "__main__":
    command_line(Config, main, __doc__)
