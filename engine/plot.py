"""Logs and answers -> pictures: how training went, and what the model answers before and after it.

    python -m engine.plot RUN_DIR [RUN_DIR ...] --output curves.png        output folders of train.py
"""
import argparse
import json
from itertools import cycle, product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from engine.video import Clip

plt.switch_backend("Agg")   # pictures are files; no display is needed
plt.rc("axes.spines", top=False, right=False)
# Safe for the colour-blind; below, the colours of tasks that are not in the paper, in turn
COLOURS = {"TVG": "#0072B2", "VC": "#D55E00", "AR": "#009E73", "VD": "#CC79A7",
           "truth": "#444444", "before": "#E69F00", "after": "#0072B2"}
NEW_TASKS = ("#56B4E9", "#E69F00", "#000000", "#F0E442")
PANELS = [   # title, key, label of the y axis, its upper end (None: the highest value drawn)
    ("Total reward", "reward", "reward, mean of a step", 2),
    ("Format reward", "format", "share of completions", 1),
    ("The task's own reward (TVG: IoU)", "own", "reward, mean of a step", 1),
    ("KL to the reference policy", "kl", "nats per token", None),
    ("Completion length", "tokens", "tokens, mean of a step", None),
    ("Truncated completions", "truncated", "share of completions", 1),
    ("Flat groups (all rewards equal)", "flat", "share of groups", 1),
    ("Gradient norm", "grad_norm", "norm before clipping", None)]
# The ninth panel, of runs that have evaluations
HELD_OUT = ("Held-out answers, greedy (TVG: mIoU)", "held_out", "mean of the task's own reward", 1)


def read_metrics(folder: str | Path) -> list[dict]:
    """The steps in the metrics.jsonl of a run's folder: dicts of what was logged, and under "own" again the number
    that is the task's own part of the reward.

    Raises ValueError, which names the file and the line, for what is no log."""
    path = Path(folder, "metrics.jsonl")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the output folder of train.py")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: holds no steps; wait for the first one or give another run")
    return [{"task": "?", **row, "own": row.get(str(row.get("part")))} for row in rows]


def read_evaluations(folder: str | Path) -> list[dict]:
    """The scores in the evaluations.jsonl of a run's folder, none where there is none: dicts of step, task, and under
    "held_out" mIoU for TVG, or what another task has under its name, in capitals."""
    path = Path(folder, "evaluations.jsonl")
    scores = []
    for row in read_rows(path) if path.is_file() else ():
        for name, value in row.items():
            task = "TVG" if name == "mIoU" else name
            if task.isalpha() and task.isupper():
                scores.append({"step": row["step"], "task": task, "held_out": value})
    return scores


def read_rows(path: Path) -> list[dict]:
    """The lines of a log, each a JSON object with a step, without a torn last line."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
            message = f"{path}: line {number} is not the JSON object of a step; remove it"
            raise ValueError(message) from error
    return rows


def curves(folders: str | Path | dict[str, str | Path], out_png: str | Path) -> None:
    """Draw the logs of one run (its folder) or of several ({name: folder}, told apart by line style) into a PNG.

    One panel per quantity and one colour per task: faint points are steps, lines running means, but those of held-out
    scores, where a run has them, join the points. ValueError: a bad log.
    """
    if not isinstance(folders, dict):
        folders = {"": folders}
    runs, panels = {}, PANELS
    for name, folder in folders.items():
        evaluations = read_evaluations(folder)
        runs[name] = read_metrics(folder) + evaluations
        if evaluations:
            panels = [*PANELS, HELD_OUT]
    colours = task_colours({step["task"] for steps in runs.values() for step in steps})
    styles = dict(zip(runs, cycle(("-", "--", ":", "-."))))
    rows, columns = (2, 4) if panels is PANELS else (3, 3)
    size = 4 * columns, 3.5 * rows      # inches
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for axis, panel in zip(axes.flat, panels):
        draw_panel(axis, panel, runs, colours, styles)
    handles = []
    for task, colour in colours.items():
        handles.append(plt.Line2D([], [], color=colour, linewidth=3, label=task))
    if len(runs) > 1:
        for name, style in styles.items():
            handles.append(plt.Line2D([], [], color="black", linestyle=style, label=name))
    columns = min(len(handles), 8)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    save(figure, out_png)


def task_colours(tasks: set[str]) -> dict[str, str]:
    """A colour for each task: those of the paper first, in its order."""
    colours = {task: colour for task, colour in COLOURS.items() if task in tasks}
    new = sorted(tasks - COLOURS.keys())
    return {**colours, **dict(zip(new, cycle(NEW_TASKS)))}


def draw_panel(axis: plt.Axes, panel: tuple, runs: dict[str, list[dict]], colours: dict[str, str],
               styles: dict[str, str]) -> None:
    """One quantity of all runs (lists of steps, by name), of the tasks in `colours`."""
    title, key, label, top = panel
    highest = 0.0
    for name, task in product(runs, colours):
        logged = [step for step in runs[name] if step["task"] == task and step.get(key) is not None]
        if not logged:
            continue
        colour = colours[task]
        x = [step["step"] for step in logged]
        y = np.array([step[key] for step in logged])
        mean = y if key == "held_out" else running_mean(y)
        alpha = 0.3 / len(runs) ** 0.5
        axis.plot(x, y, ".", color=colour, alpha=alpha, markersize=6, markeredgewidth=0)
        axis.plot(x, mean, styles[name], color=colour, linewidth=1.8)
        highest = max(highest, y.max())
    if not axis.lines:
        axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color="grey")
    top = top or highest or 1
    axis.set(title=title, xlabel="step", ylabel=label, ylim=(-0.03 * top, 1.05 * top))
    axis.locator_params(axis="x", integer=True)
    axis.grid(alpha=0.25)


def running_mean(values: np.ndarray) -> np.ndarray:
    """(n,) -> (n,): means over an eighth of the values around each, an odd number of at least 5, fewer at the ends."""
    size = min(max(len(values) // 8, 5), len(values))
    window = np.ones(size if size % 2 else size - 1)
    sums = np.convolve(values, window, "same")
    return sums / np.convolve(np.ones(len(values)), window, "same")


def examples(clips: list[Clip], predictions: list[dict[str, dict]], out_png: str | Path,
             thoughts: bool = False) -> None:
    """Draw the answers to queries as bars under the frames of their videos, on one time axis in seconds, into a PNG.

    For each clip there is {"before": row, "after": row}, with rows of predictions.jsonl for one query, or others with
    their query, truth (start, end), start and end in seconds, or None, and iou. With `thoughts` their completions are
    written below. The left edge of a frame is its time; what does not fit its place is cut off.
    """
    size = 11, 2.2 * len(clips)      # inches
    figure, axes = plt.subplots(len(clips), 1, figsize=size, squeeze=False, layout="constrained")
    for axis, clip, rows in zip(axes[:, 0], clips, predictions):
        draw_answers(axis, clip, rows)
        if thoughts:
            text = "\n".join(f"{name}: {row['completion']}" for name, row in rows.items())
            axis.set_xlabel(text, fontsize=6.5, loc="left", wrap=True, parse_math=False)
    figure.supxlabel("time (s)", fontsize=10)
    save(figure, out_png)


def method(clip: Clip, rows: dict[str, dict], segment: Clip, notes: dict[str, str],
           out_png: str | Path) -> None:
    """Draw TVG and its inversion into a PNG: a clip with its rows as in `examples`, below it the segment that the
    inversion tasks see, and at the bottom notes {task: what it asks, and what was answered}."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 4.9), height_ratios=(4.6, 3),
                                          layout="constrained")
    draw_answers(above, clip, rows)
    above.set_xlabel("time (s)")
    width = min(len(segment.frames) / 12, 1)    # a share: few frames are no wider than those above
    strip(below, segment, 13 * width)
    below.set(xlim=(0, segment.duration / width), ylim=(0, 3.05), yticks=(), xticks=())
    title = "The true segment, turned around: all that VC, AR and VD see"
    below.set_title(title, fontsize=10, loc="left")
    lines = "\n".join(f"{task}: {text}" for task, text in notes.items())
    below.set_xlabel(lines, fontsize=9, loc="left", parse_math=False)
    below.spines[["left", "bottom"]].set_visible(False)
    save(figure, out_png)


def draw_answers(axis: plt.Axes, clip: Clip, rows: dict[str, dict]) -> None:
    """The frames of a clip, and below them the true segment and the answers as bars."""
    strip(axis, clip)
    duration = clip.duration
    row, *_ = rows.values()
    bars = {"truth": row["truth"]}      # name: span in seconds
    for name, row in rows.items():
        bars[name] = row["start"], row["end"]
    heights = [-0.75 - 0.8 * i for i in range(len(bars))]
    colours = COLOURS["truth"], COLOURS["before"], COLOURS["after"]
    for y, (start, end), colour in zip(heights, bars.values(), colours):
        if start is None:
            axis.text(0.01 * duration, y, "no answer", va="center", style="italic", color="grey")
            continue
        left = np.clip(start, 0, 0.995 * duration)              # beyond the end: at the end
        width = max(min(end, duration) - left, 0.005 * duration)        # of no length: a thin line
        axis.barh(y, width, 0.6, left, color=colour)
    scores = ", ".join(f"{name} {row['iou']:.2f}" for name, row in rows.items())
    title = f"{row['query']}   (IoU {scores})"
    axis.set_title(title, fontsize=10, loc="left", wrap=True, parse_math=False)
    axis.set(xlim=(0, duration), ylim=(heights[-1] - 0.45, 3.05))
    axis.set_yticks(heights, bars)
    axis.spines["left"].set_visible(False)


def strip(axis: plt.Axes, clip: Clip, ratio: float = 13) -> None:
    """Draw 10 to 16 frames of a Clip between heights 0 and 3, each in the middle of its place, on an axis that is
    `ratio` times as wide as they are high; what does not fit the place is cut off. Rather by a few more or less they
    are equally far apart: else a motion that starts anew each second may be seen at its start only."""
    total, _, h, w = clip.frames.shape
    fitting = min(max(round(ratio * h / w), 10), 16, total)
    even = [n for n in range(10, 17) if total % n == 0]
    n = min(even, key=lambda n: abs(n - fitting), default=fitting)
    x = max(int((w - ratio * h / n) // 2), 0)       # cut off at the left and at the right
    y = max(int((h - w * n / ratio) // 2), 0)       # and above and below
    smoothing = "nearest" if h < 100 else None
    for i in range(n):
        frame = clip.frames[(2 * i + 1) * total // (2 * n)]                 # (3, h, w)
        picture = frame[:, y:h - y, x:w - x].permute(1, 2, 0).numpy()       # (h - 2 y, w - 2 x, 3)
        left, right = i * clip.duration / n, (i + 0.96) * clip.duration / n     # a gap at the right
        axis.imshow(picture, extent=(left, right, 0, 3), aspect="auto", interpolation=smoothing)


def save(figure: plt.Figure, out_png: str | Path) -> None:
    """Write a picture whole: to a temporary name, then renamed."""
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)   # inches
    figure.savefig(f"{out_png}.part", dpi=130, format="png")
    plt.close(figure)
    Path(f"{out_png}.part").replace(out_png)


def main(arguments: list[str] | None = None) -> None:
    """The command. What cannot be drawn ends it with one line and exit code 2."""
    parser = argparse.ArgumentParser(description="Draw the curves of one or several training runs.")
    parser.add_argument("runs", nargs="+", help="output folders of train.py")
    parser.add_argument("--output", default="curves.png", help="the picture to write")
    options = parser.parse_args(arguments)
    try:
        if Path(options.output).is_dir():
            raise ValueError(f"--output {options.output}: is a folder; give the name of a picture")
        curves({run: run for run in options.runs}, options.output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"plot.py: {error}\n")


if __name__ == "__main__":
    main()
