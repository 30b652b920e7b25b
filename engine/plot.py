"""Logs and answers -> pictures: how training went, and what the model answers before and after it.

    python -m engine.plot RUN_DIR [RUN_DIR ...] --output curves.png    folders that hold a metrics.jsonl, or such files
"""
import argparse
import json
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from engine.video import Clip

plt.switch_backend("Agg")   # pictures are files; no display is needed
plt.rc("axes.spines", top=False, right=False)
COLOURS = {"TVG": "#0072B2", "VC": "#D55E00", "AR": "#009E73", "VD": "#CC79A7",   # safe for the colour-blind
           "truth": "#444444", "before": "#E69F00", "after": "#0072B2"}
NEW_TASKS = ("#56B4E9", "#E69F00", "#000000", "#F0E442")    # colours of tasks that are not above, in turn
OLD_PARTS = ("iou", "vc", "ar", "vd")   # a log from before the rows named their "part" has one of these a row
PANELS = [   # title, key, label of the y axis, its upper end (None: the data's)
    ("Total reward", "reward", "reward, mean of a step", 2),
    ("Format reward", "format", "share of completions", 1),
    ("The task's own reward (TVG: IoU)", "own", "reward, mean of a step", 1),
    ("KL to the reference policy", "kl", "nats per token", None),
    ("Completion length", "tokens", "tokens, mean of a step", None),
    ("Truncated completions", "truncated", "share of completions", 1),
    ("Flat groups (all rewards equal)", "flat", "share of groups", 1),
    ("Gradient norm", "grad_norm", "norm before clipping", None)]
HELD_OUT = ("Held-out answers, greedy (TVG: mIoU)", "held_out", "mean of the task's own reward", 1)   # where there are


def read_metrics(path: str | Path) -> list[dict]:
    """The steps in a metrics.jsonl, or in the folder that holds it, without a torn last line: dicts of a task and
    finite numbers, and under "own" again the number that is the task's own part of the reward.

    Raises ValueError, which names the file and the line, for what is no log."""
    path = Path(path, "metrics.jsonl") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the output folder of train.py")
    lines, steps = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n"), []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)
            numbers = {key: value for key, value in step.items() if type(value) in (int, float) and abs(value) < 1e15}
            parts = [str(step["part"])] if "part" in step else OLD_PARTS
            own = {"own": numbers[part] for part in parts if part in numbers}
            steps.append({**numbers, **own, "task": str(step.get("task", "?")), "step": int(numbers["step"])})
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            if number < len(lines):   # the last one may be half written
                raise ValueError(f"{path}: line {number} is not the JSON object of a step; remove it") from error
    if not steps:
        raise ValueError(f"{path}: holds no steps; wait for the first one or give another run")
    return steps


def read_evaluations(path: str | Path) -> list[dict]:
    """The scores in the evaluations.jsonl beside a metrics.jsonl, none where there is none: dicts of step, task, and
    under "held_out" mIoU for TVG, or what another task has under its name, in capitals. Torn lines are left out."""
    path, found = (Path(path) if Path(path).is_dir() else Path(path).parent) / "evaluations.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            found += [{"step": int(row["step"]), "task": "TVG" if name == "mIoU" else name, "held_out": float(value)}
                      for name, value in row.items() if name == "mIoU" or name.isalpha() and name.isupper()]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            continue
    return found


def curves(metrics_files: str | Path | dict[str, str | Path], out_png: str | Path) -> None:
    """Draw the logs of one run (a path) or of several ({name: path}, told apart by line style) into a PNG.

    A panel a quantity and a colour a task: faint points are steps, lines running means, but those of held-out scores,
    where a run has them, join the points. ValueError: a bad log.
    """
    files = metrics_files if isinstance(metrics_files, dict) else {"": metrics_files}
    runs = {name: read_metrics(path) for name, path in files.items()}
    scored = {name: read_evaluations(path) for name, path in files.items()}
    runs = {name: steps + scored[name] for name, steps in runs.items()}
    panels = [*PANELS, HELD_OUT] if any(scored.values()) else PANELS
    present = {step["task"] for steps in runs.values() for step in steps}
    new = dict(zip(sorted(present - COLOURS.keys()), cycle(NEW_TASKS)))
    tasks = {task: colour for task, colour in {**COLOURS, **new}.items() if task in present}
    styles = dict(zip(runs, ["-", "--", ":", "-."] * len(runs)))
    rows, columns = (2, 4) if len(panels) == 8 else (3, 3)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.5 * rows), layout="constrained")
    for axis, (title, key, label, top) in zip(axes.flat, panels):
        for (name, steps), (task, colour) in ((run, task) for run in runs.items() for task in tasks.items()):
            points = [(s["step"], s[key]) for s in steps if s["task"] == task and s.get(key) is not None]
            if points:
                x, y = np.array(points, dtype=float).T   # (n,), (n,)
                size = 1 if key == "held_out" else (min(max(len(y) // 8, 5), len(y)) - 1) | 1
                kernel = np.ones(size)   # odd, so that the mean is centred
                mean = np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")
                axis.plot(x, y, ".", color=colour, alpha=0.3 / len(runs) ** 0.5, markersize=6, markeredgewidth=0)
                axis.plot(x, mean, styles[name], color=colour, linewidth=1.8)
        if not axis.lines:
            axis.text(0.5, 0.5, "not logged", transform=axis.transAxes, ha="center", color="grey")
        top = top or max([max(line.get_ydata()) for line in axis.lines], default=1) or 1
        axis.set(title=title, xlabel="step", ylabel=label, ylim=(-0.03 * top, 1.05 * top))
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.25)
    handles = [plt.Line2D([], [], color=colour, linewidth=3, label=task) for task, colour in tasks.items()]
    handles += [plt.Line2D([], [], color="black", linestyle=styles[name], label=name) for name in runs if len(runs) > 1]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 8), frameon=False)
    save(figure, out_png)


def examples(rows: list[dict], out_png: str | Path) -> None:
    """Draw answers as bars under the frames of their videos, on one time axis in seconds, into a PNG.

    rows: dicts of clip (a Clip), query, truth (start, end), answers and iou {"before": ..., "after": ...}; an answer
    is (start, end) in seconds or None; "notes", where there are any, are lines to write below. The left edge of a
    frame is its time; what does not fit its place is cut off.
    """
    figure, axes = plt.subplots(len(rows), 1, figsize=(11, 2.2 * len(rows)), squeeze=False, layout="constrained")
    for axis, row in zip(axes[:, 0], rows):
        answers(axis, row)
        axis.set_xlabel("\n".join(row.get("notes", ())), fontsize=6.5, loc="left", wrap=True, parse_math=False)
    figure.supxlabel("time (s)", fontsize=10)
    save(figure, out_png)


def method(row: dict, segment: Clip, told: dict[str, str], out_png: str | Path) -> None:
    """Draw TVG and its inversion into a PNG: a row of `examples`, and below the segment that the inversion tasks see,
    with what they ask and what was answered: told {task: text}."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 4.9), height_ratios=(4.6, 3), layout="constrained")
    answers(above, row)
    above.set_xlabel("time (s)")
    part = min(len(segment.frames) / 12, 1)     # few frames are no wider than those above
    strip(below, segment, 13 * part)
    below.set(xlim=(0, segment.duration / part), ylim=(0, 3.05), yticks=(), xticks=())
    below.set_title("The true segment, turned around: all that VC, AR and VD see", fontsize=10, loc="left")
    below.set_xlabel("\n".join(f"{task}: {text}" for task, text in told.items()), fontsize=9, loc="left",
                     parse_math=False)
    below.spines[["left", "bottom"]].set_visible(False)
    save(figure, out_png)


def answers(axis: plt.Axes, row: dict) -> None:
    """The frames of a row of `examples`, and the truth and the answers as bars below them."""
    clip = row["clip"]
    strip(axis, clip)
    bars = {"truth": row["truth"], **row["answers"]}   # name: span in seconds or None
    heights = [-0.75 - 0.8 * i for i in range(len(bars))]
    colours = dict(zip(bars, (COLOURS["truth"], COLOURS["before"], COLOURS["after"], *NEW_TASKS)))
    for y, (name, span) in zip(heights, bars.items()):
        if span is None:
            axis.text(0.01 * clip.duration, y, "no answer", va="center", style="italic", color="grey")
        else:   # an answer of no length is a thin line
            left, right = np.clip(span, 0, (0.995 * clip.duration, clip.duration))   # beyond the end: at the end
            axis.barh(y, max(right - left, 0.005 * clip.duration), 0.6, left, color=colours[name])
    scores = ", ".join(f"{name} {value:.2f}" for name, value in row["iou"].items())
    axis.set_title(f"{row['query']}   (IoU {scores})", fontsize=10, loc="left", wrap=True, parse_math=False)
    axis.set(xlim=(0, clip.duration), ylim=(heights[-1] - 0.45, 3.05), yticks=heights, yticklabels=bars)
    axis.spines["left"].set_visible(False)


def strip(axis: plt.Axes, clip: Clip, ratio: float = 13) -> None:
    """Draw 10 to 16 frames of a Clip between heights 0 and 3, each in the middle of its place, on an axis that is
    `ratio` times as wide as they are high; what does not fit the place is cut off. Rather by a few more or less they
    are equally far apart: else a motion that starts anew each second may be seen at its start only."""
    total, _, h, w = clip.frames.shape
    wanted = min(max(round(ratio * h / w), 10), 16, total)
    n = min((n for n in range(10, 17) if total % n == 0), key=lambda n: abs(n - wanted), default=wanted)
    x, y = (int(max(cut, 0) // 2) for cut in (w - ratio * h / n, h - w * n / ratio))     # cut off at each side
    for i in range(n):
        frame = clip.frames[(2 * i + 1) * total // (2 * n), :, y:h - y, x:w - x].permute(1, 2, 0).numpy()
        left, right = i * clip.duration / n, (i + 0.96) * clip.duration / n   # a gap at the right
        axis.imshow(frame, extent=(left, right, 0, 3), aspect="auto", interpolation="nearest" if h < 100 else None)


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
    parser.add_argument("runs", nargs="+", help="output folders of train.py, or metrics.jsonl files")
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
