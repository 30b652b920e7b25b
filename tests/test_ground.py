"""One video and one query or several, on the tiny model: the answers of evaluate.py, printed, as JSON, drawn."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import data
import evaluate
import ground
import tasks
from engine import flags, loader
from engine.video import Clip

HERE = Path(__file__).parent.parent


def config(model, path, queries, **flags):
    return ground.Config(video=str(path), queries=queries, model=str(model), max_tokens=64, **flags)


def test_answers_are_those_of_evaluate_and_the_video_is_decoded_once(folder, warm, tmp_path, monkeypatch, capsys):
    samples, _ = data.read(str(folder / "test.txt"), str(folder / "videos"))
    path = next(s.video for s in samples if sum(t.video == s.video for t in samples) > 1)
    samples = [s for s in samples if s.video == path]
    evaluate.main(evaluate.Config(model=str(warm), annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
                                  output=str(tmp_path / "eval"), tasks=["TVG"], max_tokens=64))
    capsys.readouterr()
    expected = {row["id"]: row for row in map(json.loads, open(tmp_path / "eval" / "predictions.jsonl"))}
    copy, prepare = Path(shutil.copy(path, tmp_path)), tasks.prepare
    # from the first query on there is no file that could be decoded again
    monkeypatch.setattr(tasks, "prepare", lambda *args: copy.unlink(missing_ok=True) or prepare(*args))
    answers = ground.main(config(warm, copy, [s.query for s in samples], json=True, batch_size=1))
    said = capsys.readouterr().out
    assert [json.loads(line) for line in said.splitlines()] == answers and not copy.exists()
    for sample, answer in zip(samples, answers, strict=True):
        row = expected[sample.id]
        assert [answer[k] for k in ("query", "start", "end", "completion")] == \
            [row[k] for k in ("query", "start", "end", "completion")]
    (tmp_path / "answers.jsonl").write_text(said)                           # --json is what --predictions scores
    scores = evaluate.main(evaluate.Config(annotations=str(folder / "test.txt"),
                                           predictions=str(tmp_path / "answers.jsonl")))
    assert scores["unmatched"] == 0 and scores["missing"] == scores["queries"] - len(samples)


@pytest.mark.parametrize("text, lines", [
    ("<think>at\nfirst</think> <answer>12.539 to 17.8</answer>",
     ["12.54 to 17.80", "    query: a b", "    thought: at first"]),
    ("from 3 to 4", ["3.00 to 4.00", "    query: a b", "    completion: from 3 to 4"]),
    ("<think>who</think> knows", ["no answer", "    query: a b", "    completion: <think>who</think> knows"])])
def test_what_is_printed(folder, monkeypatch, capsys, text, lines):
    monkeypatch.setattr(ground.model.Encoder, "decode", lambda *_: [text])
    path = next(p for p in (folder / "videos").iterdir())
    ground.main(config(folder / "model", path, [" a  b"]))
    assert capsys.readouterr().out.splitlines() == lines


def test_picture_shows_where_the_answers_are(tmp_path):
    clip = Clip(torch.full((20, 3, 56, 84), 128, dtype=torch.uint8), 2.0)                    # 10 s
    spans = {"early": (0.0, 2.0), "late $1 $2": (9.5, 99.0), "none": (None, None), "no length": (5.0, 5.0)}
    ground.draw(clip, [{"query": q, "start": a, "end": b} for q, (a, b) in spans.items()],
                str(tmp_path / "x" / "a.png"))
    picture = matplotlib.image.imread(tmp_path / "x" / "a.png")[..., :3]                      # (H, W, 3)
    width = picture.shape[1]
    for number, (low, high) in {0: (0.0, 0.22), 1: (0.93, 1.0), 3: (0.48, 0.52)}.items():
        colour = ground.plt.get_cmap("tab10").colors[number]
        columns = (abs(picture - colour) < 0.02).all(-1).any(0).nonzero()[0] / width
        assert len(columns) and low <= columns.min() and columns.max() <= high, number
    grey = (abs(picture - 128 / 255) < 0.01).all(-1)
    assert grey.any(1).sum() > 100 and grey.any(0).mean() > 0.9                               # the strip of frames


@pytest.mark.parametrize("words, flags", [
    (["v.mp4", "a b", "--model", "m"], ["--model", "m", "--video", "v.mp4", "--queries", "a b"]),
    (["--json", "v.mp4", "--model=m", "a", "--png", "x.png", "b"],
     ["--json", "--model=m", "--png", "x.png", "--video", "v.mp4", "--queries", "a", "b"]),
    (["v.mp4", "", "--model", "m"], ["--model", "m", "--video", "v.mp4", "--queries", ""]),
    (["--video", "v", "--queries", "a", "b"], ["--video", "v", "--queries", "a", "b"]), (["--help"], ["--help"])])
def test_words_may_stand_among_the_flags(words, flags):
    assert ground.flags(words) == flags


@pytest.mark.parametrize("change, words", [
    ({"video": "nowhere.mp4"}, "nowhere.mp4: no such video file"),
    ({"video": __file__}, "test_ground.py: cannot be decoded"),
    ({"queries": ["a", " "]}, "query 2 of 2 is empty"), ({"model": "nowhere"}, "nowhere.*--model")])
def test_wrong_input_is_one_line_and_code_2(folder, monkeypatch, capsys, change, words):
    values = {"video": str(next((folder / "videos").iterdir())), "queries": ["a"], "model": str(folder / "model"),
              **change}
    monkeypatch.setattr(sys, "argv", ["ground.py",
                                      *ground.flags([values["video"], *values["queries"], "--model", values["model"]])])
    with pytest.raises(SystemExit) as stop:
        flags.command_line(ground.Config, ground.main, ground.__doc__)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.err.count("\n") == 1 and not said.out
    with pytest.raises(ValueError, match=words):
        raise ValueError(said.err)


def test_command_line(folder, tmp_path):
    path = sorted((folder / "videos").iterdir())[0]
    done = subprocess.run([sys.executable, str(HERE / "ground.py"), str(path), "the red circle is growing.", "--model",
                           str(folder / "model"), "--max_tokens", "4", "--png", str(tmp_path / "a.png")],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no answer\n    query: the red circle is growing.\n    completion: ")
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.05


def test_every_flag_that_a_message_names_is_there(folder, tmp_path, monkeypatch):
    path, limits = next((folder / "videos").iterdir()), []
    with pytest.raises(ValueError, match="--video_timeout"):
        ground.main(config(folder / "model", path, ["a"], video_timeout=0.0))
    monkeypatch.setattr(loader.Worker, "ask", lambda self, request: limits.append(self.limit) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ground.main(config(folder / "model", path, ["a"], video_timeout=7.0))
    assert limits == [7.0]
    sources = (HERE / "ground.py", HERE / "support" / "loader.py", HERE / "support" / "video.py")
    named = {name for source in sources for name in re.findall(r'"[^"\n]*?--(\w+)[^"\n]*"', source.read_text())}
    assert "video_timeout" in named and named - {"help"} <= {*ground.Config.__dataclass_fields__}
