"""plot.py: every picture is a real PNG, whatever state the logs are in, and shows what the log holds."""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
import torch

from engine import plot
from engine.video import Clip

PART = {"TVG": "iou", "VC": "vc", "AR": "ar", "VD": "vd"}


def log(path, steps, tasks=tuple(PART), ending="", old=False):
    """Write a metrics.jsonl of made-up numbers; the last line may be followed by a torn one. The rows of an old log do
    not say which is the task's own part of the reward."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        task, score = tasks[step % len(tasks)], rng.random()
        lines.append(json.dumps({
            "step": step, "task": task, "reward": 1 + score, "format": 1.0, PART.get(task, "score"): score,
            **({} if old else {"part": PART.get(task, "score")}),
            "tokens": 40 * rng.random(), "truncated": 0.0, "flat": 0.25, "kl": 0.01 * rng.random(), "loss": 0.0,
            "grad_norm": rng.random(), "lr": 1e-5, "seconds": 1.5, "tokens_per_second": 900.0}) + "\n")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines) + ending)
    return path


def check(path, width, height):
    """A PNG of at least this size in which something is drawn."""
    picture = matplotlib.image.imread(path)   # (H, W, 4)
    assert picture.shape[0] >= height and picture.shape[1] >= width
    assert (picture[..., :3] < 0.9).any(-1).mean() > 0.01
    assert [file.name for file in path.parent.glob("*.part")] == []


@pytest.mark.parametrize("steps, ending", [(1, ""), (5, '{"step": 6, "ta'), (120, "6\n")])
def test_curves_of_one_run(tmp_path, steps, ending):
    path = log(tmp_path / "metrics.jsonl", steps, ending=ending)
    assert len(plot.read_metrics(path)) == steps
    plot.curves(path, tmp_path / "out" / "curves.png")
    check(tmp_path / "out" / "curves.png", 1600, 700)


def test_command_line_draws_runs_of_unlike_lengths_and_tasks(tmp_path):
    runs = [log(tmp_path / "a" / "metrics.jsonl", 30).parent, log(tmp_path / "b.jsonl", 5, tasks=("TVG",)),
            log(tmp_path / "c.jsonl", 4, tasks=("a new task",))]
    plot.main([*map(str, runs), "--output", str(tmp_path / "curves.png")])
    check(tmp_path / "curves.png", 1600, 700)


def shown(path, colour):
    """How many pixels of a picture have a colour."""
    picture = matplotlib.image.imread(path)[..., :3]    # (H, W, 3)
    return int((abs(picture - np.array(matplotlib.colors.to_rgb(colour))) < 0.01).all(-1).sum())


def test_a_task_s_own_reward_is_known_by_the_name_of_its_part(tmp_path):
    """The panel is drawn for a part of any name, in an old log for the parts of its time."""
    new = log(tmp_path / "new.jsonl", 8)
    assert all(step["own"] == step[PART[step["task"]]] for step in plot.read_metrics(new))
    assert [step["own"] for step in plot.read_metrics(log(tmp_path / "old.jsonl", 8, old=True))] == \
        [step["own"] for step in plot.read_metrics(new)]
    assert all(step["own"] == step["score"] for step in plot.read_metrics(log(tmp_path / "x.jsonl", 3, tasks=("X",))))
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps({"step": 1, "task": "X", "iou": 0.5, "part": part}) + "\n"
                            for part in ("gone", None, [], {"a": 1}, 3)))
    assert not any("own" in step for step in plot.read_metrics(path))


def test_new_tasks_have_colours_of_their_own(tmp_path):
    path = log(tmp_path / "metrics.jsonl", 120, tasks=("TVG", "OBJ", "PLACE"))
    plot.curves(path, tmp_path / "curves.png")
    pixels = {colour: shown(tmp_path / "curves.png", colour) for colour in (*plot.COLOURS.values(), *plot.NEW_TASKS)}
    lines = {plot.COLOURS["TVG"], *plot.NEW_TASKS[:2]}
    others = {plot.COLOURS["VC"], plot.COLOURS["AR"], plot.COLOURS["VD"], plot.NEW_TASKS[3]}
    assert min(pixels[colour] for colour in lines) > 1000 and max(pixels[colour] for colour in others) == 0
    many = log(tmp_path / "many.jsonl", 30, tasks=("TVG", *(f"task {i}" for i in range(7))))    # more than colours
    plot.curves(many, tmp_path / "many.png")
    check(tmp_path / "many.png", 1600, 700)


def test_the_command(tmp_path):
    run = log(tmp_path / "run" / "metrics.jsonl", 3).parent
    command = [sys.executable, "-m", "engine.plot", str(run), "--output", str(tmp_path / "curves.png")]
    done = subprocess.run(command, cwd=Path(plot.__file__).parent.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "curves.png", 1600, 700)


def test_missing_and_empty_values_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "task": "TVG", "kl": null, "reward": NaN}\n'
                    '{"step": 3, "task": "TVG", "reward": 1.5, "grad_norm": NaN}\n')
    plot.curves(path, tmp_path / "curves.png")
    check(tmp_path / "curves.png", 1600, 700)


@pytest.mark.parametrize("text", [
    None, "", '{"step": 1, "ta', '{"step": 1}\nnot json\n{"step": 3}\n', '[1]\n{"step": 3}\n'])
def test_files_that_cannot_be_drawn_end_with_one_line_and_code_2(tmp_path, capsys, text):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(path), "--output", str(tmp_path / "curves.png")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"plot.py: {path}") and said.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize("frames, height, width", [(32, 28, 28), (70, 140, 252), (4, 420, 56)])
def test_examples(tmp_path, frames, height, width):
    clip = Clip(torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8), 1.99)
    rows = [
        {"clip": clip, "query": "a $5 bill for a $2 cup", "truth": (0.5, 1.5), "iou": {"before": 0.0, "after": 0.8},
         "answers": {"before": None, "after": (0.6, 1.4)}},
        {"clip": clip, "query": "person runs", "truth": (0.0, 1.0), "iou": {"before": 0.0, "after": 0.1},
         "answers": {"before": (900.0, 901.0), "after": (1.0, 1.0)}},   # outside the video, and of no length
    ]
    plot.examples(rows, tmp_path / "examples.png")
    check(tmp_path / "examples.png", 1200, 500)


def test_held_out_scores_have_a_panel(tmp_path):
    """Of the run that has them: mIoU in TVG's colour, a task's accuracy in its own, also of a task not trained on."""
    runs = {name: log(tmp_path / name / "metrics.jsonl", 30, tasks=("TVG",)).parent for name in "ab"}
    row = {"queries": 9, "R1@0.5": 0.4, "mIoU_95": [0.1, 0.9], "note": "few", "format": 1.0}
    (tmp_path / "a" / "evaluations.jsonl").write_text("".join(
        json.dumps({"step": step, **row, "mIoU": 0.5 + step / 100, "VC": 0.9}) + "\n" for step in (0, 20)) + '{"st')
    assert plot.read_evaluations(runs["b"]) == plot.read_evaluations(tmp_path / "none.jsonl") == []
    assert plot.read_evaluations(runs["a"] / "metrics.jsonl") == [
        {"step": 0, "task": "TVG", "held_out": 0.5}, {"step": 0, "task": "VC", "held_out": 0.9},
        {"step": 20, "task": "TVG", "held_out": 0.7}, {"step": 20, "task": "VC", "held_out": 0.9}]
    plot.curves(runs, tmp_path / "both.png")
    check(tmp_path / "both.png", 1500, 1300)
    plot.curves(runs["b"], tmp_path / "b.png")
    assert shown(tmp_path / "both.png", plot.COLOURS["VC"]) > 300 and not shown(tmp_path / "b.png", plot.COLOURS["VC"])


@pytest.mark.parametrize("total, drawn", [(24, range(1, 24, 2)), (70, range(2, 70, 5)), (8, range(8)),
                                          (23, [(2 * i + 1) * 23 // 26 for i in range(13)])])
def test_a_strip_has_frames_equally_far_apart(total, drawn):
    """Where their number allows it; of 24 frames, two a second, every second one and not the first of some seconds."""
    frames = torch.arange(total, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 28, 28)
    axis = plot.plt.figure().subplots()
    plot.strip(axis, Clip(frames, 2.0))
    assert [int(image.get_array()[0, 0, 0]) for image in axis.get_images()] == list(drawn)
    plot.plt.close(axis.figure)
