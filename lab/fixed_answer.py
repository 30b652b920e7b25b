"""The scores of one answer for all queries: what is reached without a video and without a query.

    python -m lab.fixed_answer train.txt --annotations test.txt

Takes the span that has the highest mean IoU with the segments of train.txt: in seconds, or in shares of the video's
duration where all durations are known and shares do better there. Prints its scores on test.txt as evaluate.py has
them, with "fixed_answer", that span.
"""
import json
from dataclasses import MISSING, dataclass

import numpy as np

import data
import evaluate
from engine import scores
from engine.flags import command_line, flag

POINTS = 60     # as many quantiles of the starts are tried, and of the ends


@dataclass(kw_only=True)
class Config:
    """the best one answer"""
    train: str = flag(MISSING, "annotation file that the answer is chosen on", positional=True)
    annotations: str = flag(MISSING, "annotation file to score the answer on")


def main(config: Config) -> evaluate.Metrics:
    """Print and return the scores."""
    train, _ = data.read(config.train, None)
    samples, rejected = data.read(config.annotations, None)
    unusable = [item.sample for item in rejected if item.sample]
    answer, spans = fixed_answer(train, samples)
    predictions = []
    for sample, (start, end) in zip(samples, spans, strict=True):
        row = {"task": "TVG", "id": sample.id, "video": sample.video, "query": sample.query,
               "start": start, "end": end, "truth": (sample.start, sample.end)}
        row["iou"] = evaluate.iou(row, row["truth"])
        predictions.append(row)
    qids = {sample.id: sample.qid for sample in samples}
    metrics = evaluate.summarise(predictions, unusable, qids)
    metrics |= {"fixed_answer": list(answer), "rejected": len(rejected),
                "rejected_as_0": len(unusable)}
    print(json.dumps(metrics))
    return metrics


def fixed_answer(train: list[data.Sample], samples: list[data.Sample],
                 ) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """(the best answer for `train`, in seconds or in shares of the duration; the seconds that it says of each of
    `samples`)."""
    truths = np.array([(sample.start, sample.end) for sample in train])         # (n, 2) seconds
    answer = best_span(truths)
    scales = [1.0] * len(samples)
    if all(sample.duration for sample in train + samples):
        shares = truths / np.array([[sample.duration] for sample in train])     # (n, 2)
        share = best_span(shares)
        if mean_iou(share, shares) > mean_iou(answer, truths):
            answer = share
            scales = [sample.duration for sample in samples]
    start, end = answer
    return answer, [(start * scale, end * scale) for scale in scales]


def best_span(truths: np.ndarray) -> tuple[float, float]:
    """The span with the highest mean IoU with all of `truths` (n, 2), among those between POINTS quantiles of their
    starts and as many of their ends."""
    shares = np.linspace(0, 1, POINTS)
    starts = np.unique(np.quantile(truths[:, 0], shares, method="nearest"))
    ends = np.unique(np.quantile(truths[:, 1], shares, method="nearest"))
    spans = [(float(start), float(end)) for start in starts for end in ends if end > start]
    return max(spans, key=lambda span: mean_iou(span, truths))


def mean_iou(span: tuple[float, float], truths: np.ndarray) -> float:
    return float(scores.ious(np.array(span), truths).mean())


if __name__ == "__main__":
    command_line(Config, main, __doc__)
