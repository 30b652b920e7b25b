"""The four tasks: what the model is asked, what it sees, how its completions are rewarded, and the draw between them.

Algorithm 1, lines 6-15: every step draws TVG with probability p, else one of the inversion tasks uniformly
(Eq. 12, 13), one task for the whole batch. TVG sees the whole video; an inversion task sees the annotated segment,
which is TVG's answer, and is asked for what TVG is given (Eq. 1, 2).

A new inversion task is one reward function in rewards.py and one `Task(...)` here: flags, logs, scores and curves know
it from `TASKS`.

    python tasks.py             a sample through all tasks: prompt, completion, reward
    python tasks.py AR "a person walks away and laughs" "<think>a path</think> <answer>walking</answer>"
    python tasks.py TVG "a person laughs" "<think>late</think> <answer>2.0 to 8.0</answer>" --segment 1.0 7.5

Departures from the paper:
1. The paper's prompts are used, and the format of the answer is spelled out after them, since the format is rewarded
   (Eq. 9).
2. In VC every verb of the query is masked, since Eq. 5 compares all of them.
3. With `--think false` (see `in_form`) answers alone are asked for and rewarded.
"""
import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

import rewards
from data import OVERSHOOT, Sample
from engine import logs
from engine.video import VideoError, beyond
from model import Encoder, Prompt
from rewards import Reward


@dataclass(frozen=True)
class Task:
    """A task. Its `part` names its own part of the reward, the one beside "format"."""
    name: str
    template: str               # may hold {query}, or {masked}: the query with [] for each verb
    part: str
    reward: Callable[[list[str], list[Sample]], list[Reward]]   # completions, the sample of each
    sees_segment: bool = True   # sees only the annotated segment of the video
    inversion: bool = True      # one of the tasks that are drawn with probability 1 - p
    needs_verb: bool = True     # a query without a verb cannot be asked or rewarded
    has_cosine: bool = False    # `reward` takes by_cosine=True, and then pays similarity (Table 3)

    def prompt(self, sample: Sample) -> str:
        return self.template.format(query=sample.query, masked=mask_verbs(sample.query))


THOUGHT = "<think>your thoughts</think> "
FORM = f"Reply as {THOUGHT}<answer>{{}}</answer>"
TASKS = {task.name: task for task in (
    Task("TVG", 'When does the event "{query}" happen in the video, in seconds? '
         + FORM.format("12.54 to 17.83"), "iou", rewards.tvg, sees_segment=False, inversion=False,
         needs_verb=False),
    Task("VC", 'Add a verb for the event "{masked}" based on the video. '
         + FORM.format("the whole sentence"), "vc", rewards.vc, has_cosine=True),
    Task("AR", "Use a verb to describe the event based on the video. "
         + FORM.format("one verb"), "ar", rewards.ar, has_cosine=True),
    Task("VD", "Describe what people have done based on the video. "
         + FORM.format("one sentence"), "vd", rewards.vd, has_cosine=True),
)}
INVERSIONS = tuple(name for name, task in TASKS.items() if task.inversion)


def in_form(task: Task, think: bool, cosine: bool = False, vd_max_verbs: int = 0) -> Task:
    """The task as the flags change it. With `cosine`, a task whose reward `has_cosine` pays similarity. With
    `vd_max_verbs`, VD pays nothing for an answer with more different verbs than that. Without `think` the prompt asks
    for <answer>...</answer> alone, and the format reward pays for that alone."""
    reward = task.reward
    if cosine and task.has_cosine:
        reward = partial(reward, by_cosine=True)
    if vd_max_verbs and task.name == "VD":
        reward = partial(reward, max_verbs=vd_max_verbs)
    if think:
        return replace(task, reward=reward)

    def reward_answers(completions: list[str], samples: list[Sample]) -> list[Reward]:
        """Puts an empty thought before each completion. A completion with a thought of its own then has two, which
        the format does not allow."""
        return reward([f"<think></think>{completion}" for completion in completions], samples)

    return replace(task, template=task.template.replace(THOUGHT, ""), reward=reward_answers)


def mask_verbs(query: str) -> str:
    """'a person closed the door' -> 'a person [] the door'; nothing but the verbs changes."""
    for verb in reversed(rewards.find_verbs([query])[0]):
        query = query[:verb.start] + "[]" + query[verb.end:]
    return query


def draw(step: int, seed: int, tvg_prob: float, names: list[str]) -> Task:
    """The task of a step (Eq. 13): TVG with probability tvg_prob, else one of `names` uniformly. It depends on
    (seed, step) only, so every process draws the same."""
    rng = np.random.default_rng([seed, step])
    if rng.random() < tvg_prob:
        return TASKS["TVG"]
    return TASKS[names[rng.integers(len(names))]]


def usable(samples: list[Sample], task: Task) -> list[Sample]:
    """The samples that a task can use."""
    if not task.needs_verb:
        return samples
    return [sample for sample, verbs in zip(samples, rewards.queries(samples)) if verbs]


def prepare(sample: Sample, task: Task, encoder: Encoder, load: Callable) -> Prompt:
    """The prompt of a sample. load(path, start, end) gives the clip; a task may see only the annotated segment of it.

    Raises VideoError when the video cannot be read, and, for every task, when the video ends before the segment does:
    then the file is cut short or is another video, and the reward would be for what the model did not see.
    """
    clip = load(sample.video, sample.video_start, sample.video_end)
    if lack := beyond(clip.duration, sample.start, sample.end, OVERSHOOT):
        raise VideoError(f"{sample.video}: has {lack}")
    if task.sees_segment:
        clip = clip.cut(sample.start, sample.end)
    return encoder.encode(task.prompt(sample), clip)


EXAMPLE = Sample("1", "video.mp4", "a person closes the door.", 3.2, 7.0, None)
ANSWERS = {"TVG": "3.0 to 6.5", "VC": "a person shut the door.", "AR": "closing",
           "VD": "She has closed it and left."}


def show() -> None:
    """Print what the tasks ask of EXAMPLE, an answer, and its reward."""
    print(f'"{EXAMPLE.query}" from {EXAMPLE.start} to {EXAMPLE.end} s')
    for name, task in TASKS.items():
        view = "this segment" if task.sees_segment else "the whole video"
        completion = f"<think>It happens early.</think> <answer>{ANSWERS.get(name, '')}</answer>"
        reward, = task.reward([completion], [EXAMPLE])
        print(f"\n{name} sees {view}\n{task.prompt(EXAMPLE)}\n{completion}")
        print(json.dumps({**reward.parts, "total": reward.total}))


def main(argv: list[str] | None = None) -> int:
    """Prints the reward of one completion as a JSON line, or without arguments a sample in all tasks; returns the exit
    code, 2 for a wrong command."""
    if not (sys.argv[1:] if argv is None else argv):
        show()
        return 0
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("task", help=" or ".join(TASKS))
    parser.add_argument("query")
    parser.add_argument("completion", help="the whole text of the model, tags included")
    parser.add_argument("--segment", type=float, nargs=2, metavar=("START", "END"),
                        help="seconds; TVG needs it")
    parser.add_argument("--cosine_rewards", action="store_true",
                        help="the cosine variant of VC, AR and VD (Table 3)")
    args = parser.parse_args(argv)
    start, end = args.segment or (0.0, math.inf)
    problem = None
    if args.task not in TASKS:
        problem = f"there is no task {args.task!r}, take one of {', '.join(TASKS)}"
    elif args.task == "TVG" and args.segment is None:
        problem = "TVG needs the true segment in seconds: --segment START END"
    elif args.segment and not 0 <= start < end < math.inf:
        problem = f"--segment {start:g} {end:g}: give a start from 0 s on and an end after it"
    if problem:
        print(f"tasks.py: {problem}", file=sys.stderr)
        return 2
    task = in_form(TASKS[args.task], think=True, cosine=args.cosine_rewards)
    reward, = task.reward([args.completion], [Sample("", "", args.query, start, end, None)])
    print(json.dumps({**reward.parts, "total": reward.total}))
    return 0


if __name__ == "__main__":
    with logs.surviving_output():
        sys.exit(main())
