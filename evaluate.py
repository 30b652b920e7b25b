"""Evaluate a model on an annotation file: R1@m and mIoU of temporal grounding, accuracy of VC, AR and VD.

    python evaluate.py --model DIR --annotations test.txt --videos DIR --output runs/x/test
    torchrun --nproc_per_node=8 evaluate.py ...     the same scores on eight GPUs
    python evaluate.py ... --blind                  shows grey frames: what the queries alone give away
    python evaluate.py ... --tasks TVG --swap_queries   asks for another event of the video: what guessing gives

R1@m is the share of queries whose answer has IoU >= m (R1>m: IoU > m, as Time-R1 counts), mIoU is the mean IoU. VC, AR
and VD are judged by the rewards of training (Eq. 5-7). engine/scores.py explains right_event, same_answer and the 95 %
intervals, "..._95"; docs/metrics.md lists all scores.

An answer that cannot be parsed and a video that cannot be read count with IoU 0, and the scores say how many there
were. So do queries whose annotated segment is unusable, "rejected_as_0" (11 of TVGBench's 800 have no length), unless
--steps or --swap_queries choose the queries. Each window of a query with several windows (QVHighlights) is a sample;
best_window_... has one value per query, that of its best window.

Writes config.json, predictions.jsonl (one line per task and query, in the order of the annotations) and scores.json to
--output. Until the end each process appends its finished batches to predictions.rank<N>.jsonl; the same command again,
on any number of processes, goes on from there. When the evaluation is finished, the command only computes the scores
again; to repeat the evaluation, delete the folder. Another config is refused; answers of a model or an annotation file
that has changed since are thrown away.

`python -m lab.predictions` scores answers from elsewhere; `python -m lab.fixed_answer` scores the one answer for all
queries that is best for a training file.
"""
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, replace
from functools import lru_cache, partial
from itertools import chain, groupby
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

Metrics = dict[str, float | list[float] | str]


@dataclass(kw_only=True)
class Config(VideoFlags, AnswerFlags):
    """evaluation"""
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL, or the name of one on the hub")
    annotations: str = flag(MISSING, "annotation file of any of the formats that data.py lists")
    videos: str = flag(MISSING, "folder of the video files")
    output: str = flag(MISSING, "folder for predictions and scores")
    tasks: list[str] = flag(list(tasks.TASKS), "tasks to evaluate")
    steps: int = flag(0, "batches per task, 0 for all queries")
    batch_size: int = flag(16, "queries that a process answers together; python -m lab.plan says "
                               "how many are estimated to fit into a GPU's memory")
    temperature: float = flag(0.0, "0 decodes greedily, 1 samples as training does")
    seed: int = flag(0, "of the sampling, when temperature is above 0")
    blind: bool = flag(False, "show grey frames instead of the video")
    swap_queries: bool = flag(False, "ask each video for another of its events, and score the "
                                     "answer against the first event's truth; TVG alone, and only "
                                     "queries with a disjoint one in their video")


@one_run
def main(config: Config) -> Metrics:
    """Evaluate and return the scores, which are also in scores.json."""
    check_flags(config)
    rank, _, _ = distributed.start_process()
    samples, rejected = data.read(config.annotations, config.videos)
    unusable = []
    if "TVG" in config.tasks and not config.steps and not config.swap_queries:
        unusable = [item.sample for item in rejected if item.sample]
    predictions = predict(config, swap_queries(samples) if config.swap_queries else samples)
    metrics = summarise(predictions, unusable, {sample.id: sample.qid for sample in samples})
    metrics |= {"rejected": len(rejected), "rejected_as_0": len(unusable)}
    if rank == 0:
        files.write_config(config, config.output)
        files.write_whole(Path(config.output) / "scores.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def check_flags(config: Config) -> None:
    """Raise ValueError, naming the flag, for a value that cannot work, or that differs from --output's config."""
    unknown = set(config.tasks) - set(tasks.TASKS)
    if unknown or not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ValueError(f"--tasks {' '.join(config.tasks)}: choose from {' '.join(tasks.TASKS)}, "
                         "each once")
    if config.swap_queries and config.tasks != ["TVG"]:
        raise ValueError("--swap_queries asks about whole videos: give --tasks TVG with it")
    flags.check_numbers(config, "max_tokens", "batch_size", "total_pixels", "cache_gb",
                        "video_timeout", "workers")
    lora.check(config.model)
    path = Path(config.output) / "config.json"
    if path.exists():
        before = files.read_config(path)
        ignored = {"output", "workers", "cache", "cache_gb"}
        changed = [f"--{name} {before.get(name, '?')}"
                   for name in files.changed_flags(vars(config), before, ignored)]
        if changed:
            raise ValueError(f"--output {config.output} holds a run with {', '.join(changed)}; "
                             "give another folder or delete it")


def swap_queries(samples: list[data.Sample]) -> list[data.Sample]:
    """The samples with a disjoint event in their video, each with that event's query, the next in the file. A model
    that grounds finds that event and scores about 0; one that guesses scores as before."""
    in_video = defaultdict(list)
    for sample in samples:
        in_video[sample.video, sample.video_start, sample.video_end].append(sample)
    swapped = []
    for sample in samples:
        events = in_video[sample.video, sample.video_start, sample.video_end]
        place = events.index(sample)
        for other in events[place + 1:] + events[:place]:
            is_disjoint = scores.disjoint((sample.start, sample.end), (other.start, other.end))
            if is_disjoint and other.query != sample.query:
                swapped.append(replace(sample, query=other.query))
                break
    if not swapped:
        raise ValueError("--swap_queries: no video has two queries whose segments do not overlap")
    return swapped


# From samples to predictions


@dataclass(frozen=True)
class Batch:
    """What is answered together."""
    task: tasks.Task
    numbers: list[int]          # of the samples in the file, from which their random numbers follow
    samples: list[data.Sample]

    def names(self) -> list[tuple[str, str]]:
        """What identifies the predictions of the samples: (task, id) of each."""
        return [(self.task.name, sample.id) for sample in self.samples]


def make_batches(config: Config,
                 samples: list[data.Sample]) -> tuple[list[Batch], list[tuple[str, str]]]:
    """(batches of all tasks, (task, id) of every prediction in the order of the annotations). They do not depend on the
    number of processes."""
    batches, order = [], []
    size = config.batch_size
    for name in config.tasks:
        task = tasks.in_form(tasks.TASKS[name], config.think)
        numbered = list(enumerate(tasks.usable(samples, task)))
        if config.steps:
            numbered = numbered[:config.steps * size]
        order += [(name, sample.id) for _, sample in numbered]
        numbered = by_length(numbered, task)
        for i in range(0, len(numbered), size):
            numbers, chosen = zip(*numbered[i:i + size])
            batches.append(Batch(task, list(numbers), list(chosen)))
    return batches, order


def by_length(numbered: list[tuple[int, data.Sample]],
              task: tasks.Task) -> list[tuple[int, data.Sample]]:
    """(number, sample) sorted by the seconds of video that the model sees, longest first: so a batch has prompts of
    about one length, and a lack of memory shows at once. In TVG the queries of a video stay together."""
    lengths = defaultdict(float)    # where no duration is known, a video lasts to its last segment
    for _, sample in numbered:
        lengths[sample.video] = max(lengths[sample.video], sample.end, sample.duration or 0.0)

    def place(item: tuple[int, data.Sample]) -> tuple[float, str, int]:
        number, sample = item
        seconds = sample.end - sample.start if task.sees_segment else lengths[sample.video]
        return -seconds, sample.video, number

    return sorted(numbered, key=place)


def predict(config: Config, samples: list[data.Sample]) -> list[dict]:
    """The predictions of all tasks from all processes, in the order of the annotations; also in predictions.jsonl."""
    rank, world, _ = distributed.start_process()
    batches, order = make_batches(config, samples)
    earlier = distributed.gather(read_earlier(config) if rank == 0 else [])
    known = {(row["task"], row["id"]): row for row in earlier}
    # An interrupted batch is answered again as a whole: no answer depends on the interruption.
    todo = [batch for batch in batches if not known.keys() >= set(batch.names())]
    new = []
    if todo:
        new = answer_and_write(config, todo[rank::world], is_new=not earlier)
    known |= {(row["task"], row["id"]): row for row in distributed.gather(new)}
    predictions = [known[name] for name in order]
    if rank == 0:
        lines = [json.dumps(row) + "\n" for row in predictions]
        files.write_whole(Path(config.output) / "predictions.jsonl", "".join(lines))
        for path in Path(config.output).glob("predictions.rank*.jsonl"):
            path.unlink()
    return predictions


def read_earlier(config: Config) -> list[dict]:
    """The predictions that an earlier run left in --output; none if it had another model or other annotations. A line
    that a kill has torn is left out, and so answered again."""
    output = Path(config.output)
    if not (output / "config.json").exists() or not (output / "inputs.json").exists():
        return []
    if json.loads((output / "inputs.json").read_text()) != input_files(config):
        logs.say(f"{output}: the model or the annotations have changed, so its answers are thrown "
                 "away")
        return []
    predictions = []
    for path in sorted(output.glob("predictions*.jsonl")):
        for line in path.read_text(errors="replace").split("\n"):
            try:
                predictions.append(json.loads(line))
            except ValueError:
                continue
    return predictions


def input_files(config: Config) -> dict[str, list[int]]:
    """Size and time of change of the files that all answers depend on: a model trained anew is another model."""
    paths = [path for path in lora.files(config.model) if path.is_file()]
    stats = {str(path): path.stat() for path in [Path(config.annotations), *paths]}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


def answer_and_write(config: Config, batches: list[Batch], is_new: bool) -> list[dict]:
    """The predictions of this process's batches, which it also appends to its file, batch by batch. Every process has
    to call this function, also one that has no batches. A new evaluation first deletes answers of another model."""
    rank, _, device = distributed.start_process()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    policy, encoder = model.load(config.model, device, dtype)
    loader = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb,
                    config.workers)
    output = Path(config.output)
    if rank == 0 and is_new:
        for path in [*output.glob("predictions*.jsonl"), output / "scores.json"]:
            path.unlink(missing_ok=True)
        files.write_whole(output / "inputs.json", json.dumps(input_files(config)) + "\n")
        files.write_config(config, output)
    distributed.gather([])              # nobody writes an answer before its config is written
    answered = answers(config, policy, encoder, loader, batches)
    predictions = []
    with open(output / f"predictions.rank{rank}.jsonl", "a") as file:
        for rows in tqdm(answered, "evaluate", total=len(batches), disable=rank > 0,
                         dynamic_ncols=True):
            lines = [json.dumps(row) + "\n" for row in rows]
            file.write("\n" + "".join(lines))       # ends a torn line before it
            file.flush()
            predictions += rows
    return predictions


def answers(config: Config, policy: model.Policy, encoder: model.Encoder, loader: Loader,
            batches: list[Batch]) -> Iterator[list[dict]]:
    """The predictions of each batch; meanwhile a thread prepares the next batch."""
    prepare = partial(encode_batch, config, encoder, loader)
    with ThreadPoolExecutor(1) as background:
        for batch, prompts in ahead(prepare, batches, background):
            yield answer_batch(config, policy, encoder, batch, prompts)


def encode_batch(config: Config, encoder: model.Encoder, loader: Loader,
                 batch: Batch) -> list[model.Prompt | VideoError]:
    """The Prompt of each sample, or the VideoError why there is none; as many videos at a time as the loader has
    workers, each decoded once."""
    def encode_video(samples: list[data.Sample]) -> list[model.Prompt | VideoError]:
        @lru_cache(maxsize=1)
        def load(*video) -> Clip:
            clip = loader(*video)
            return clip.grey() if config.blind else clip

        prompts = []
        for sample in samples:
            try:
                prompts.append(tasks.prepare(sample, batch.task, encoder, load))
            except VideoError as error:
                prompts.append(error)
        return prompts

    grouped = groupby(batch.samples, key=lambda sample: sample.video)
    videos = [list(samples) for _, samples in grouped]
    with ThreadPoolExecutor(len(loader.workers)) as threads:
        return list(chain.from_iterable(threads.map(encode_video, videos)))


def answer_batch(config: Config, policy: model.Policy, encoder: model.Encoder, batch: Batch,
                 prompts: list[model.Prompt | VideoError]) -> list[dict]:
    """The prediction of each sample of a batch. A sample without a prompt has an empty completion."""
    readable = [i for i, prompt in enumerate(prompts) if isinstance(prompt, model.Prompt)]
    completions = [""] * len(prompts)
    if readable:
        generators = None
        if config.temperature > 0:
            seeds = [config.seed * 1_000_003 + batch.numbers[i] for i in readable]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        rollouts = grpo.sample(policy, [prompts[i] for i in readable], group_size=1,
                               max_tokens=config.max_tokens, stop_ids=encoder.stop_ids,
                               generators=generators, temperature=config.temperature or 1.0)
        model.check_finite(rollouts.logprobs, config.model)
        texts = encoder.decode(rollouts.completions, rollouts.mask)
        for i, text in zip(readable, texts, strict=True):
            completions[i] = text
    earned = batch.task.reward(completions, batch.samples)
    predictions = []
    for sample, prompt, text, reward in zip(batch.samples, prompts, completions, earned):
        row = {"id": sample.id, "task": batch.task.name, "video": sample.video,
               "query": sample.query}
        if isinstance(prompt, VideoError):
            row["error"] = str(prompt)
        row |= {"completion": text, **reward.parts}
        if batch.task.name == "TVG":
            start, end = rewards.segment(text) or (None, None)
            row |= {"start": start, "end": end, "truth": [sample.start, sample.end]}
        predictions.append(row)
    return predictions


# From predictions to scores


def summarise(predictions: list[dict], unusable: Sequence[data.Sample] = (),
              qids: dict[str, str | None] | None = None) -> Metrics:
    """Predictions, rows of predictions.jsonl -> mIoU and R1 with intervals, accuracy of VC, AR and VD, and counts of
    what went wrong. Queries with an `unusable` segment count with IoU 0; the predictions whose ids have the same one of
    `qids` are of the windows of one query."""
    grounded = [row for row in predictions if row["task"] == "TVG"]
    metrics = {}
    if grounded:
        metrics["queries"] = len(grounded) + len(unusable)
        ious = [row["iou"] for row in grounded] + [0.0] * len(unusable)
        videos = [row["video"] for row in grounded] + [sample.video for sample in unusable]
        metrics |= scores.measure(ious, videos)
        not_failed = [row for row in grounded if not row.get("error")]
        metrics["unparsable"] = sum(row["start"] is None for row in not_failed)
        metrics |= scores.grounding(grounded)
        metrics |= best_windows(grounded, unusable, qids or {})
    for name in tasks.INVERSIONS:
        scored = [row[tasks.TASKS[name].part] for row in predictions if row["task"] == name]
        if scored:
            metrics[name] = float(np.mean(scored))
    metrics["unreadable"] = sum(bool(row.get("error")) for row in predictions)
    if all("format" in row for row in predictions):     # answers of others may have any form
        metrics["format"] = float(np.mean([row["format"] for row in predictions]))
    return metrics


def best_windows(grounded: list[dict], unusable: Sequence[data.Sample],
                 qids: dict[str, str | None]) -> Metrics:
    """mIoU and R1 over queries, each with the IoU of its best window; its answer is that to the first window. Empty
    when no query has several windows."""
    queries = defaultdict(list)
    for row in grounded:
        if qids.get(row["id"]):
            queries[qids[row["id"]]].append(row)
    if all(len(windows) == 1 for windows in queries.values()):
        return {}
    ious = [max(iou(windows[0], row["truth"]) for row in windows) for windows in queries.values()]
    videos = [windows[0]["video"] for windows in queries.values()]
    without = {sample.qid: sample.video for sample in unusable if sample.qid not in queries}
    measured = scores.measure(ious + [0.0] * len(without), videos + list(without.values()))
    metrics = {f"best_window_{name}": value for name, value in measured.items()}
    return {"best_window_queries": len(ious) + len(without), **metrics}


def iou(prediction: dict, truth: Sequence[float]) -> float:
    """IoU of a prediction's answer with a segment, 0 where there is no answer."""
    if prediction["start"] is None:
        return 0.0
    return rewards.iou((prediction["start"], prediction["end"]), truth)


# While a model is trained


class HeldOut:
    """Evaluation of a model in training on queries that it does not learn from: before the first step, after every
    --eval_every steps, and after the last one. It draws nothing and leaves the policy as it is."""

    def __init__(self, config: Any, output: Path, step: int):
        """Uses the --eval_... flags, and those of videos and answers, of a train.Config; `step`: steps done so far."""
        self.samples = read_held_out(config)
        if self.samples:
            self.config = Config(model=config.model, annotations=config.eval_annotations,
                                 videos=config.videos, output=str(output), think=config.think,
                                 max_tokens=config.max_tokens)
            self.evaluations = Evaluations(output, step, config.eval_every, config.steps)

    def evaluate_if_due(self, run: Run, policy: model.Policy, encoder: model.Encoder,
                        loader: Loader) -> None:
        """After run.step steps, on all processes: answer greedily, log the scores and keep the best model as best/."""
        if not self.samples or not self.evaluations.due(run.step):
            return
        began = time.perf_counter()
        with distributed.gathered(policy):
            predictions = self.predict(policy, encoder, loader)
        row = {"step": run.step, **summarise(predictions), "seconds": time.perf_counter() - began}
        self.evaluations.add(row, partial(model.save, policy, encoder))
        run.evaluation(row)

    def predict(self, policy: model.Policy, encoder: model.Encoder, loader: Loader) -> list[dict]:
        """What the function `predict` returns, of a policy whose weights are gathered; no file is written."""
        rank, world, _ = distributed.start_process()
        batches, order = make_batches(self.config, self.samples)
        # The first forward pass gathers the weights, for which every process is needed, also one without a batch.
        empty = encoder.encode("", Clip(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), 2.0))
        grpo.sample(policy, [empty], group_size=1, max_tokens=1, stop_ids=encoder.stop_ids)
        mine = answers(self.config, policy, encoder, loader, batches[rank::world])
        predictions = distributed.gather(list(chain.from_iterable(mine)))
        known = {(row["task"], row["id"]): row for row in predictions}
        return [known[name] for name in order]


def read_held_out(config: Any) -> list[data.Sample]:
    """--eval_samples queries of a train.Config's --eval_annotations, the same ones for every seed; none without that
    file."""
    if not config.eval_annotations:
        return []
    try:
        samples, rejected = data.read(config.eval_annotations, config.videos)
    except ValueError as error:
        message = str(error).replace("--annotations", "--eval_annotations")
        raise ValueError(message) from error
    shuffled = np.random.default_rng(0).permutation(len(samples))
    chosen = sorted(shuffled[:config.eval_samples])
    rank, _, _ = distributed.start_process()
    if rank == 0:
        logs.say(f"held out: {len(chosen)} of the {len(samples)} samples of "
                 f"{config.eval_annotations}, {len(rejected)} rejected")
    return [samples[i] for i in chosen]


def evaluate_and_print(config: Config) -> None:
    metrics = main(config)
    rank, _, _ = distributed.start_process()
    if rank == 0:
        print(json.dumps(metrics))


if __name__ == "__main__":
    flags.command_line(Config, evaluate_and_print, __doc__)
