"""plot.py: every picture is a real PNG, whatever state the logs are in.

    python -m pytest test_plot.py
"""

import json

import matplotlib.image
import numpy as np
import pytest
import torch

from support import plot
from support.video import Clip

PART = {"TVG": "iou", "VC": "vc", "AR": "ar", "VD": "vd"}


def log(path, steps, tasks=tuple(PART), ending=""):
    """Write a metrics.jsonl of made-up numbers; the last line may be followed by a torn one."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        task, score = tasks[step % len(tasks)], rng.random()
        lines.append(json.dumps({
            "step": step, "task": task, "reward": 1 + score, "format": 1.0, PART.get(task, "score"): score, "part": PART.get(task, "score"),
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
