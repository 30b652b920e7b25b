"""Answers of other models: what the lenient reader reads as what, and text files that are not quite text."""
import bz2
import gzip
import json
import time

import pytest

import rewards

READ = [        # the table in engine/predictions.py, and more
    ("3.2 TO 9.1", (3.2, 9.1)), ("3.2 until 9.1", (3.2, 9.1)), ("3.2s till 9.1", (3.2, 9.1)), ("3 through 9", (3, 9)),
    ("**3.2** to **9.1**", (3.2, 9.1)), ("`3.2` to _9.1_", (3.2, 9.1)), ("__3.2__ - __9.1__ s", (3.2, 9.1)),
    ("12.5s - 17.8s", (12.5, 17.8)), ("12.5–17.8", (12.5, 17.8)), ("12.5 ~ 17.8 sec", (12.5, 17.8)),
    ("12.5 — 17.8 seconds", (12.5, 17.8)), ("12.5s->17.8s", (12.5, 17.8)), ("12.5 → 17.8", (12.5, 17.8)),
    ("12,5s to 17,8s", (12.5, 17.8)), ("3,5 to 7,2", (3.5, 7.2)), ("3,5-7,25.", (3.5, 7.25)),
    ("[3.2, 9.1]", (3.2, 9.1)), ("[3,9]", (3, 9)), ("(3.2; 9.1)", (3.2, 9.1)), ("[[3.2, 9.1]]", (3.2, 9.1)),
    ("[3.2s, 9.1s]", (3.2, 9.1)), ('["3.2", "9.1"]', (3.2, 9.1)), ("[3.2 - 9.1]", (3.2, 9.1)), ("3.2, 9.1", (3.2, 9.1)),
    ("00:12 to 00:17", (12, 17)), ("0:01:12.5 - 0:01:20", (72.5, 80)), ("[00:12, 00:17]", (12, 17)),
    ("from 1:05 until 1:20.", (65, 80)), ("00:00:12,500 - 00:00:17,000", (12.5, 17)), ("0:12s - 0:17s", (12, 17)),
    ("1 to 2 minutes", (60, 120)), ("1-2 min", (60, 120)), ("0.5 to 1 hour", (1800, 3600)), ("1m to 2m", (60, 120)),
    ("1 min 5 s to 1m20s", (65, 80)), ("1 minute and 5 seconds to 1 minute and 20 seconds", (65, 80)),
    ("1 minute and 2 minutes", (60, 120)), ("1 h 2 min - 1 h 3 min 5 s", (3720, 3785)), ("1m30 to 1m45", (90, 105)),
    ("50 s to 2 min", (50, 120)), ("1 min 30 to 1 min 45", (90, 105)),
    ('{"start": 3.2, "end": "9.1"}', (3.2, 9.1)), ('{"start_time": "00:12", "end_time": "00:17"}', (12, 17)),
    ('```json\n{\n  "start": 3.2,\n  "end": 9.1\n}\n```', (3.2, 9.1)), ('{"end": 9.1, "start": 3.2}', (3.2, 9.1)),
    ('{"from": 3.2, "to": 9.1}', (3.2, 9.1)), ('{"timestamp": [3.2, 9.1], "score": 0.5}', (3.2, 9.1)),
    ('{"time": "3.2 - 9.1"}', (3.2, 9.1)), ("start: 3.2\nend: 9.1", (3.2, 9.1)), ("end: 9.1, start: 3.2", (3.2, 9.1)),
    ("it starts at 3.2 s and ends at 9.1 s", (3.2, 9.1)), ("It begins around 3.2s and stops at 9.1s.", (3.2, 9.1)),
    ("start=3.2; end=9.1", (3.2, 9.1)), ("begins at 1 min 5 s, finishes at 1 min 20 s", (65, 80)),
    ("2 to 3 steps between 5.0s - 10.0s", (5, 10)), ("1 - 2, no, 3 - 4", (3, 4)), ("9 - 3", (9, 3)),
    ("3 - 9\n\nThe person sits.", (3, 9)), ("3 - 9 in the video", (3, 9)), ("3 - 9 s of it", (3, 9))]
NOTHING = ["10 - 20 %", "10-20% of the video", "10% - 20%", "24 - 48 frames", "frames 24 - 48", "2 - 3 steps",
           "1 - 2 dogs", "starts at 10% and ends at 20%", "starts at frame 24 and ends at frame 48", "1,200 to 1,300",
           "1 to 1,300", "1 min to 2", "-3 - 5", "3 - -5", "2024-05-12", "3 to 4e5", "12.5", "at 0:12",
           "[3.2, 9.1, 12]", "1.2.3 - 4", "start: -3, end: 5", "3/4 - 5", "1-2-3", "", "no idea", "٣ - ٤",
           "start 3", "\ud800"]


@pytest.mark.parametrize("text, span", READ)
def test_forms_of_an_answer(text, span):
    for whole in (text, f"<think>1 to 2, [5, 6]</think> <answer>{text}</answer>", f"<think>[5, 6]</think>\n{text}",
                  f"<answer>8 - 9</answer> no: <answer> {text}", f"<answer>\n{text}\n</answer> or 5 - 6"):
        assert predictions.lenient(whole) == pytest.approx(span), whole


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_not_seconds_is_not_read(text):
    assert predictions.lenient(text) is predictions.lenient(f"5 - 6 <answer>{text}</answer>") is None


@pytest.mark.parametrize("text", ["2.5 to 8", "2.5s to 8 seconds.", "between 2.5 and 8", "from 2.5 to 8 in the video"])
def test_what_training_reads_is_read_alike(text):
    assert predictions.lenient(text) == rewards.segment(text) == (2.5, 8)


@pytest.mark.parametrize("piece", ["1 to ", "1 ", "1", "1,", "1:", "1:1", "[1, ", "(", "start 1 ", "start ",
                                   "end start ", "end 1 start 1 ", "1 - ", " ", "\n", "1 min ", "1 h 1 min 1 s ", "-",
                                   "_", "*", "'", "<answer>", "1 and ", "frames ", "start: 1 end", "1 to 2 x", "a_"])
def test_reading_takes_linear_time(piece):
    began = time.process_time()
    predictions.lenient(piece * (100_000 // len(piece))), predictions.lenient("1" + piece * (100_000 // len(piece)) + "2 - x")
    assert time.process_time() - began < 5      # a quadratic pattern takes minutes


def read(tmp_path, *rows):
    (tmp_path / "p.jsonl").write_bytes(rows[0] if isinstance(rows[0], bytes) else
                                       "\n".join(map(json.dumps, rows)).encode())
    found = predictions.read(str(tmp_path / "p.jsonl"), rewards.segment)
    return [(row["start"], row["end"], row["lenient"]) for row in found]


def test_strict_is_first_and_a_null_is_no_answer(tmp_path):
    """Rows of this project hold what training's reader found, null for nothing: their score must not change."""
    assert read(tmp_path, {"id": "1", "completion": "2 to 3 or [5, 6]"}, {"id": "1", "completion": "5 - 6"},
                {"id": "1", "completion": "5 - 6", "start": None, "end": None}, {"id": "1", "start": "1", "end": 2},
                {"id": "1", "completion": "5 - 6", "error": "x"}, {"id": "1", "completion": "5 - " + "6" * 400},
                {"id": "1", "completion": "nothing"}) == [
        (2, 3, False), (5, 6, True), (None, None, False), (1, 2, False), (None, None, False), (None, None, True),
        (None, None, False)]


def test_marks_and_line_ends(tmp_path):
    row = b'{"id": "1", "start": 1, "end": 2}'
    for end in (b"\n", b"\r\n", b"\r"):
        assert read(tmp_path, b"\xef\xbb\xbf" + row + end + row + end) == [(1, 2, False)] * 2


@pytest.mark.parametrize("content, name", [
    (gzip.compress(b"{}", mtime=0), "gzip"), (bz2.compress(b"{}"), "bzip2"), ("{}".encode("utf-16"), "UTF-16"),
    ("{}".encode("utf-32"), "UTF-32"), (b"\xfe\xff\0{\0}", "UTF-16"), ("{'a'}".encode("utf-16-le"), "UTF-16")])
def test_what_is_no_utf_8_is_called_by_its_name(tmp_path, content, name):
    with pytest.raises(ValueError, match=f"p.jsonl: cannot be read .*{name}.*--predictions") as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)
