"""When does it happen? One video, one query or several.

    python ground.py VIDEO "a person sits down" --model DIR
    python ground.py VIDEO "a person sits down" "a person eats" --model DIR --png answer.png

Prints for each query the answer in seconds, such as `12.54 to 17.83`, or `no answer`, then the query and what the model
thought; --json prints a JSON object a query instead, which `evaluate.py --predictions` can score. The video is decoded
once for all queries. --png draws its frames with their times, and the answers below.
"""
import json
import re
import sys
from dataclasses import MISSING, dataclass
from itertools import islice
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
    video: str = flag(MISSING, "video file")
    queries: list[str] = flag(MISSING, "what to look for, a sentence a query")
    model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL")
    png: str = flag("", "picture to write: frames and answers on one time axis")
    json: bool = flag(False, "print a JSON object a query")
    batch_size: int = flag(16, "queries at once")


def main(config: Config) -> list[dict]:
    """Print the answers, and return them: dicts of video, query, start, end (seconds or None), thought, completion."""
    queries = [" ".join(query.split()) for query in config.queries]
    if not all(queries):
        raise ValueError(f"query {queries.index('') + 1} of {len(queries)} is empty; say what to look for")
    flags.check_numbers(config, "batch_size", "max_tokens", "total_pixels", "video_timeout")
    if config.png:
        files.check_output(Path(config.png).parent, "--png")
        if Path(config.png).is_dir():
            raise ValueError(f"--png {config.png}: is a folder; give the name of a picture")
    lora.check(config.model)
    load = Loader(config.total_pixels, config.video_timeout, config.cache, config.cache_gb)
    clip = load(config.video)
    load.close()
    _, _, device = distributed.start_process()
    policy, encoder = model.load(config.model, device, torch.float32 if device == "cpu" else torch.bfloat16)
    texts = []
    for i in range(0, len(queries), config.batch_size):
        samples = [Sample(query, config.video, query, 0.0, clip.duration, clip.duration)
                   for query in queries[i:i + config.batch_size]]
        task = tasks.in_form(tasks.TASKS["TVG"], config.think)
        prompts = [tasks.prepare(sample, task, encoder, lambda *part: clip) for sample in samples]
        rollouts = grpo.sample(policy, prompts, 1, config.max_tokens, encoder.stop_ids)
        model.check_finite(rollouts.logprobs, config.model)
        texts += encoder.decode(rollouts.completions, rollouts.mask)
    answers = []
    for query, text in zip(queries, texts):
        start, end = rewards.segment(text) or (None, None)
        thought = re.search("<think>(.*?)</think>", text, re.DOTALL)
        answers.append({"video": config.video, "query": query, "start": start, "end": end,
                        "thought": thought[1].strip() if thought else "", "completion": text})
    for answer in answers:
        print(json.dumps(answer) if config.json else tell(answer))
    if config.png:
        draw(clip, answers, config.png)
    return answers


def said(answer: dict) -> str:
    return "no answer" if answer["start"] is None else f"{answer['start']:.2f} to {answer['end']:.2f}"


def tell(answer: dict) -> str:
    """The answer, and indented below it the query and the thought, or the whole text where either is missing."""
    kind = "thought" if answer["thought"] and answer["start"] is not None else "completion"
    return f"{said(answer)}\n    query: {answer['query']}\n    {kind}: {' '.join(answer[kind].split())}"


def draw(clip: Clip, answers: list[dict], out_png: str) -> None:
    """A strip of frames, each at its time, and below it a bar for each answer, on one time axis in seconds."""
    figure, axis = plt.subplots(figsize=(13, 2.2 + 0.55 * len(answers)), layout="constrained")
    plot.strip(axis, clip, ratio=10)
    colours = plt.get_cmap("tab10").colors
    for i, answer in enumerate(answers):
        y, colour = -1.1 - 1.3 * i, colours[i % len(colours)]
        axis.text(0, y + 0.28, f"{answer['query']}   {said(answer)}", fontsize=9, va="bottom", parse_math=False)
        axis.barh(y, clip.duration, 0.4, color="#EEEEEE")
        if answer["start"] is not None:                             # an answer of no length is a thin line
            left, right = np.clip((answer["start"], answer["end"]), 0, (0.995 * clip.duration, clip.duration))
            axis.barh(y, max(right - left, 0.005 * clip.duration), 0.4, left, color=colour)
            axis.vlines((left, right), y, 3, color=colour, linewidth=1.2)
    axis.set(xlim=(0, clip.duration), ylim=(-1.5 - 1.3 * (len(answers) - 1), 3.1), yticks=[], xlabel="time (s)")
    axis.spines["left"].set_visible(False)
    plot.save(figure, out_png)


def positional(words: list[str]) -> list[str]:
    """VIDEO and the queries, wherever they stand among the flags, as the --video and --queries of Config."""
    if "--video" in words:
        return words
    plain, rest, words = [], [], iter(words)
    for word in words:
        (rest if word.startswith("-") else plain).append(word)
        if word.startswith("--") and "=" not in word and word not in ("--json", "--help"):
            rest += islice(words, 1)                                # its value
    return rest + ["--video"] * bool(plain) + plain[:1] + ["--queries"] * bool(plain[1:]) + plain[1:]


if __name__ == "__main__":
    sys.argv[1:] = positional(sys.argv[1:])
    flags.command_line(Config, main, __doc__)
