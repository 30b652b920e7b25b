"""One video and one query or several, on the tiny model: the answers of evaluate.py, printed, as JSON, drawn."""
import json
import shutil
from collections import Counter
from pathlib import Path

import matplotlib.image
import pytest
import torch
from conftest import ROOT, read_rows

import evaluate
import ground
from engine import flags
from engine.video import Clip


def config(model, path, queries, **changes):
    return ground.Config(video=str(path), queries=queries, model=str(model), max_tokens=64, **changes)


def test_answers_are_those_of_evaluate_and_the_video_is_read_once(folder, warm, tmp_path, monkeypatch, capsys):
    evaluate.main(evaluate.Config(model=str(warm), annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
                                  output=str(tmp_path / "eval"), cache=str(folder / "cache"), tasks=["TVG"],
                                  max_tokens=64))
    capsys.readouterr()
    rows = read_rows(tmp_path / "eval" / "predictions.jsonl")
    path, count = Counter(row["video"] for row in rows).most_common(1)[0]
    expected = [row for row in rows if row["video"] == path]
    copy, ask = Path(shutil.copy(path, tmp_path)), ground.ask
    # once the queries are asked there is no file that could be read again
    monkeypatch.setattr(ground, "ask", lambda *args: copy.unlink() or ask(*args))
    answers = ground.main(config(warm, copy, [row["query"] for row in expected], json=True, batch_size=1))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == answers and count > 1
    for answer, row in zip(answers, expected, strict=True):
        assert {name: row[name] for name in ("query", "start", "end", "completion")}.items() <= answer.items()


@pytest.mark.parametrize("text, lines", [
    ("<think>at\nfirst</think> <answer>12.539 to 17.8</answer>",
     ["12.54 to 17.80", "    query: a b", "    thought: at first"]),
    ("from 3 to 4", ["3.00 to 4.00", "    query: a b", "    completion: from 3 to 4"]),
    ("<think>who</think> knows", ["no answer", "    query: a b", "    completion: <think>who</think> knows"])])
def test_what_is_printed(folder, monkeypatch, capsys, text, lines):
    monkeypatch.setattr(ground.model.Encoder, "decode", lambda *_: [text])
    path = next((folder / "videos").iterdir())
    ground.main(config(folder / "model", path, [" a  b"], cache=str(folder / "cache")))
    assert capsys.readouterr().out.splitlines() == lines


def test_picture_shows_where_the_answers_are(tmp_path):
    clip = Clip(torch.full((20, 3, 56, 84), 128, dtype=torch.uint8), 2.0)                    # 10 s
    spans = {"early": (0.0, 2.0), "late $1 $2": (9.5, 99.0), "none": (None, None), "no length": (5.0, 5.0)}
    answers = [{"query": query, "start": start, "end": end} for query, (start, end) in spans.items()]
    ground.draw(clip, answers, str(tmp_path / "x" / "a.png"))
    picture = matplotlib.image.imread(tmp_path / "x" / "a.png")[..., :3]                      # (H, W, 3)
    for number, (low, high) in {0: (0.0, 0.22), 1: (0.93, 1.0), 3: (0.48, 0.52)}.items():
        colour = ground.plt.get_cmap("tab10").colors[number]
        columns = (abs(picture - colour) < 0.02).all(-1).any(0).nonzero()[0] / picture.shape[1]
        assert len(columns) and low <= columns.min() and columns.max() <= high, number
    grey = (abs(picture - 128 / 255) < 0.01).all(-1)
    assert grey.any(1).sum() > 100 and grey.any(0).mean() > 0.9                               # the strip of frames


@pytest.mark.parametrize("change, words", [
    ({"path": "nowhere.mp4"}, "nowhere.mp4: no such video file"),
    ({"queries": ["a", " "]}, "query 2 of 2 is empty"), ({"model": "nowhere"}, "nowhere.*--model"),
    ({"png": "README.md/a.png"}, "--png README.md"), ({"png": "docs"}, "--png docs: is a folder")])
def test_wrong_input_is_named(folder, monkeypatch, change, words):
    monkeypatch.chdir(ROOT)
    right = dict(model=folder / "model", path=next((folder / "videos").iterdir()), queries=["a"])
    with pytest.raises(ValueError, match=words):
        ground.main(config(**right | change))


def test_command_line(folder, tmp_path, monkeypatch, capsys):
    path = sorted((folder / "videos").iterdir())[0]
    words = [str(path), "the red circle is growing.", "--model", str(folder / "model"), "--max_tokens", "4", "--png",
             str(tmp_path / "a.png"), "--cache", str(folder / "cache")]
    monkeypatch.setattr("sys.argv", ["ground.py", *words])
    flags.command_line(ground.Config, ground.main, ground.__doc__)
    out = capsys.readouterr().out
    assert out.startswith("no answer\n    query: the red circle is growing.\n    completion: ")
    assert matplotlib.image.imread(tmp_path / "a.png").std() > 0.05


def test_the_video_is_read_as_flags_say(folder, monkeypatch):
    class Stop(Exception):
        pass

    def loader(*args):
        raise Stop(*args)

    monkeypatch.setattr(ground, "Loader", loader)
    with pytest.raises(Stop) as stop:
        ground.main(config(folder / "model", "v.mp4", ["a"], total_pixels=10 ** 6, video_timeout=7.0, cache="c",
                           cache_gb=2.0))
    assert stop.value.args == (10 ** 6, 7.0, "c", 2.0)
