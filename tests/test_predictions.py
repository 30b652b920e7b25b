"""Answers of other models: what the lenient reader reads, text files that are not quite text, which answer is of which
query, and scores."""
import bz2
import gzip
import json
import sys
import time

import pytest

import evaluate
import rewards
from data import Sample
from engine import flags
from lab import predictions

READ = r"""
    3.2 TO 9.1                                                 | 3.2 9.1
    3.2 until 9.1                                              | 3.2 9.1
    3.2s till 9.1                                              | 3.2 9.1
    3 through 9                                                | 3 9
    **3.2** to **9.1**                                         | 3.2 9.1
    `3.2` to _9.1_                                             | 3.2 9.1
    __3.2__ - __9.1__ s                                        | 3.2 9.1
    12.5s - 17.8s                                              | 12.5 17.8
    12.5–17.8                                                  | 12.5 17.8
    12.5 ~ 17.8 sec                                            | 12.5 17.8
    12.5 — 17.8 seconds                                        | 12.5 17.8
    12.5s->17.8s                                               | 12.5 17.8
    12.5 → 17.8                                                | 12.5 17.8
    12,5s to 17,8s                                             | 12.5 17.8
    3,5 to 7,2                                                 | 3.5 7.2
    3,5-7,25.                                                  | 3.5 7.25
    [3.2, 9.1]                                                 | 3.2 9.1
    [3,9]                                                      | 3 9
    (3.2; 9.1)                                                 | 3.2 9.1
    [[3.2, 9.1]]                                               | 3.2 9.1
    [3.2s, 9.1s]                                               | 3.2 9.1
    ["3.2", "9.1"]                                             | 3.2 9.1
    [3.2 - 9.1]                                                | 3.2 9.1
    3.2, 9.1                                                   | 3.2 9.1
    00:12 to 00:17                                             | 12 17
    0:01:12.5 - 0:01:20                                        | 72.5 80
    [00:12, 00:17]                                             | 12 17
    from 1:05 until 1:20.                                      | 65 80
    00:00:12,500 - 00:00:17,000                                | 12.5 17
    0:12s - 0:17s                                              | 12 17
    1 to 2 minutes                                             | 60 120
    1-2 min                                                    | 60 120
    0.5 to 1 hour                                              | 1800 3600
    1m to 2m                                                   | 60 120
    1 min 5 s to 1m20s                                         | 65 80
    1 minute and 5 seconds to 1 minute and 20 seconds          | 65 80
    1 minute and 2 minutes                                     | 60 120
    1 h 2 min - 1 h 3 min 5 s                                  | 3720 3785
    1m30 to 1m45                                               | 90 105
    50 s to 2 min                                              | 50 120
    1 min 30 to 1 min 45                                       | 90 105
    {"start": 3.2, "end": "9.1"}                               | 3.2 9.1
    {"start_time": "00:12", "end_time": "00:17"}               | 12 17
    ```json⏎{⏎  "start": 3.2,⏎  "end": 9.1⏎}⏎```               | 3.2 9.1
    {"end": 9.1, "start": 3.2}                                 | 3.2 9.1
    {"from": 3.2, "to": 9.1}                                   | 3.2 9.1
    {"timestamp": [3.2, 9.1], "score": 0.5}                    | 3.2 9.1
    {"time": "3.2 - 9.1"}                                      | 3.2 9.1
    start: 3.2⏎end: 9.1                                        | 3.2 9.1
    end: 9.1, start: 3.2                                       | 3.2 9.1
    it starts at 3.2 s and ends at 9.1 s                       | 3.2 9.1
    It begins around 3.2s and stops at 9.1s.                   | 3.2 9.1
    start=3.2; end=9.1                                         | 3.2 9.1
    begins at 1 min 5 s, finishes at 1 min 20 s                | 65 80
    2 to 3 steps between 5.0s - 10.0s                          | 5 10
    1 - 2, no, 3 - 4                                           | 3 4
    9 - 3                                                      | 9 3
    3 - 9⏎⏎The person sits.                                    | 3 9
    3 - 9 in the video                                         | 3 9
    3 - 9 s of it                                              | 3 9
"""      # the table in lab/predictions.py, and more; ⏎ is a new line
NOTHING = """
    10 - 20 %
    10-20% of the video
    10% - 20%
    24 - 48 frames
    frames 24 - 48
    2 - 3 steps
    1 - 2 dogs
    starts at 10% and ends at 20%
    starts at frame 24 and ends at frame 48
    1,200 to 1,300
    1 to 1,300
    1 min to 2
    -3 - 5
    3 - -5
    2024-05-12
    3 to 4e5
    12.5
    at 0:12
    [3.2, 9.1, 12]
    1.2.3 - 4
    start: -3, end: 5
    3/4 - 5
    1-2-3
    no idea
    ٣ - ٤
    start 3
"""


def cases():
    """(text of an answer, its span in seconds) of READ."""
    for line in READ.strip().splitlines():
        text, _, span = line.rpartition("|")
        yield text.strip().replace("⏎", "\n"), tuple(map(float, span.split()))


@pytest.mark.parametrize("text, span", list(cases()))
def test_forms_of_an_answer(text, span):
    for whole in (text, f"<think>1 to 2, [5, 6]</think> <answer>{text}</answer>", f"<think>[5, 6]</think>\n{text}",
                  f"<answer>8 - 9</answer> no: <answer> {text}", f"<answer>\n{text}\n</answer> or 5 - 6"):
        assert predictions.lenient(whole) == pytest.approx(span), whole


@pytest.mark.parametrize("text", ["", "\ud800", *map(str.strip, NOTHING.strip().splitlines())])
def test_what_is_not_seconds_is_not_read(text):
    assert predictions.lenient(text) is predictions.lenient(f"5 - 6 <answer>{text}</answer>") is None


@pytest.mark.parametrize("text", ["2.5 to 8", "2.5s to 8 seconds.", "between 2.5 and 8", "from 2.5 to 8 in the video"])
def test_what_training_reads_is_read_alike(text):
    assert predictions.lenient(text) == rewards.segment(text) == (2.5, 8)


@pytest.mark.parametrize("piece", ["1 to ", "1 ", "1", "1,", "1:", "1:1", "[1, ", "(", "start 1 ", "start ",
                                   "end start ", "end 1 start 1 ", "1 - ", " ", "\n", "1 min ", "1 h 1 min 1 s ", "-",
                                   "_", "*", "'", "<answer>", "1 and ", "frames ", "start: 1 end", "1 to 2 x", "a_"])
def test_reading_takes_linear_time(piece):
    text = piece * (100_000 // len(piece))
    began = time.process_time()
    predictions.lenient(text)
    predictions.lenient(f"1{text}2 - x")
    assert time.process_time() - began < 5      # a quadratic pattern takes minutes


# Files

def read(tmp_path, content):
    (tmp_path / "p.jsonl").write_bytes(content)
    return [(row["start"], row["end"], row["lenient"]) for row in predictions.read(str(tmp_path / "p.jsonl"))]


def test_strict_is_first_and_a_null_is_no_answer(tmp_path):
    """Rows of evaluate.py hold what training's reader read, null for nothing: their score must not change."""
    expected = {
        '"completion": "2 to 3 or [5, 6]"': (2, 3, False), '"completion": "5 - 6"': (5, 6, True),
        '"completion": "5 - 6", "start": null, "end": null': (None, None, False),
        '"start": "1", "end": 2': (1, 2, False), '"completion": "5 - 6", "error": "x"': (None, None, False),
        f'"completion": "5 - {"6" * 400}"': (None, None, True), '"completion": "nothing"': (None, None, False)}
    lines = [f'{{"id": "1", {fields}}}' for fields in [*expected, '"task": "VC", "completion": "x"']]
    assert read(tmp_path, "\n".join(lines).encode()) == list(expected.values())


def test_marks_and_line_ends(tmp_path):
    row = b'{"id": "1", "start": 1, "end": 2}'
    for end in (b"\n", b"\r\n", b"\r"):
        assert read(tmp_path, b"\xef\xbb\xbf" + row + end + end + row + end) == [(1, 2, False)] * 2


@pytest.mark.parametrize("content, name", [
    (gzip.compress(b"{}", mtime=0), "gzip"), (bz2.compress(b"{}"), "bzip2"), ("{}".encode("utf-16"), "UTF-16"),
    ("{}".encode("utf-32"), "UTF-32"), (b"\xfe\xff\0{\0}", "UTF-16"), ("{'a'}".encode("utf-16-le"), "UTF-16")])
def test_what_is_no_utf_8_is_called_by_its_name(tmp_path, content, name):
    with pytest.raises(ValueError, match=f"p.jsonl: cannot be read .*{name}.*JSON lines") as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line, words", [
    (b'{"id": "A:1", "start": 0', "no prediction"), (b"[1]", "no prediction"), (b"[" * 10 ** 5, "no prediction"),
    (b'{"start": 0, "end": 1}', "neither id"), (b'{"query": "q", "start": 1, "end": 2}', "neither id"),
    (b'{"id": "A:1"}', "neither start"), (b'{"id": "A:1", "start": "x", "end": 1}', "could not convert"),
    (b'{"id": "A:1", "completion": [1]}', "no prediction")])
def test_a_broken_line_is_named(tmp_path, line, words):
    with pytest.raises(ValueError, match=f"p.jsonl:2: .*{words}"):
        read(tmp_path, b'{"id": "A:1", "start": 0, "end": 1}\n' + line)


# Scores

LINES = ("A 0.0 10.0##person sits.\nA 10.0 20.0##person eats.\nB.x_1.0 0.0 10.0##Person  runs.\n"
         "C 0.0 4.0##person naps.\nD 0.0 4.0##person eats.\nE 0.0 4.0##person eats.\n")


def score(tmp_path, *rows, annotations=LINES, **changes):
    (tmp_path / "a.txt").write_text(annotations)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return predictions.main(predictions.Config(file=str(tmp_path / "p.jsonl"), annotations=str(tmp_path / "a.txt"),
                                               **changes))


def test_anybody_s_predictions(tmp_path):
    scores = score(
        tmp_path,
        {"id": "A:1", "start": 0, "end": 1}, {"id": "A:1", "start": 0.0, "end": "7"},      # the last: IoU 0.7
        {"id": "17", "video": "videos/A.mp4", "query": "person  EATS. ",
         "completion": "<think>10 to 12</think> from 10 to 15"},
        {"video": "B.x_1.0", "query": "person runs.", "start": 0, "end": 3, "task": "TVG"},         # IoU 0.3
        {"id": "C:4", "completion": "I do not know"}, {"id": "D:5", "error": "out of memory", "start": 0, "end": 4},
        {"id": "A:2", "query": "person sits.", "start": 0, "end": 9},                      # the id of another file
        {"id": "A", "start": 0, "end": 9}, {"video": "Z", "query": "person sits.", "start": 0, "end": 9})
    assert scores["queries"] == 6 and scores["mIoU"] == pytest.approx((0.7 + 0.5 + 0.3) / 6)
    assert scores["R1@0.7"] == pytest.approx(1 / 6) and scores["R1>0.7"] == 0
    wrong = ("unparsable", "missing", "failed", "unmatched", "duplicates", "rejected", "lenient")
    assert [scores[name] for name in wrong] == [1, 1, 1, 3, 1, 0, 0] and "unreadable" not in scores
    assert not any("best_window" in key for key in scores)
    assert scores["mIoU_95"][0] < scores["mIoU"] < scores["mIoU_95"][1] and scores["R1@0.7_95"][0] == 0


def test_lenient_answers_are_counted(tmp_path):
    scores = score(tmp_path, {"id": "A:1", "completion": "<answer>00:00 - 00:10</answer>"},
                   {"id": "A:2", "completion": "10 to 20"}, {"id": "C:4", "completion": "[0, 4]", "error": "x"},
                   {"id": "D:5", "completion": "10 to 20 %"},
                   {"id": "E:6", "start": None, "end": None, "completion": "0 - 4"})
    assert scores["mIoU"] == pytest.approx(2 / 6)
    assert [scores[name] for name in ("lenient", "unparsable", "failed", "missing")] == [1, 2, 1, 1]


@pytest.mark.parametrize("name, ids", [
    ({"qid": 7}, ["7:0", "7:1"]), ({"id": "7"}, ["7:0", "7:1"]), ({"id": "7:1"}, ["7:1"]),
    ({"video": "v_7.0_210.0", "query": "query 7"}, ["7:0", "7:1"])])
def test_one_answer_for_all_windows(name, ids):
    """QVHighlights: query 7 has two windows, query 8 one. By the id of a window the answer is that to it alone."""
    samples = [Sample(f"{qid}:{k}", f"x/v_{qid}.0_210.0.mp4", f"query {qid}", 0, 10, None, qid=qid)
               for qid, k in (("7", 0), ("7", 1), ("8", 0))]
    assert predictions.match([name], samples) == (dict.fromkeys(ids, name), {"unmatched": 0, "duplicates": 0})


def test_two_samples_of_one_query_are_no_windows(tmp_path):
    scores = score(tmp_path, {"video": "A", "query": "he sits.", "start": 20, "end": 30},
                   annotations="A 0 10##he sits.\nA 20 30##he sits.\n")
    assert scores["mIoU"] == 0.5 and scores["queries"] == 2 and not any("best_window" in name for name in scores)


def test_unusable_queries_stay_in_the_denominator(tmp_path):
    """As those of no length in TVGBench; whoever predicts them is not told that they are unknown."""
    annotations = "A 0 10##he sits.\nB 5 5##he eats.\n"
    right = {"id": "A:1", "start": 0, "end": 10}
    scores = score(tmp_path, right, {"id": "B:2", "start": 0, "end": 10}, annotations=annotations)
    counts = ("queries", "rejected", "rejected_as_0", "missing", "unmatched", "unparsable", "failed")
    assert [scores[name] for name in counts] == [2, 1, 1, 0, 0, 0, 0] and scores["mIoU"] == 0.5
    assert score(tmp_path, right, annotations=annotations) == scores          # or leaves them out


def test_own_predictions_score_the_same(folder, warm, tmp_path, monkeypatch, capsys):
    own = evaluate.main(evaluate.Config(
        model=str(warm), annotations=str(folder / "test.txt"), videos=str(folder / "videos"), tasks=["TVG", "AR"],
        output=str(tmp_path / "own"), cache=str(folder / "cache"), max_tokens=64))
    monkeypatch.setattr(sys, "argv", ["predictions.py", str(tmp_path / "own" / "predictions.jsonl"), "--annotations",
                                      str(folder / "test.txt"), "--output", str(tmp_path / "again")])
    flags.command_line(predictions.Config, predictions.main, predictions.__doc__)
    again = json.loads(capsys.readouterr().out)
    shared = {"queries", "mIoU", "mIoU_95", "R1@0.3", "R1@0.5_95", "R1>0.7", "right_event", "unparsable"}
    assert {name: own[name] for name in shared} == {name: again[name] for name in shared}
    assert again["missing"] == again["failed"] == 0
    assert json.loads((tmp_path / "again" / "scores.json").read_text()) == again
    assert len((tmp_path / "again" / "predictions.jsonl").read_text().splitlines()) == own["queries"]


@pytest.mark.parametrize("output, words", [("a.txt", "--output .*a.txt"), (".", "--output .* is not empty")])
def test_an_output_in_use_is_refused(tmp_path, output, words):
    with pytest.raises(ValueError, match=words):
        score(tmp_path, {"id": "A:1", "start": 0, "end": 1}, output=str(tmp_path / output))
