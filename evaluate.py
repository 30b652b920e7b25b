"""R1@m and mIoU of temporal grounding, and the accuracy of VC, AR and VD, on an annotation file.

    python evaluate.py --model DIR --annotations test.txt --videos DIR --output runs/x/test
    python evaluate.py ... --blind          the same with every frame grey: what the queries alone give away

R1@m is the share of queries whose answer has IoU >= m, mIoU the mean IoU. An answer that cannot be parsed and a video
that cannot be read count with IoU 0, and are counted. VC, AR and VD are judged by the rewards of training (Eq. 5-7).
Writes config.json, predictions.jsonl (a line a query and task, with the completion) and scores.json to --output.
"""
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import grpo
import launch
import model
import rewards
import tasks
import video


@dataclass
class Config:
    model: str = field(metadata={"help": "Hugging Face folder of a Qwen2.5-VL"})
    annotations: str = field(metadata={"help": "Charades-STA text file"})
    videos: str = field(metadata={"help": "folder of the video files"})
    output: str = field(metadata={"help": "folder for predictions and scores"})
    tasks: list[str] = field(default_factory=lambda: list(tasks.TASKS), metadata={"help": "what to evaluate"})
    steps: int = field(default=0, metadata={"help": "batches a task, 0 for all"})
    batch_size: int = field(default=16, metadata={"help": "queries at once"})
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily, 1 samples as training does"})
    seed: int = field(default=0, metadata={"help": "of the sampling, when temperature is above 0"})
    max_tokens: int = field(default=1024, metadata={"help": "longest completion"})
    total_pixels: int = field(default=video.TOTAL_PIXELS, metadata={"help": "pixels of all frames of a video"})
    blind: bool = field(default=False, metadata={"help": "show grey frames instead of the video"})


def main(config: Config) -> dict[str, float]:
    """Evaluate and return the scores, which are also in scores.json."""
    rank, world, device = launch.start_process()
    unknown = sorted(set(config.tasks) - set(tasks.TASKS))
    if unknown or not config.tasks:
        raise ValueError(f"--tasks {' '.join(unknown)}: choose from {' '.join(tasks.TASKS)}")
    samples, rejected = data.read(config.annotations, config.videos)
    policy, encoder = model.load(config.model, device, torch.float32 if device == "cpu" else torch.bfloat16)
    load = partial(video.load, total_pixels=config.total_pixels)
    output, rows = Path(config.output), []
    for name in config.tasks:
        task = tasks.TASKS[name]
        pool = tasks.with_verb(samples) if task.segment else samples
        batches = [pool[i:i + config.batch_size] for i in range(0, len(pool), config.batch_size)]
        batches = batches[:config.steps or None]
        mine = []
        for number in tqdm(range(rank, len(batches), world), desc=name, disable=rank > 0, dynamic_ncols=True):
            mine += answer(config, policy, encoder, task, batches[number], number * config.batch_size,
                           lambda path: load(path).grey() if config.blind else load(path))
        rows += launch.gather(mine)
    scores = summarise(rows)
    scores["rejected"] = len(rejected)
    if rank == 0:
        launch.write_config(config, output)
        launch.write_whole(output / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        launch.write_whole(output / "scores.json", json.dumps(scores, indent=2) + "\n")
    return scores


def answer(config: Config, policy, encoder, task: tasks.Task, batch: list, first: int, load: Callable) -> list[dict]:
    """A prediction row for each sample of a batch; `first` is the number of the first, for its random numbers."""
    rows, prompts, generators = [], [], []
    for number, sample in enumerate(batch, first):
        row = {"id": sample.id, "task": task.name, "video": sample.video, "query": sample.query}
        try:
            prompts.append(tasks.prepare(sample, task, encoder, load))
            generators.append(torch.Generator().manual_seed(config.seed * 1_000_003 + number))
        except video.VideoError as error:
            row["error"] = str(error)
        rows.append(row)
    texts = iter(())
    if prompts:
        rollouts = grpo.rollout(policy, prompts, 1, config.max_tokens, encoder.stop_ids,
                                generators if config.temperature > 0 else None, config.temperature or 1.0)
        texts = iter(encoder.decode(rollouts.completions[:, 0], rollouts.mask[:, 0]))
    for row, sample in zip(rows, batch):
        text = "" if "error" in row else next(texts)
        parts = task.reward(text, sample).parts
        row.update({"completion": text, **parts})
        if task.name == "TVG":
            span = rewards.span(text)
            row.update({"start": span[0], "end": span[1]} if span else {"start": None, "end": None})
    return rows


def summarise(rows: list[dict]) -> dict[str, float]:
    """Prediction rows -> mIoU, R1@0.3/0.5/0.7, VC, AR, VD accuracy, and counts of what went wrong."""
    scores = {}
    iou = np.array([row["iou"] for row in rows if row["task"] == "TVG"])
    if len(iou):
        scores.update({"queries": len(iou), "mIoU": float(iou.mean())},
                      **{f"R1@{m}": float((iou >= m).mean()) for m in (0.3, 0.5, 0.7)})
        scores["unparsable"] = sum(row["task"] == "TVG" and row["start"] is None for row in rows)
    for name in tasks.INVERSIONS:
        right = [row[name.lower()] for row in rows if row["task"] == name]
        if right:
            scores[name] = float(np.mean(right))
    scores["unreadable"] = sum("error" in row for row in rows)
    scores["format"] = float(np.mean([row["format"] for row in rows]))
    return scores


def gain(before: list[dict], after: list[dict]) -> tuple[float, float, float]:
    """(mean, low, high): by how much the mean IoU rose from one list of TVG prediction rows to another of the same
    queries, with its 95 % interval, from a bootstrap over videos (queries of one video share its difficulty)."""
    old = {row["id"]: row["iou"] for row in before}
    by_video = {}
    for row in after:
        by_video.setdefault(row["video"], []).append(row["iou"] - old[row["id"]])
    sums = np.array([(sum(rises), len(rises)) for rises in by_video.values()])              # (videos, 2)
    draws = sums[np.random.default_rng(0).integers(len(sums), size=(2000, len(sums)))].sum(1)   # (2000, 2)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    return float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)


if __name__ == "__main__":
    launch.command_line(Config, lambda config: print(json.dumps(main(config))), __doc__)
