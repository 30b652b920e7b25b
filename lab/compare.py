"""Two evaluations of the same queries, query by query: the difference of every score and its 95 % interval.

    python -m lab.compare A B                 A minus B; folders that evaluate.py wrote
    python -m lab.compare A0 B0 A1 B1 ...     several pairs, such as seeds, and the mean over them

The interval is of a bootstrap over videos: it tells how sure the difference is for these two models, not for other
seeds. What else a folder has in narrated.jsonl (of toy.py) is compared, too.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

from engine import scores

LEFT_OUT = {"start", "end"}         # numbers of a row that are no scores


def read_values(folder: str) -> dict[str, dict[str, tuple[str, float]]]:
    """{score: {query: (video, value)}} of an evaluation. Raises ValueError when there is none."""
    rows = []
    for name in ("predictions.jsonl", "narrated.jsonl"):
        path = Path(folder) / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            rows += [json.loads(line) for line in lines]
        except ValueError as error:
            raise ValueError(f"{path}: is no JSON lines file ({error}); evaluate again") from error
    if not rows:
        raise ValueError(f"{folder}: has no predictions.jsonl; give folders that evaluate.py wrote to")
    found = {}
    for row in rows:
        numbers = {key: value for key, value in row.items() if type(value) in (int, float) and key not in LEFT_OUT}
        if "iou" in numbers:
            numbers |= {f"R1@{m}": float(numbers["iou"] >= m - scores.TIE) for m in scores.THRESHOLDS}
        numbers["format" if row.get("task") == "TVG" else f"format {row.get('task')}"] = numbers.pop("format", 0.0)
        for key, value in numbers.items():
            found.setdefault(key, {})[row["id"]] = row["video"], float(value)
    tvg = [row for row in rows if row.get("task") == "TVG" and "truth" in row]
    for key, of in zip(("right_event", "same_answer"), scores.follows_query(tvg)):
        found[key] = of
    return found


def compare(one: str, other: str) -> dict[str, tuple[float, float, float, float, float]]:
    """{score: (value of one, of the other, difference, low, high)} over the queries that both have."""
    ones, others, found = read_values(one), read_values(other), {}
    for key in ones:
        shared = [name for name in ones[key] if name in others.get(key, ())]
        if shared and len({ones[key][name][0] for name in shared}) > 1:
            a, b = (np.array([of[key][name][1] for name in shared]) for of in (ones, others))
            low, high = scores.interval((a - b)[:, None], [ones[key][name][0] for name in shared])
            found[key] = float(a.mean()), float(b.mean()), float((a - b).mean()), float(low[0]), float(high[0])
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folders", nargs="+", help="A B, or A0 B0 A1 B1 ...")
    folders = parser.parse_args(argv).folders
    try:
        if len(folders) % 2:
            raise ValueError(f"{len(folders)} folders: give pairs")
        pairs = [compare(*pair) for pair in zip(folders[::2], folders[1::2])]
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    for key in pairs[0]:
        for pair in pairs:
            if key in pair:
                print("{:14}{:8.3f} - {:.3f} = {:+.3f} ({:+.3f} to {:+.3f})".format(key, *pair[key]))
        if len(pairs) > 1:
            differences = [pair[key][2] for pair in pairs if key in pair]
            print(f"{'':14}mean {np.mean(differences):+.3f}, from {min(differences):+.3f} to {max(differences):+.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
