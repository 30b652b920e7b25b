"""When does it happen? One video, one query or several.

    python ground.py VIDEO "a person sits down" --model DIR
    python ground.py VIDEO "a person sits down" "a person eats" --model DIR --png answer.png

Prints for each query the answer in seconds, such as `12.54 to 17.83`, or `no answer`, then the query and what the model
thought; --json prints one JSON object per query instead, which `python -m lab.predictions` can score. The video is
decoded once for all queries. --png draws its frames with their times, and the answers below.
"""
import json
import re
from dataclasses import MISSING, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import grpo
import model
import rewards
import tasks
from data import Sample
from engine import distributed, files, flags, lora, plot
from engine.flags import AnswerFlags, VideoFlags, flag
from engine.loader import Loader
from engine.video import Clip


@dataclass(kw_only=True)
class Config(VideoFlags, AnswerFlags):
    """grounding"""
    video: str = flag(MISSING, "video file", positional=True)
    queries: list[str] = flag(MISSING, "what to look for, one sentence per query", positional=True)
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL, or the name of one on the hub")
    png: str = flag("", "picture to write: frames and answers on one time axis")
    json: bool = flag(False, "print one JSON object per query")
    batch_size: int = flag(16, "queries that are answered together")


def main(config: Config) -> list[dict]:
    """Print the answers, and return them: dicts of video, query, start, end (seconds or None), thought, completion."""
    queries = [" ".join(query.split()) for query in config.queries]
    check_flags(config, queries)
    loader = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb)
    clip = loader(config.video)
    loader.close()
    answers = []
    for query, text in zip(queries, ask(config, clip, queries), strict=True):
        start, end = rewards.segment(text) or (None, None)
        thought = re.search("<think>(.*?)</think>", text, re.DOTALL)
        answers.append({"video": config.video, "query": query, "start": start, "end": end,
                        "thought": thought[1].strip() if thought else "", "completion": text})
    for answer in answers:
        print(json.dumps(answer) if config.json else describe(answer))
    if config.png:
        draw(clip, answers, config.png)
    return answers


def check_flags(config: Config, queries: list[str]) -> None:
    """Raise ValueError, naming the flag or the query, for a value that cannot work."""
    if "" in queries:
        raise ValueError(f"query {queries.index('') + 1} of {len(queries)} is empty; say what to "
                         "look for")
    flags.check_numbers(config, "batch_size", "max_tokens", "total_pixels", "cache_gb",
                        "video_timeout", "workers")
    if config.png:
        files.check_output(Path(config.png).parent, "--png")
        if Path(config.png).is_dir():
            raise ValueError(f"--png {config.png}: is a folder; give the name of a picture")
    lora.check(config.model)


def ask(config: Config, clip: Clip, queries: list[str]) -> list[str]:
    """The model's completion for each query about a clip."""
    _, _, device = distributed.start_process()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    policy, encoder = model.load(config.model, device, dtype)
    task = tasks.in_form(tasks.TASKS["TVG"], config.think)
    prompts = []
    for query in queries:
        sample = Sample(query, config.video, query, 0.0, clip.duration, clip.duration)
        prompts.append(tasks.prepare(sample, task, encoder, lambda *_: clip))
    texts = []
    for i in range(0, len(prompts), config.batch_size):
        rollouts = grpo.sample(policy, prompts[i:i + config.batch_size], group_size=1,
                               max_tokens=config.max_tokens, stop_ids=encoder.stop_ids)
        model.check_finite(rollouts.logprobs, config.model)
        texts += encoder.decode(rollouts.completions, rollouts.mask)
    return texts


def span(answer: dict) -> str:
    if answer["start"] is None:
        return "no answer"
    return f"{answer['start']:.2f} to {answer['end']:.2f}"


def describe(answer: dict) -> str:
    """The answer, and indented below it the query and the thought, or the whole text where either is missing."""
    kind = "thought"
    if answer["start"] is None or not answer["thought"]:
        kind = "completion"
    text = " ".join(answer[kind].split())
    return f"{span(answer)}\n    query: {answer['query']}\n    {kind}: {text}"


def draw(clip: Clip, answers: list[dict], out_png: str) -> None:
    """A strip of frames, each at its time, and below it a bar for each answer, on one time axis in seconds."""
    figure, axis = plt.subplots(figsize=(13, 2.2 + 0.55 * len(answers)), layout="constrained")
    plot.strip(axis, clip, ratio=10)
    colours = plt.get_cmap("tab10").colors
    for i, answer in enumerate(answers):
        y = -1.1 - 1.3 * i
        colour = colours[i % len(colours)]
        axis.text(0, y + 0.28, f"{answer['query']}   {span(answer)}", fontsize=9, va="bottom",
                  parse_math=False)
        axis.barh(y, clip.duration, 0.4, color="#EEEEEE")
        if answer["start"] is None:
            continue
        left = np.clip(answer["start"], 0, 0.995 * clip.duration)
        right = np.clip(answer["end"], 0, clip.duration)
        width = max(right - left, 0.005 * clip.duration)        # of no length: a thin line
        axis.barh(y, width, 0.4, left, color=colour)
        axis.vlines((left, right), y, 3, color=colour, linewidth=1.2)
    bottom = -1.5 - 1.3 * (len(answers) - 1)
    axis.set(xlim=(0, clip.duration), ylim=(bottom, 3.1), yticks=[], xlabel="time (s)")
    axis.spines["left"].set_visible(False)
    plot.save(figure, out_png)


if __name__ == "__main__":
    flags.command_line(Config, main, __doc__)
