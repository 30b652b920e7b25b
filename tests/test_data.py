"""Annotation files of every format with their irregularities, looking up videos, the linter."""
import gzip
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from made_videos import constant, write

import data


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("AO8RW.mp4", "00607.mkv", "21E40.MP4"):
        (folder / name).touch()
    return folder


def read(tmp_path, content):
    """(samples, rejected) of an object that is written as json, or of a text; the file has an unhelpful name."""
    path = tmp_path / "annotations.csv"
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode())
    return data.read(str(path), None)


def reasons(rejected):
    return [item.reason for item in rejected]


def places(rejected):
    return [item.place.rpartition(":")[2].strip() for item in rejected]


def test_reads_what_is_usable_and_names_what_is_not(tmp_path, videos):
    """Only a line feed ends a line; a byte order mark and tabs do no harm."""
    path = tmp_path / "train.txt"
    path.write_text("\ufeffAO8RW 0.0\t6.9##a person is putting\u2028a book on a shelf.\n"
                    "00607 24 30.5##  turn #1\u00a0  on   \r\n"
                    "\n"
                    "IOL8Q 20.9 12.0##person opens a door.\n"
                    "21E40 -1.0 3.0##person sits.\n"
                    "21E40 nan 3.0##person sits.\n"
                    "21E40 1.0 2.0##\n"
                    "no segment here\n"
                    "50E06 1.0 2.0##person l\u00e4uft.", encoding="utf-8")
    samples, rejected = data.read(str(path), str(videos))
    assert [(s.id, s.query, s.start, s.end) for s in samples] == [
        ("AO8RW:1", "a person is putting a book on a shelf.", 0.0, 6.9),
        ("00607:2", "turn #1 on", 24.0, 30.5), ("50E06:9", "person l\u00e4uft.", 1.0, 2.0)]
    assert [os.path.basename(s.video) for s in samples] == ["AO8RW.mp4", "00607.mkv", "50E06.mp4"]
    assert places(rejected) == ["4", "5", "6", "7", "8"]
    assert "20.9" in rejected[0].detail and "start end##" in rejected[4].detail


GOOD = {    # one entry of each format, all the same: from 1 to 4 s of 10 s
    "ActivityNet": {"duration": 10.0, "timestamps": [[1, 4.0]], "sentences": ["  A man\nsits. "]},
    "QVHighlights": {"qid": 9, "query": " A man\nsits.", "vid": "v_1.5_2.0", "duration": 10,
                     "relevant_windows": [[1, 4]]},
    "TimeRFT": {"video": "./x/v.mp4", "timestamp": [1, 4.0], "sentence": "A man  sits.",
                "duration": 10.0, "video_start": None, "video_end": None},
    "TVGBench": {"path": "./x/v.mp4", "question": "A man sits. ", "answer": "1.0-4",
                 "start": None, "end": None, "duration": 10.0},
    "TimeLens-Bench": {"duration": 10.0, "spans": [[1, 4.0]], "queries": ["  A man\nsits. "]},
    "TimeLens-100K": {"video_path": "x/v.mp4", "duration": 10.0, "query": " A man sits.",
                      "span": [[1, 4.0]], "source": "x"}}
NAMES = {   # what a format calls it, where it does not say segment, query, video, from, to
    "ActivityNet": {"segment": "timestamps", "query": "sentences"},
    "QVHighlights": {"segment": "relevant_windows", "video": "vid"},
    "TimeRFT": {"segment": "timestamp", "query": "sentence", "from": "video_start", "to": "video_end"},
    "TVGBench": {"segment": "answer", "query": "question", "video": "path", "from": "start",
                 "to": "end"},
    "TimeLens-Bench": {"segment": "spans", "query": "queries"},
    "TimeLens-100K": {"segment": "span", "video": "video_path"}}
LISTS = ("timestamps", "sentences", "relevant_windows", "spans", "queries")
GONE = object()


def entry(form, **changes):
    """A copy of GOOD[form] with other values; `segment`, `from`, ... are called as the format calls them."""
    values = dict(GOOD[form])
    for key, value in changes.items():
        name = NAMES[form].get(key, key)
        if name in LISTS:
            value = [value]
        elif name == "answer" and isinstance(value, list):
            value = "-".join(map(str, value))
        values[name] = value
        if value is GONE:
            del values[name]
    return values


def file_of(form, entries):
    """The content of a file of these entries. Where an entry is a video, they are v0, v1, ..."""
    if form in ("ActivityNet", "TimeLens-Bench"):
        return {f"v{number}": item for number, item in enumerate(entries)}
    if form in ("QVHighlights", "TimeLens-100K"):
        return "\r\n".join(map(json.dumps, entries))
    return entries


def read_changed(tmp_path, form, **changes):
    """(samples, rejected) of a file of a changed entry and a good one."""
    return read(tmp_path, file_of(form, [entry(form, qid=8, **changes), entry(form)]))


@pytest.mark.parametrize("form, id, video", [
    ("ActivityNet", "v0:0", "v0"), ("QVHighlights", "9:0", "v_1.5_2.0"),
    ("TimeRFT", "v:0", "./x/v.mp4"), ("TVGBench", "v:0", "./x/v.mp4"),
    ("TimeLens-Bench", "v0:0", "v0"), ("TimeLens-100K", "x/v:1:0", "x/v.mp4")])
def test_each_format(tmp_path, form, id, video):
    samples, rejected = read(tmp_path, file_of(form, [entry(form)]))
    qid = "9" if form == "QVHighlights" else None
    assert samples == [data.Sample(id, video, "A man sits.", 1.0, 4.0, 10.0, qid=qid)]
    assert not rejected
    assert type(samples[0].start) is type(samples[0].end) is type(samples[0].duration) is float


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("segment, end, clipped", [     # of a video of 10 s
    ([1, 10], 10, False), ([1, 10.015], 10, False), ([1, 10.03], 10, True), ([1, 15], 10, True)])
def test_segments_are_clipped(tmp_path, form, segment, end, clipped):
    samples, rejected = read_changed(tmp_path, form, segment=segment)
    assert [(s.end, s.clipped) for s in samples] == [(end, clipped), (4, False)] and not rejected


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("segment, reason", [
    ([1, 15.01], "ends more than 5 s after the video"), ([10, 12], "starts outside the video"),
    ([4, 4], "ends no later than it starts"), ([4, 1], "ends no later than it starts"),
    ([1, None], "malformed"), ([1], "malformed"), ([1, 2, 3], "malformed"),
    ([True, 4], "malformed"), ("nonsense", "malformed"), (7, "malformed"), ({}, "malformed")])
def test_unusable_segments(tmp_path, form, segment, reason):
    samples, rejected = read_changed(tmp_path, form, segment=segment)
    assert len(samples) == 1 and reasons(rejected) == [reason]
    assert str(rejected[0]).startswith(rejected[0].place) and "\n" not in str(rejected[0])


def test_segments_before_the_beginning_and_other_numbers(tmp_path):
    times = [[-1, 4], [float("nan"), 4], [1, float("inf")], [1, 10**400], [1, 11.3]]
    item = {"duration": 6.3, "timestamps": times, "sentences": ["x"] * 5}
    samples, rejected = read(tmp_path, {"v": item})
    assert reasons(rejected) == ["starts outside the video"] + ["malformed"] * 3
    # 11.3 - 6.3 is just above 5
    assert [(s.id, s.end, s.clipped) for s in samples] == [("v:4", 6.3, True)]


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("name, value", [
    ("duration", GONE), ("duration", None), ("duration", True), ("duration", 0), ("duration", -1),
    ("duration", float("nan")), ("duration", "10"), ("query", 5), ("query", "\ud800"),
    ("query", None)])
def test_malformed_entries(tmp_path, form, name, value):
    samples, rejected = read_changed(tmp_path, form, **{name: value})
    assert len(samples) == 1 and reasons(rejected) == ["malformed"]
    assert "expected" in rejected[0].detail
    assert ("'10' is text, where a number is needed" in rejected[0].detail) == (value == "10")


@pytest.mark.parametrize("form", ["QVHighlights", "TimeRFT", "TVGBench", "TimeLens-100K"])
@pytest.mark.parametrize("name, value", [
    ("video", GONE), ("query", GONE), ("video", 3), ("video", ""), ("video", "\udc00")])
def test_malformed_videos(tmp_path, form, name, value):
    _, rejected = read_changed(tmp_path, form, **{name: value})
    assert reasons(rejected) == ["malformed"]


@pytest.mark.parametrize("form", GOOD)
def test_no_object_and_no_sentence(tmp_path, form):
    entries = [entry(form), entry(form, query=" \n", qid=8), [], None, 3, "x", {}]
    samples, rejected = read(tmp_path, file_of(form, entries))
    assert len(samples) == 1 and reasons(rejected) == ["no sentence"] + ["malformed"] * 5


EVENTS = [{"query": "he sits.", "span": [[1, 4], [6, 9]]}, {"query": "he eats.", "span": [5, 7]},
          {"query": "he naps.", "span": []}]
SPANS = [(":0:0", 1, 4, ":0"), (":0:1", 6, 9, ":0"), (":1", 5, 7, None)]    # of the first two


def id_start_end_qid(samples, video):
    return [(s.id.removeprefix(video), s.start, s.end, s.qid and s.qid.removeprefix(video))
            for s in samples]


def test_several_spans_are_several_samples_in_timelens_bench(tmp_path):
    samples, rejected = read(tmp_path, {"v": {
        "duration": 10,
        "spans": [event["span"] for event in EVENTS[:2]],
        "queries": [event["query"] for event in EVENTS[:2]]}})
    assert id_start_end_qid(samples, "v") == SPANS and not rejected


def test_several_spans_are_several_samples_in_timelens_100k(tmp_path):
    lines = [json.dumps({"video_path": "a/v.mp4", "duration": 10, "events": events})
             for events in (EVENTS[:2], EVENTS[2:], 5)]
    samples, rejected = read(tmp_path, "\n".join(lines))
    assert id_start_end_qid(samples, "a/v:1") == SPANS
    assert reasons(rejected) == ["malformed", "malformed"] and places(rejected) == ["2", "3"]
    assert read(tmp_path, lines[0])[0] == samples       # a file of one line


def test_activitynet_names_the_key(tmp_path):
    item = {"duration": 9, "timestamps": [[0, 2], [2, 1], [3, 4]], "sentences": ["a", "b", "c"]}
    samples, rejected = read(tmp_path, {
        "v_1": item, "v_2": {**item, "sentences": ["a"]},
        "v_3": {"duration": 9, "timestamps": [], "sentences": []}})
    assert [(s.id, s.query) for s in samples] == [("v_1:0", "a"), ("v_1:2", "c")]
    assert reasons(rejected) == ["ends no later than it starts", "malformed", "no windows"]
    assert places(rejected) == ["'v_1'[1]", "'v_2'", "'v_3'"]


def test_a_key_that_stands_twice_is_named(tmp_path):
    """json itself keeps the last one and says nothing."""
    samples, rejected = read(tmp_path, """{
        "v": {"duration": 9, "timestamps": [[0, 2]], "sentences": ["a"]},
        "v": {"duration": 9, "timestamps": [[1, 3], [4, 5]], "sentences": ["b", "c"]},
        "w": {"duration": 9, "duration": 5, "timestamps": [[0, 2]], "sentences": ["d"]}}""")
    assert [(s.id, s.query) for s in samples] == [("v:0", "a")]
    assert reasons(rejected) == ["twice", "twice", "malformed"]
    assert places(rejected) == ["'v'", "'v'", "'w'"]
    assert "('v' stands before it)" in str(rejected[0])
    assert "'duration' stands twice" in str(rejected[2])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_every_line_end(tmp_path, end):
    samples, rejected = read(tmp_path, end.join(["A 0 1##one", "A 1 2##two", "A 2 1##three", ""]))
    assert [(s.id, s.query) for s in samples] == [("A:1", "one"), ("A:2", "two")]
    assert places(rejected) == ["3"]


def test_the_query_of_an_unusable_segment_is_kept_for_evaluation(tmp_path, videos):
    path = tmp_path / "a.txt"
    path.write_text("AO8RW 1 2##he sits.\n00607 3 3##he eats.\n21E40 4 5##\nx\n")
    _, rejected = data.read(str(path), str(videos))
    kept = rejected[0].sample
    assert (kept.id, kept.video, kept.query) == ("00607:2", str(videos / "00607.mkv"), "he eats.")
    assert rejected[1].sample is rejected[2].sample is None
    _, rejected = read(tmp_path, [
        entry("TVGBench", segment=segment) for segment in ([1, 4], [2, 2], [1, 400], [10, 12])])
    assert [(r.sample.id, r.sample.start, r.sample.end) for r in rejected] == [
        ("v:1", 2, 2), ("v:2", 1, 400), ("v:3", 10, 12)]
    twin = entry("QVHighlights", segment=[5, 5])
    _, rejected = read(tmp_path, file_of("QVHighlights", [twin, twin, entry("QVHighlights", qid=8)]))
    assert rejected[0].sample.id == "9:0" and rejected[1].sample is None        # once is enough


def test_qvhighlights_windows_and_test_rows(tmp_path):
    row = entry("QVHighlights")
    untold = entry("QVHighlights")
    del untold["relevant_windows"]
    rows = [{**row, "relevant_windows": [[0, 2], [5, 5], [6, 11]]},
            {**row, "qid": "t"}, {**row, "qid": "t"}, {**row, "qid": True}, {**row, "qid": "\ud800"},
            untold]
    lines = [*map(json.dumps, rows), "", "{broken", "[" * 100_000, json.dumps({**row, "qid": "last"})]
    samples, rejected = read(tmp_path, "\ufeff" + "\n".join(lines))
    assert [(s.id, s.qid, s.start, s.end, s.clipped) for s in samples] == [
        ("9:0", "9", 0, 2, False), ("9:2", "9", 6, 10, True), ("t:0", "t", 1, 4, False),
        ("last:0", "last", 1, 4, False)]
    assert places(rejected) == ["1", "3", "4", "5", "6", "8", "9"]
    assert reasons(rejected) == [
        "ends no later than it starts", "twice", "malformed", "malformed", "no windows",
        "malformed", "malformed"]
    _, records, _ = data.parse(str(tmp_path / "annotations.csv"))
    assert records == 9                         # sentences, of which the first has three windows


@pytest.mark.parametrize("form", ["TimeRFT", "TVGBench"])
def test_parts_of_a_video(tmp_path, form):
    """The segment counts from the beginning of the part, and the part's length is what it must fit into."""
    parts = [(120.5, 128, [1, 4.0]), (0, 8.0, [6, 9]), (5, 8.0, [2, 9]),
             (5, 5, [1, 4]), (-1, 5, [1, 4]), (5, None, [1, 4]), ("1", 5, [1, 4])]
    samples, rejected = read(tmp_path, [
        entry(form, **{"from": start, "to": end, "segment": segment}) for start, end, segment in parts])
    assert [(s.start, s.end, s.duration, s.video_start, s.video_end, s.clipped) for s in samples] == [
        (1, 4, 7.5, 120.5, 128, False), (6, 8, 8, 0, 8, True)]
    assert reasons(rejected) == ["ends more than 5 s after the video"] + ["malformed"] * 4
    assert places(rejected) == ["[2]", "[3]", "[4]", "[5]", "[6]"]


@pytest.mark.parametrize("content", [
    b"", b"\n\n", b"hello\n", b"a 3 1##x\n", b"\xff\xfe\x00", b"[]", b"{}", b"[1, 2]", b"{",
    b'{"a": 1}', b"[" * 100_000, b'{"a":' * 100_000, b"[" + b"9" * 5000 + b"]",
    b'{"query": "x"}', b'[{"timestamp": [0, 1]}]', b'{"v": {"timestamps": [[0, 1]]}}',
    b'{"v": {"duration": 9, "timestamps": [[0, 1]], "sentences"', b"\0" * 100])
def test_unusable_file_is_one_clear_error(tmp_path, videos, content):
    (tmp_path / "bad.txt").write_bytes(content)
    words = "bad.txt.*give --annotations a file of one of the formats Charades-STA"
    with pytest.raises(data.AnnotationError, match=words) as caught:
        data.read(str(tmp_path / "bad.txt"), str(videos))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def harmed(content, rng):
    """Bytes with pieces put in, cut out, repeated."""
    pieces = [b"null", b"NaN", b"1e999", b"-1", b"[", b"]", b"{", b"}", b'"', b",", b"\n", b"\\ud800"]
    for _ in range(rng.integers(1, 4)):
        place = rng.integers(len(content) + 1)
        piece = pieces[rng.integers(len(pieces))] * rng.integers(0, 3)
        content = content[:place] + piece + content[place + rng.integers(0, 12):]
    return content


@pytest.mark.parametrize("form", GOOD)
def test_any_bytes_give_samples_or_one_error(tmp_path, form):
    rng = np.random.default_rng(0)
    content = file_of(form, [entry(form), entry(form, qid=8, query="x")])
    text = content if isinstance(content, str) else json.dumps(content)
    path = tmp_path / "x"
    counts = Counter()
    for _ in range(200):
        path.write_bytes(harmed(text.encode(), rng))
        try:
            samples, rejected = data.read(str(path), None)
        except data.AnnotationError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            counts["error"] += 1
            continue
        assert len({s.id for s in samples}) == len(samples)
        for s in samples:
            assert 0 <= s.start < s.end <= s.duration and s.query == " ".join(s.query.split()) != ""
            json.dumps([s.id, s.video, s.query], ensure_ascii=False).encode()
        counts["rejected" if rejected else "read"] += 1
    assert len(counts) == 3


def row(video, sentence, segment, start=None, end=None):
    return entry("TimeRFT", video=video, query=sentence, segment=segment) | {
        "video_start": start, "video_end": end}


def test_linter_counts(tmp_path, capsys):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([
        row("a.mp4", "a person opens the door", [1, 4]), row("a.mp4", "a person sits", [1, 12]),
        row("a.mp4", "the table over there", [1, 4]), row("a.mp4", "a person runs", [1, 400]),
        row("a.mp4", "a person runs", [1, 500]), row("a.mp4", "", [1, 2])]))
    assert data.main([str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and json.loads(out) == {
        "format": "TimeRFT", "records": 6, "samples": 3, "clipped": 1, "without_verb": 1,
        "rejected": {"ends more than 5 s after the video": 2, "no sentence": 1}}
    assert "2 rejected: ends more than 5 s" in err
    assert "list.json: [3]" in err and "from 1 to 400 s" in err


def test_linter_looks_up_and_decodes_videos(tmp_path, capsys):
    """Of a video that is shorter than what is annotated in it, it tells the first such query."""
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("good", "short", "whole"):
        write(videos / f"{name}.mp4", constant(4, 8))
    (videos / "bad.mp4").write_text("no video")
    path = tmp_path / "list.json"
    path.write_text(json.dumps([
        row("x/good.mp4", "he sits", [5, 7]), row("bad.mp4", "he sits", [1, 4]),
        row("gone.mp4", "he sits", [1, 4]), row("short.mp4", "he sits", [5, 7]),
        row("short.mp4", "he sits", [8.5, 9]),
        row("whole.mp4", "he sits", [1, 4], 0, 8), row("whole.mp4", "he sits", [1, 4], 2, 20)]))
    assert data.main([str(path), "--videos", str(videos), "--workers", "1"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["missing"] == 1 and report["undecodable"] == 3
    assert "gone.mp4: no such video file" in err and "bad.mp4: cannot be decoded" in err
    assert "nothing from 8.5 to 9 s" in err and "(short:4)" in err
    assert "whole.mp4: has only 6.0 s of its part from 2 to 20 s" in err and "good.mp4" not in err


def test_linter_as_a_command(tmp_path):
    (tmp_path / "a.txt").write_text("A 2 1##x\n")
    done = subprocess.run([sys.executable, data.__file__, "a.txt"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("data.py: a.txt: no usable sample")
    assert done.stderr.count("\n") == 1


def test_a_compressed_file_is_called_so(tmp_path):
    (tmp_path / "a.txt").write_bytes(gzip.compress(b"A 0 1##x"))
    with pytest.raises(data.AnnotationError, match="a.txt: cannot be read .*gzip.*--annotations"):
        data.read(str(tmp_path / "a.txt"), None)


def test_missing_paths(tmp_path, videos):
    with pytest.raises(data.AnnotationError, match="none.txt.*--annotations"):
        data.read(str(tmp_path / "none.txt"), str(videos))
    path = tmp_path / "a.txt"
    path.write_text("A 0 1##x\nAO8RW 0 1##x\nA 1 2##x\n")
    samples, _ = data.read(str(path), str(videos))
    assert data.missing(samples) == [str(videos / "A.mp4")]
    path.write_text("A 0 1##x\n")
    (tmp_path / "empty").mkdir()
    for folder in ("none", "empty", "videos"):
        with pytest.raises(ValueError, match=f"{folder}.*--videos"):
            data.read(str(path), str(tmp_path / folder))


def test_a_file_is_read_without_decord_or_torch(tmp_path):
    (tmp_path / "ok.txt").write_text("AO8RW 0 1##a person eats.\n")
    script = ("import sys, data; data.read('ok.txt', None)\n"
              "print(sorted({'torch', 'decord', 'transformers', 'spacy'} & set(sys.modules)))")
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True,
                          text=True, env=environment)
    assert done.stdout == "[]\n", done.stderr
