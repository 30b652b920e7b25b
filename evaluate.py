"""R1@m and mIoU of temporal grounding, and the accuracy of VC, AR and VD, on an annotation file.

    python evaluate.py --model DIR --annotations test.txt --videos DIR --output runs/x/test
    torchrun --nproc_per_node=8 evaluate.py ...     the same numbers on eight GPUs
    python evaluate.py ... --blind                  with every frame grey: what the queries alone give away
    python evaluate.py ... --tasks TVG --swap_queries   asks for another event of the video: what guessing gives
    python evaluate.py --fixed_answer train.txt --annotations test.txt  the best one answer for all; no model
    python evaluate.py --predictions FILE --annotations test.txt        scores answers, whoever gave them; no model

R1@m is the share of queries whose answer has IoU >= m (R1>m: IoU > m, as Time-R1 counts), mIoU the mean IoU. An answer
that cannot be parsed and a video that cannot be read count with IoU 0, and are counted; so do queries whose annotated
segment is unusable, "rejected_as_0" (11 of TVGBench's 800 have no length), but not with --steps or --swap_queries.
"..._95" is a 95 % interval; "intervals" says when videos are too few for it. Of a query with several windows
(QVHighlights) each is a sample; best_window_... has one value a qid, that of its best window. right_event and
same_answer tell whether answers follow the query: see engine/scores.py. VC, AR and VD are judged by the rewards of
training (Eq. 5-7).

Writes config.json, predictions.jsonl (a line a query and task, in the order of the annotations) and scores.json to
--output. Until the end each process appends its finished batches to predictions.rank<N>.jsonl; the same command again,
on any number of processes, goes on from there. Of a finished evaluation it only computes the scores again: delete the
folder to repeat it. Another config is refused; answers of a model or an annotation file that has changed since are
thrown away.

A line of a --predictions file tells the query and the answer, or an "error" (failed, IoU 0); predictions.jsonl is one:
    {"id": "AO8RW:1", "start": 0.4, "end": 6.5}     an id as data.py gives it, or "qid": 9769 of QVHighlights
    {"video": "AO8RW", "query": "a person is putting a book on a shelf.", "completion": "<answer>0.4 to 6.5</answer>"}
A completion that the reward of training could not read may have other forms, such as "00:12 - 00:17", which
engine/predictions.py lists; "lenient" counts the answers that needed it.
"""
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import data
import grpo
import model
import rewards
import tasks
from engine import distributed, files, flags, logs, lora, scores
from engine.batches import ahead
from engine.checkpoint import Evaluations
from engine.flags import AnswerFlags, VideoFlags, flag
from engine.loader import Loader
from engine.run import Run, one_run
from engine.video import Clip, VideoError
from lab import predictions


@dataclass(kw_only=True)
class Config(VideoFlags, AnswerFlags):
    """evaluation"""
    annotations: str = flag(MISSING, "annotation file of any of the formats that data.py lists")
    model: str = flag("", "Hugging Face folder of a Qwen2.5-VL")
    videos: str = flag("", "folder of the video files; --predictions needs none")
    output: str = flag("", "folder for predictions and scores; with --predictions, empty only prints the scores")
    predictions: str = flag("", "JSON lines of answers to score, instead of a model's")
    tasks: list[str] = flag(list(tasks.TASKS), "what to evaluate")
    steps: int = flag(0, "batches a task, 0 for all")
    batch_size: int = flag(16, "queries at once on a process; lab/plan.py says how many a GPU has room for")
    temperature: float = flag(0.0, "0 decodes greedily, 1 samples as training does")
    seed: int = flag(0, "of the sampling, when temperature is above 0")
    blind: bool = flag(False, "show grey frames instead of the video")
    swap_queries: bool = flag(False, "ask each video for another of its events, and score against the first one's "
                                     "truth; TVG alone, and only queries with a disjoint one in their video")
    fixed_answer: str = flag("", "annotation file: score the one answer for all queries that is the best for these")


@one_run
def main(config: Config) -> dict[str, float | list[float] | str]:
    """Evaluate and return the scores, which are also in scores.json."""
    check_flags(config)
    samples, rejected = data.read(config.annotations, config.videos or None)
    some = bool(config.steps or config.swap_queries or "TVG" not in config.tasks)       # of the queries, so not these
    lost = [item.sample for item in rejected if item.sample and not some]
    if config.predictions:
        rows, more = score_predictions(config.predictions, samples, lost)
    elif config.fixed_answer:
        rows, more = score_fixed_answer(data.read(config.fixed_answer, None)[0], samples)
    else:
        rows, more = predict(config, scores.swap_queries(samples) if config.swap_queries else samples), {}
    found = {**summarise(rows, lost, {sample.id: sample.qid for sample in samples}), **more,
             "rejected": len(rejected), "rejected_as_0": len(lost)}
    if config.predictions:
        del found["unreadable"]         # which is there "missing" and "failed"
    if config.output and os.environ.get("RANK", "0") == "0":
        files.write_config(config, config.output)
        files.write_whole(Path(config.output) / "scores.json", json.dumps(found, indent=2) + "\n")
    return found


def predict(config: Config, samples: list[data.Sample]) -> list[dict]:
    """The rows of all tasks, in the order of the annotations, from all processes; also in predictions.jsonl."""
    rank, world, device = distributed.start_process()
    output, (work, chosen) = Path(config.output), plan_batches(config, samples, device)
    key = lambda row: (row["task"], row["id"])
    done = distributed.gather([earlier_rows(config)] if rank == 0 else [])[0]    # the first process reads for all
    rows, new = {key(row): row for row in done}, []
    # A batch is answered as a whole or again, so that an answer never depends on where a run was interrupted.
    todo = [batch for batch in work if any((batch.task.name, sample.id) not in rows for sample in batch.samples)]
    if todo:
        policy, encoder = model.load(config.model, device, torch.float32 if device == "cpu" else torch.bfloat16)
        load = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb, config.workers)
        if rank == 0 and not done:
            for old in (*output.glob("predictions*.jsonl"), output / "scores.json"):
                old.unlink(missing_ok=True)
            files.write_whole(output / "inputs.json", json.dumps(input_files(config)) + "\n")
            files.write_config(config, output)
        distributed.gather([rank])                               # nobody writes an answer before its config is written
        mine, make = todo[rank::world], partial(encode_batch, config, encoder, load)
        unfinished = output / f"predictions.rank{rank}.jsonl"
        with ThreadPoolExecutor(1) as background, open(unfinished, "a") as part:
            upcoming = ahead(make, mine, background)
            for batch, prompts in tqdm(upcoming, "evaluate", total=len(mine), disable=rank > 0, dynamic_ncols=True):
                answered = answer_batch(config, policy, encoder, batch, prompts)
                part.write("\n" + "".join(json.dumps(row) + "\n" for row in answered))    # ends a torn line before it
                part.flush()
                new += answered
    rows.update((key(row), row) for row in distributed.gather(new))
    rows = [rows[name] for name in chosen]
    if rank == 0:
        files.write_whole(output / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for part in output.glob("predictions.rank*.jsonl"):
            part.unlink()
    return rows


def predict_with(config: Config, policy: model.Policy, encoder: model.Encoder, load: Loader,
                 samples: list[data.Sample]) -> list[dict]:
    """The rows that `predict` gives, of a model in training, inside of sharding.gathered; no file is written. Batches,
    and with them the answers, are the same for any number of processes."""
    rank, world, _ = distributed.start_process()
    work, chosen = plan_batches(config, samples, "cpu")     # a GPU's memory is for training
    nothing = encoder.encode("", Clip(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), 2.0))
    grpo.sample(policy, [nothing], 1, 1, encoder.stop_ids)     # gathers the weights, also where there is no work
    rows = []
    with ThreadPoolExecutor(1) as background:
        for batch, prompts in ahead(partial(encode_batch, config, encoder, load), work[rank::world], background):
            rows += answer_batch(config, policy, encoder, batch, prompts)
    found = {(row["task"], row["id"]): row for row in distributed.gather(rows)}
    return [found[name] for name in chosen]


def read_held_out(config: Any) -> list[data.Sample]:
    """The queries that a train.Config asks to evaluate on, for every seed the same ones; none without
    --eval_annotations."""
    if not config.eval_annotations:
        return []
    try:
        samples, rejected = data.read(config.eval_annotations, config.videos)
    except ValueError as error:
        raise ValueError(str(error).replace("--annotations", "--eval_annotations")
                         .replace("--videos", "--eval_videos")) from error
    chosen = sorted(np.random.default_rng(0).permutation(len(samples))[:config.eval_samples])
    if distributed.start_process()[0] == 0:
        logs.say(f"held out: {len(chosen)} of the {len(samples)} samples of {config.eval_annotations}, "
                   f"{len(rejected)} rejected")
    return [samples[i] for i in chosen]


class HeldOut:
    """Evaluation of a model in training on queries that it does not learn from; see engine/checkpoint.Evaluations. It
    draws nothing and leaves the policy as it is."""

    def __init__(self, config: Any, output: Path, step: int):
        """Uses the --eval_... flags and those of answers and decoding of a train.Config; `step`: steps done so far."""
        self.samples = read_held_out(config)
        if self.samples:
            self.config = Config(model=config.model, annotations=config.eval_annotations, think=config.think,
                                 max_tokens=config.max_tokens, workers=config.workers)
            self.evaluations = Evaluations(output, step, config.eval_every, config.steps)

    def evaluate_if_due(self, run: Run, policy: model.Policy, encoder: model.Encoder, load: Loader) -> None:
        """After run.step steps, on all processes: answer greedily, log the scores and keep the best model."""
        if not self.samples or not self.evaluations.due(run.step):
            return
        began = time.perf_counter()
        with distributed.gathered(policy):
            rows = predict_with(self.config, policy, encoder, load, self.samples)
        row = {"step": run.step, **summarise(rows), "seconds": time.perf_counter() - began}
        self.evaluations.add(row, partial(model.save, policy, encoder))
        run.evaluation(row)


@dataclass(frozen=True)
class Batch:
    """What is answered together."""
    task: tasks.Task
    numbers: tuple[int, ...]                # of the samples, from which their random numbers follow
    samples: tuple[data.Sample, ...]


def plan_batches(config: Config, samples: list[data.Sample],
                 device: str) -> tuple[list[Batch], list[tuple[str, str]]]:
    """What to answer: batches of all tasks, and (task, id) of every answer, in the order of the annotations."""
    work, chosen = [], []
    size = config.batch_size
    for task in (tasks.in_form(tasks.TASKS[name], config.think) for name in config.tasks):
        pool = list(enumerate(tasks.usable(samples, task)))[:config.steps * size or None]
        chosen += [(task.name, sample.id) for _, sample in pool]
        pool = by_length(pool, task)
        work += [Batch(task, *zip(*pool[i:i + size])) for i in range(0, len(pool), size)]
    return work, chosen


def by_length(pool: list[tuple[int, data.Sample]], task: tasks.Task) -> list[tuple[int, data.Sample]]:
    """(number, sample) sorted by the seconds of video to be seen, longest first, so that a batch has prompts of about
    one length and memory trouble shows at once. In TVG the queries of a video stay together: it is seen once."""
    last = {}       # where the duration is unknown, a video is at least as long as its last segment
    for _, sample in pool:
        last[sample.video] = max(sample.duration or 0.0, sample.end, last.get(sample.video, 0.0))
    seconds = lambda sample: sample.end - sample.start if task.sees_segment else last[sample.video]
    return sorted(pool, key=lambda item: (-seconds(item[1]), item[1].video, item[0]))


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a config that cannot work, or with which --output was not begun."""
    given = sum(map(bool, (config.model, config.predictions, config.fixed_answer)))
    if given != 1 or config.model and not (config.videos and config.output):
        raise ValueError("give either --model, with --videos and --output, or --predictions, a file of answers, or "
                         "--fixed_answer, a file of annotations")
    if config.swap_queries and (not config.model or config.tasks != ["TVG"]):
        raise ValueError("--swap_queries asks a --model about whole videos: give --tasks TVG with it")
    if not config.tasks or set(config.tasks) - set(tasks.TASKS) or len(set(config.tasks)) < len(config.tasks):
        raise ValueError(f"--tasks {' '.join(config.tasks)}: choose from {' '.join(tasks.TASKS)}, each once")
    flags.check_numbers(config, "max_tokens", "total_pixels", "cache_gb", "video_timeout", "workers")
    if config.model:
        lora.check(config.model)
    path = Path(config.output) / "config.json"
    if config.output and path.exists():
        old = files.read_config(path)
        if other := files.changed_flags(vars(config), old, {"output", "workers", "cache", "cache_gb"}):
            said = ", ".join(f"--{name} {old.get(name, '?')}" for name in other)
            raise ValueError(f"--output {config.output} holds a run with {said}; give another folder or delete it")


def input_files(config: Config) -> dict[str, list[int]]:
    """Size and time of change of the files that all answers depend on: a model trained anew is another model."""
    files = [Path(config.annotations), *(path for path in lora.files(config.model) if path.is_file())]
    return {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def earlier_rows(config: Config) -> list[dict]:
    """The rows that an earlier run left in --output; none if it had another model or other annotations. A line that is
    no row, torn by a kill, is left out, and so answered again."""
    output, rows = Path(config.output), []
    if not all((output / name).exists() for name in ("config.json", "inputs.json")):
        return []
    if json.loads((output / "inputs.json").read_text()) != input_files(config):
        logs.say(f"{output}: the model or the annotations have changed, so its answers are thrown away")
        return []
    for path in sorted(output.glob("predictions*.jsonl")):
        for line in path.read_text(errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            rows += [row] if isinstance(row, dict) and {"task", "id"} <= row.keys() else []
    return rows


def encode_batch(config: Config, encoder: model.Encoder, load: Loader,
                 batch: Batch) -> list[model.Prompt | VideoError]:
    """The Prompt of each sample, or the VideoError why there is none; several videos at a time, each decoded once."""
    def encode(of_one_video: Iterator[data.Sample]) -> list[model.Prompt | VideoError]:
        @lru_cache(maxsize=1)
        def see(*part) -> Clip:
            return load(*part).grey() if config.blind else load(*part)

        prompts = []
        for sample in of_one_video:
            try:
                prompts.append(tasks.prepare(sample, batch.task, encoder, see))
            except VideoError as error:
                prompts.append(error)
        return prompts

    videos = [list(samples) for _, samples in groupby(batch.samples, lambda sample: sample.video)]
    with ThreadPoolExecutor(config.workers) as threads:
        return sum(threads.map(encode, videos), [])


def answer_batch(config: Config, policy: model.Policy, encoder: model.Encoder, batch: Batch,
                 prompts: list[model.Prompt | VideoError]) -> list[dict]:
    """A row for each sample of a batch."""
    readable = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, VideoError)]
    texts = [""] * len(prompts)
    if readable:
        generators = [torch.Generator().manual_seed(config.seed * 1_000_003 + batch.numbers[i]) for i in readable]
        rollouts = grpo.sample(policy, [prompts[i] for i in readable], 1, config.max_tokens, encoder.stop_ids,
                                generators if config.temperature > 0 else None, config.temperature or 1.0)
        model.check_finite(rollouts.logprobs, config.model)
        for i, text in zip(readable, encoder.decode(rollouts.completions, rollouts.mask)):
            texts[i] = text
    rows = []
    for sample, prompt, text, reward in zip(batch.samples, prompts, texts, batch.task.reward(texts, batch.samples)):
        row = {"id": sample.id, "task": batch.task.name, "video": sample.video, "query": sample.query}
        if isinstance(prompt, VideoError):
            row["error"] = str(prompt)
        row.update({"completion": text, **reward.parts})
        if batch.task.name == "TVG":
            row.update(zip(("start", "end"), rewards.segment(text) or (None, None)), truth=[sample.start, sample.end])
        rows.append(row)
    return rows


def score_predictions(path: str, samples: list[data.Sample], lost: list[data.Sample]) -> tuple[list[dict], dict]:
    """(rows of the samples, counts) of a file of anybody's TVG answers; `lost` are queries that may be in it, too."""
    found, counts = predictions.match(predictions.read(path, rewards.segment), samples + lost)
    rows = []
    for sample in samples:
        row, truth = found.get(sample.id, {"start": None, "end": None, "error": "missing"}), (sample.start, sample.end)
        rows.append({**row, "id": sample.id, "task": "TVG", "video": sample.video, "query": sample.query,
                     "truth": truth, "iou": iou_of(row, truth)})
    counts["missing"] = sum(sample.id not in found for sample in samples)
    counts["failed"] = sum(bool(row.get("error")) for row in rows) - counts["missing"]
    counts["lenient"] = sum(bool(row.get("lenient")) for row in rows)
    return rows, counts


def score_fixed_answer(learn: list[data.Sample], samples: list[data.Sample]) -> tuple[list[dict], dict]:
    """(rows, the answer) of one answer for all queries, the best for `learn`: in seconds, or in shares of the video's
    duration where all durations are known and that does better there. So much is reached without video and query."""
    span = lambda sample: np.array((sample.start, sample.end))
    truths, scale = np.stack([span(sample) for sample in learn]), [1.0] * len(samples)
    fixed = scores.best_fixed_span(truths)
    if all(sample.duration for sample in learn + samples):
        lengths = np.array([[sample.duration] for sample in learn])                             # (n, 1) seconds
        share = scores.best_fixed_span(truths / lengths)
        if scores.ious(np.array(share), truths / lengths).mean() > scores.ious(np.array(fixed), truths).mean():
            fixed, scale = share, [sample.duration for sample in samples]
    rows = []
    for sample, seconds in zip(samples, scale):
        row = {"task": "TVG", "id": sample.id, "video": sample.video, "query": sample.query,
               "start": fixed[0] * seconds, "end": fixed[1] * seconds, "truth": (sample.start, sample.end)}
        rows.append({**row, "iou": iou_of(row, row["truth"])})
    return rows, {"fixed_answer": list(fixed)}


def iou_of(row: dict, truth: tuple[float, float]) -> float:
    """IoU of a row's answer, 0 if it has none."""
    return 0.0 if row["start"] is None else rewards.iou((row["start"], row["end"]), truth)


def summarise(rows: list[dict], lost: list[data.Sample] = (), qids: dict[str, str | None] = {}) \
        -> dict[str, float | list[float] | str]:
    """Prediction rows -> mIoU and R1 with intervals, VC, AR, VD accuracy, and counts of what went wrong. `lost` queries
    count with IoU 0; the rows whose ids have the same of `qids` are windows of one query."""
    found, windows = {}, {}
    tvg = [row for row in rows if row["task"] == "TVG"]
    if tvg:
        ious, videos = [row["iou"] for row in tvg], [row.get("video") for row in tvg]
        found["queries"] = len(tvg) + len(lost)
        found.update(scores.measure(ious + [0.0] * len(lost), videos + [sample.video for sample in lost]))
        found["unparsable"] = sum(row["start"] is None and not row.get("error") for row in tvg)
    if tvg and all({"truth", "id", "video"} <= row.keys() for row in tvg):
        found.update(scores.grounding(tvg))
    for row in tvg:
        if "truth" in row and (qid := qids.get(row["id"])):
            windows.setdefault(qid, []).append(row)
    if any(len(of) > 1 for of in windows.values()):         # one answer a query: that to its first window
        best = [max(iou_of(of[0], row["truth"]) for row in of) for of in windows.values()]
        none = {sample.qid: sample.video for sample in lost if sample.qid not in windows}
        found["best_window_queries"] = len(best) + len(none)
        videos = [of[0]["video"] for of in windows.values()] + [*none.values()]
        measured = scores.measure(best + [0.0] * len(none), videos)
        found.update((f"best_window_{name}", value) for name, value in measured.items())
    for name in tasks.INVERSIONS:
        if right := [row[tasks.TASKS[name].part] for row in rows if row["task"] == name]:
            found[name] = float(np.mean(right))
    found["unreadable"] = sum(bool(row.get("error")) for row in rows)
    if all("format" in row for row in rows):                # the answers of --predictions may be of any form
        found["format"] = float(np.mean([row["format"] for row in rows]))
    return found


if __name__ == "__main__":
    say = print if os.environ.get("RANK", "0") == "0" else str      # under torchrun one process prints
    flags.command_line(Config, lambda config: say(json.dumps(main(config))), __doc__)
