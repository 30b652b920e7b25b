"""engine/plot.py: what is drawn is what the logs and the answers hold, whatever state the logs are in."""
import json
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from engine import plot
from engine.video import Clip

PART = {"TVG": "iou", "VC": "vc", "AR": "ar", "VD": "vd"}


def log(folder, steps, tasks=tuple(PART), ending=""):
    """A folder with a metrics.jsonl of made-up numbers; a torn line may follow the last one."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        task, score = tasks[step % len(tasks)], rng.random()
        part = PART.get(task, "score")
        row = {"step": step, "task": task, "part": part, "reward": 1 + score, "format": 1.0, part: score, "kl": None,
               "tokens": 40 * rng.random(), "truncated": 0.0, "flat": 0.25, "grad_norm": rng.random()}
        lines.append(json.dumps(row) + "\n")
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(lines) + ending)
    return folder


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Runs a function of plot.py that writes a picture last; returns the axes of that picture."""
    figures, save = [], plot.save

    def watched(figure, out_png):
        figures.append(figure)
        save(figure, out_png)

    def draw(function, *arguments, **options):
        function(*arguments, out_png=tmp_path / "pictures" / "a.png", **options)
        height, width, _ = matplotlib.image.imread(tmp_path / "pictures" / "a.png").shape
        assert np.allclose((width, height), 130 * figures[-1].get_size_inches(), atol=9)
        assert len(list((tmp_path / "pictures").iterdir())) == 1
        return figures[-1].axes

    monkeypatch.setattr(plot, "save", watched)
    return draw


def lines(axis, colour, style="-"):
    """The lines of a colour and a style in a panel, as lists of [x, y]; "None" is the style of points."""
    return [line.get_xydata().tolist() for line in axis.lines
            if line.get_color() == colour and line.get_linestyle() == style]


@pytest.mark.parametrize("steps, ending", [(1, ""), (5, '{"step": 6, "ta'), (120, "6")])
def test_curves_of_one_run(tmp_path, drawn, steps, ending):
    """In each panel the points of each task are what was logged."""
    folder = log(tmp_path / "run", steps, ending=ending)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:steps]]
    panels = drawn(plot.curves, folder)
    for panel, (title, key, _, top) in zip(panels, plot.PANELS, strict=True):
        assert panel.get_title() == title and top in (None, pytest.approx(panel.get_ylim()[1] / 1.05))
        assert [text.get_text() for text in panel.texts] == (["not logged"] if key == "kl" else [])
        for task, part in PART.items():
            points = [[row["step"], row[part if key == "own" else key]] for row in rows if row["task"] == task]
            expected = [points] if points and key != "kl" else []
            assert lines(panel, plot.COLOURS[task], "None") == expected
            assert len(lines(panel, plot.COLOURS[task])) == len(expected)


def test_running_mean():
    """Over an eighth of the values, an odd number of at least 5 where there are so many; fewer at both ends."""
    values = np.random.default_rng(0).random(58)
    mean = plot.running_mean(values)
    assert mean.shape == (58,) and mean[30] == pytest.approx(values[27:34].mean())
    assert mean[0] == pytest.approx(values[:4].mean()) and mean[-1] == pytest.approx(values[-4:].mean())
    assert plot.running_mean(values[:2]).tolist() == values[:2].tolist()


def test_runs_of_unlike_lengths_and_tasks(tmp_path, drawn):
    """Runs differ by line style, new tasks have colours of their own, in turn where there are more than colours."""
    new = [f"task {i}" for i in range(5)]
    runs = {"a": log(tmp_path / "a", 30), "b": log(tmp_path / "b", 5, tasks=("TVG",)),
            "c": log(tmp_path / "c", 40, tasks=("TVG", *new))}
    panel, *_ = drawn(plot.curves, runs)
    counts = [len(line) for style in ("-", "--", ":") for line in lines(panel, plot.COLOURS["TVG"], style)]
    assert counts == [7, 5, 6]
    assert [len(lines(panel, colour, ":")) for colour in plot.NEW_TASKS] == [2, 1, 1, 1]
    legend, = panel.figure.legends
    assert [text.get_text() for text in legend.texts] == [*PART, *new, *runs]


def test_a_task_s_own_reward_is_known_by_the_name_of_its_part(tmp_path):
    steps = plot.read_metrics(log(tmp_path / "run", 8, tasks=("VC", "X")))
    assert [step["own"] for step in steps] == [step["score"] if step["task"] == "X" else step["vc"] for step in steps]
    odd = [{"step": 1, "iou": 0.5, "part": part} for part in ("gone", None, [], {"a": 1}, 3)] + [{"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in odd))
    assert [(step["own"], step["task"]) for step in plot.read_metrics(tmp_path)] == [(None, "?")] * 6


def test_held_out_scores_have_a_panel(tmp_path, drawn):
    """Of the run that has them: mIoU in TVG's colour, a task's accuracy in its own, also of a task not trained on."""
    runs = {name: log(tmp_path / name, 30, tasks=("TVG",)) for name in "ab"}
    row = {"queries": 9, "R1@0.5": 0.4, "mIoU_95": [0.1, 0.9], "note": "few", "format": 1.0}
    (tmp_path / "a" / "evaluations.jsonl").write_text("".join(
        json.dumps({"step": step, **row, "mIoU": 0.5 + step / 100, "VC": 0.9}) + "\n" for step in (0, 20)) + '{"st')
    assert plot.read_evaluations(runs["b"]) == []
    panels = drawn(plot.curves, runs)
    assert len(panels) == 9 and panels[8].get_title() == plot.HELD_OUT[0]
    assert lines(panels[8], plot.COLOURS["TVG"]) == [[[0, 0.5], [20, 0.7]]]
    assert lines(panels[8], plot.COLOURS["VC"]) == [[[0, 0.9], [20, 0.9]]]
    assert len(drawn(plot.curves, runs["b"])) == 8


def test_the_command(tmp_path):
    run = log(tmp_path / "run", 3)
    command = [sys.executable, "-m", "engine.plot", str(run), "--output", str(tmp_path / "curves.png")]
    done = subprocess.run(command, cwd=Path(plot.__file__).parent.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "curves.png").is_file(), done.stderr


@pytest.mark.parametrize("text", [
    None, "", '{"step": 1, "ta', '{"step": 1}\nnot json\n{"step": 3}\n', '[1]\n{"step": 3}\n'])
def test_files_that_cannot_be_drawn_end_with_one_line_and_code_2(tmp_path, capsys, text):
    path = tmp_path / "metrics.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(tmp_path), "--output", str(tmp_path / "curves.png")])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith(f"plot.py: {path}") and printed.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()


def row(start, end, iou):
    return {"query": "a $5 cup", "truth": (0.5, 1.5), "start": start, "end": end, "iou": iou, "completion": f"so {iou}"}


@pytest.mark.parametrize("frames, height, width", [(32, 28, 28), (70, 140, 252), (4, 420, 56)])
def test_examples(drawn, frames, height, width):
    """Bars are the true segment and the answers, in seconds; one outside the video, or of no length, can be seen."""
    clip = Clip(torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8), 2.0)
    end = clip.duration
    rows = [{"before": row(None, None, 0.0), "after": row(0.6, 1.4, 0.8)},
            {"before": row(900.0, 901.0, 0.0), "after": row(1.0, 1.0, 0.1)}]
    above, below = drawn(plot.examples, [clip, clip], rows, thoughts=True)
    bars = [(bar.get_x(), bar.get_width(), to_hex(bar.get_facecolor())) for bar in (*above.patches, *below.patches)]
    colours = [plot.COLOURS[name].lower() for name in ("truth", "after", "truth", "before", "after")]
    assert [colour for *_, colour in bars] == colours
    assert np.allclose([bar[:2] for bar in bars], [
        (0.5, 1.0), (0.6, 0.8), (0.5, 1.0), (0.995 * end, 0.005 * end), (1.0, 0.005 * end)])
    assert [text.get_text() for text in above.texts] == ["no answer"] and above.get_xlim() == (0, end)
    assert [label.get_text() for label in above.get_yticklabels()] == ["truth", "before", "after"]
    assert above.get_title("left") == "a $5 cup   (IoU before 0.00, after 0.80)"
    assert above.get_xlabel() == "before: so 0.0\nafter: so 0.8"


def test_method(drawn):
    clip = Clip(torch.full((32, 3, 28, 28), 9, dtype=torch.uint8), 2.0)
    segment = Clip(torch.full((4, 3, 28, 28), 7, dtype=torch.uint8), 2.0)
    above, below = drawn(plot.method, clip, {"before": row(1, 2, 0.0)}, segment, {"VC": "asked", "AR": "$1"})
    assert len(above.patches) == 2 and below.get_xlabel() == "VC: asked\nAR: $1"
    assert [image.get_array().mean() for image in below.get_images()] == [7] * 4
    assert below.get_xlim() == (0, 3 * segment.duration)        # four frames take a third of the width


@pytest.mark.parametrize("total, expected", [(24, range(1, 24, 2)), (70, range(2, 70, 5)), (8, range(8)),
                                             (23, [(2 * i + 1) * 23 // 26 for i in range(13)])])
def test_a_strip_has_frames_equally_far_apart(total, expected):
    """Where their number allows it; of 24, two per second, every second one, not the first of some seconds."""
    frames = torch.arange(total, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 28, 28)
    axis = plot.plt.figure().subplots()
    plot.strip(axis, Clip(frames, 2.0))
    assert [int(image.get_array()[0, 0, 0]) for image in axis.get_images()] == list(expected)
    plot.plt.close(axis.figure)
