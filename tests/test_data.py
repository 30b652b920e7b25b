"""Annotation files of every format with their irregularities, looking up videos, the linter."""
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import data
import toy


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("AO8RW.mp4", "00607.mkv", "21E40.MP4"):
        (folder / name).write_bytes(b"x")
    return folder


def test_reads_what_is_usable_and_names_what_is_not(tmp_path, videos):
    path = tmp_path / "train.txt"
    path.write_text("AO8RW 0.0 6.9##a person is putting a book on a shelf.\n"
                    "00607 24 30.5##  turn #1   on   \r\n"
                    "\n"
                    "IOL8Q 20.9 12.0##person opens a door.\n"
                    "21E40 3.0 3.0##person sits.\n"
                    "21E40 -1.0 3.0##person sits.\n"
                    "21E40 nan 3.0##person sits.\n"
                    "21E40 1.0 inf##person sits.\n"
                    "21E40 1.0 2.0##\n"
                    "no segment here\n"
                    "50E06 1.0 2.0##person l\u00e4uft.", encoding="utf-8")
    samples, rejected = data.read(str(path), str(videos))
    assert [(s.id, s.query, s.start, s.end) for s in samples] == [
        ("AO8RW:1", "a person is putting a book on a shelf.", 0.0, 6.9), ("00607:2", "turn #1 on", 24.0, 30.5),
        ("50E06:11", "person l\u00e4uft.", 1.0, 2.0)]
    assert [s.video for s in samples] == [str(videos / "AO8RW.mp4"), str(videos / "00607.mkv"),
                                          str(videos / "50E06.mp4")]
    assert [r.place.rsplit(":")[-1] for r in rejected] == ["4", "5", "6", "7", "8", "9", "10"]
    assert "20.9" in rejected[0].detail and "sentence" in rejected[5].reason and "start end##" in rejected[6].detail


def test_charades_line_separators_and_marks(tmp_path):
    """Only a line feed ends a line; a byte order mark and tabs do no harm."""
    (tmp_path / "a").write_bytes("\ufeffA 0\t1##one\u2028line\r\nB 1 2##b\u00a0 b".encode())
    samples, rejected = data.read(str(tmp_path / "a"), None)
    assert [(s.id, s.query) for s in samples] == [("A:1", "one line"), ("B:2", "b b")] and not rejected


def read(tmp_path, content):
    """(samples, rejected) of an object that is written as json, or of a text; the file has an unhelpful name."""
    path = tmp_path / "annotations.csv"
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    return data.read(str(path), None)


GOOD = {    # one entry of each format, all the same: from 1 to 4 s of 10 s
    "ActivityNet": {"duration": 10.0, "timestamps": [[1, 4.0]], "sentences": ["  A man\nsits. "]},
    "QVHighlights": {"qid": 9, "query": " A man\nsits.", "vid": "v_1.5_2.0", "duration": 10,
                     "relevant_windows": [[1, 4]]},
    "TimeRFT": {"video": "./x/v.mp4", "timestamp": [1, 4.0], "sentence": "A man  sits.", "duration": 10.0,
                "video_start": None, "video_end": None},
    "TVGBench": {"path": "./x/v.mp4", "question": "A man sits. ", "answer": "1.0-4", "start": None, "end": None,
                 "duration": 10.0},
    "TimeLens-Bench": {"duration": 10.0, "spans": [[1, 4.0]], "queries": ["  A man\nsits. "]},
    "TimeLens-100K": {"video_path": "x/v.mp4", "duration": 10.0, "query": " A man sits.", "span": [[1, 4.0]],
                      "source": "x"}}
NAMES = {"segment": {"ActivityNet": "timestamps", "TimeRFT": "timestamp", "TVGBench": "answer",
                     "TimeLens-Bench": "spans", "TimeLens-100K": "span"},
         "from": {"TimeRFT": "video_start", "TVGBench": "start"}, "to": {"TimeRFT": "video_end", "TVGBench": "end"},
         "query": {"ActivityNet": "sentences", "TimeRFT": "sentence", "TVGBench": "question",
                   "TimeLens-Bench": "queries"},
         "video": {"QVHighlights": "vid", "TVGBench": "path", "TimeLens-100K": "video_path"}}
GONE = object()


def entry(form, **changes):
    """A copy of GOOD[form] with other values; `segment`, `from`, ... are called as the format calls them."""
    made = json.loads(json.dumps(GOOD[form]))
    for key, value in changes.items():
        if key in ("segment", "query") and form in ("ActivityNet", "TimeLens-Bench"):
            made[NAMES[key][form]] = [value]
        elif key == "segment" and form == "QVHighlights":
            made["relevant_windows"] = [value]
        elif key == "segment" and form == "TVGBench" and isinstance(value, list):
            made["answer"] = "-".join(map(str, value))
        else:
            made[NAMES.get(key, {}).get(form, key)] = value
    return {key: value for key, value in made.items() if value is not GONE}


def file_of(form, entries):
    """The content of a file of these entries. Where an entry is a video, they are v0, v1, ..."""
    if form in ("ActivityNet", "TimeLens-Bench"):
        return {f"v{i}": item for i, item in enumerate(entries)}
    return "\r\n".join(map(json.dumps, entries)) if form in ("QVHighlights", "TimeLens-100K") else entries


@pytest.mark.parametrize("form, id, video", [("ActivityNet", "v0:0", "v0"), ("QVHighlights", "9:0", "v_1.5_2.0"),
                                             ("TimeRFT", "v:0", "./x/v.mp4"), ("TVGBench", "v:0", "./x/v.mp4"),
                                             ("TimeLens-Bench", "v0:0", "v0"), ("TimeLens-100K", "x/v:1:0", "x/v.mp4")])
def test_each_format(tmp_path, form, id, video):
    samples, rejected = read(tmp_path, file_of(form, [entry(form)]))
    qid = "9" if form == "QVHighlights" else None
    assert samples == [data.Sample(id, video, "A man sits.", 1.0, 4.0, 10.0, qid=qid)] and not rejected
    assert all(type(value) is float for value in (samples[0].start, samples[0].end, samples[0].duration))


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("segment, expected", [      # of a video of 10 s: (end, clipped), or the reason to reject it
    ([1, 10], (10, False)), ([1, 10.015], (10, False)), ([1, 10.03], (10, True)), ([1, 15], (10, True)),
    ([1, 15.01], "after the video"), ([120, 14220], "after the video"), ([10, 12], "outside"), ([11, 12], "outside"),
    ([4, 4], "no later"), ([4, 1], "no later"), ([1, None], "malformed"), ([1], "malformed"), ([1, 2, 3], "malformed"),
    ([True, 4], "malformed"), (["1", "x"], "malformed"), ("nonsense", "malformed"), (7, "malformed"),
    ({}, "malformed")])
def test_segments(tmp_path, form, segment, expected):
    samples, rejected = read(tmp_path, file_of(form, [entry(form, segment=segment, qid=8), entry(form)]))
    if isinstance(expected, str):
        assert len(samples) == len(rejected) == 1 and expected in rejected[0].reason
        assert str(rejected[0]).startswith(rejected[0].place) and "\n" not in str(rejected[0])
    else:
        assert [(s.end, s.clipped) for s in samples] == [expected, (4, False)] and not rejected


def test_segments_before_the_beginning_and_other_numbers(tmp_path):
    times = [[-1, 4], [float("nan"), 4], [1, float("inf")], [1, 10**400], [95.1, 105.1]]
    samples, rejected = read(tmp_path, {"v": {"duration": 100.1, "timestamps": times, "sentences": ["x"] * 5}})
    assert [r.reason for r in rejected] == ["starts outside the video"] + ["malformed"] * 3
    assert [(s.id, s.end, s.clipped) for s in samples] == [("v:4", 100.1, True)]     # 105.1 - 100.1 is just above 5


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("changes", [
    {"duration": GONE}, {"duration": None}, {"duration": "10"}, {"duration": True}, {"duration": 0}, {"duration": -1},
    {"duration": float("nan")}, {"query": 5}, {"query": "\ud800"}, {"query": None}, {"query": ["x"]}])
def test_malformed_entries(tmp_path, form, changes):
    samples, rejected = read(tmp_path, file_of(form, [entry(form, qid=8, **changes), entry(form)]))
    assert len(samples) == 1 and [r.reason for r in rejected] == ["malformed"] and "expected" in rejected[0].detail


@pytest.mark.parametrize("form", ["QVHighlights", "TimeRFT", "TVGBench", "TimeLens-100K"])
@pytest.mark.parametrize("changes", [{"video": GONE}, {"query": GONE}, {"video": 3}, {"video": ""},
                                     {"video": "\udc00"}])
def test_malformed_videos(tmp_path, form, changes):
    _, rejected = read(tmp_path, file_of(form, [entry(form, qid=8, **changes), entry(form)]))
    assert [r.reason for r in rejected] == ["malformed"]


@pytest.mark.parametrize("form", GOOD)
def test_no_object_and_no_sentence(tmp_path, form):
    entries = [entry(form), entry(form, query=" \n", qid=8), [], None, 3, "x", {}]
    samples, rejected = read(tmp_path, file_of(form, entries))
    assert len(samples) == 1 and [r.reason for r in rejected] == ["no sentence"] + ["malformed"] * 5


def test_several_spans_are_several_samples(tmp_path):
    events = [{"query": "he sits.", "span": [[1, 4], [6, 9]]}, {"query": "he eats.", "span": [5, 7]},
              {"query": "he naps.", "span": []}]
    expected = [(":0:0", 1, 4, ":0"), (":0:1", 6, 9, ":0"), (":1", 5, 7, None)]
    samples, _ = read(tmp_path, {"v": {"duration": 10, "spans": [event["span"] for event in events[:2]],
                                       "queries": [event["query"] for event in events[:2]]}})
    assert [(s.id, s.start, s.end, s.qid) for s in samples] == [
        ("v" + id, start, end, qid and "v" + qid) for id, start, end, qid in expected]
    lines = [{"video_path": "a/v.mp4", "duration": 10, "events": of} for of in (events[:2], events[2:], 5)]
    samples, rejected = read(tmp_path, "\n".join(map(json.dumps, lines)))
    assert [(s.id, s.video, s.start, s.end, s.qid) for s in samples] == [
        ("a/v:1" + id, "a/v.mp4", start, end, qid and "a/v:1" + qid) for id, start, end, qid in expected]
    assert [(r.reason, r.place.rpartition(":")[2]) for r in rejected] == [("malformed", "2"), ("malformed", "3")]
    assert read(tmp_path, json.dumps(lines[0]))[0] == samples       # a file of one line


def test_activitynet_names_the_key(tmp_path):
    item = {"duration": 9, "timestamps": [[0, 2], [2, 1], [3, 4]], "sentences": ["a", "b", "\u00e9"]}
    samples, rejected = read(tmp_path, {"v_1": item, "v_2": {**item, "sentences": ["a"]},
                                        "v_3": {"duration": 9, "timestamps": [], "sentences": []}})
    assert [(s.id, s.query) for s in samples] == [("v_1:0", "a"), ("v_1:2", "\u00e9")]
    assert [(r.place.split(": ")[1], r.reason) for r in rejected] == [
        ("'v_1'[1]", "ends no later than it starts"), ("'v_2'", "malformed"), ("'v_3'", "no windows")]


def test_a_key_that_stands_twice_is_named(tmp_path):
    """json itself keeps the last one and says nothing."""
    path = tmp_path / "a.json"
    path.write_text('{"v": {"duration": 9, "timestamps": [[0, 2]], "sentences": ["a"]}, "v": {"duration": 9, '
                    '"timestamps": [[1, 3], [4, 5]], "sentences": ["b", "c"]}, "w": {"duration": 9, "duration": 5, '
                    '"timestamps": [[0, 2]], "sentences": ["d"]}}')
    samples, rejected = data.read(str(path), None)
    assert [(s.id, s.query) for s in samples] == [("v:0", "a")]
    assert [(r.place.split(": ")[1], r.reason) for r in rejected] == [("'v'", "twice"), ("'v'", "twice"),
                                                                      ("'w'", "malformed")]
    assert "'duration' stands twice" in str(rejected[2]) and "('v' stands before it)" in str(rejected[0])


@pytest.mark.parametrize("form", GOOD)
@pytest.mark.parametrize("changes", [{"duration": "10"}, {"segment": ["1", 4]}, {"segment": [1, "4.0"]}])
def test_numbers_as_text_are_called_so(tmp_path, form, changes):
    if form == "TVGBench" and "segment" in changes:
        changes = {"from": "1", "to": 4}        # its segment is text
    _, rejected = read(tmp_path, file_of(form, [entry(form, qid=8, **changes), entry(form)]))
    number = next(value for of in changes.values() for value in (of if isinstance(of, list) else [of])
                  if isinstance(value, str))
    assert [r.reason for r in rejected] == ["malformed"] and f"{number!r} is text" in str(rejected[0])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
def test_every_line_end(tmp_path, end):
    samples, rejected = read(tmp_path, end.join(["A 0 1##one", "A 1 2##two", "A 2 1##three", ""]))
    assert [(s.id, s.query) for s in samples] == [("A:1", "one"), ("A:2", "two")]
    assert [r.place.rsplit(":")[-1] for r in rejected] == ["3"]
    rows = [json.dumps({**GOOD["QVHighlights"], "qid": qid}) for qid in range(3)]
    assert [s.qid for s in read(tmp_path, end.join(rows))[0]] == ["0", "1", "2"]


def test_the_query_of_an_unusable_segment_is_kept_for_evaluation(tmp_path, videos):
    (tmp_path / "a.txt").write_text("AO8RW 1 2##he sits.\n00607 3 3##he eats.\n21E40 4 1##he naps.\n21E40 4 5##\nx\n")
    samples, rejected = data.read(str(tmp_path / "a.txt"), str(videos))
    assert [r.sample and (r.sample.id, r.sample.video, r.sample.query) for r in rejected] == [
        ("00607:2", str(videos / "00607.mkv"), "he eats."), ("21E40:3", str(videos / "21E40.MP4"), "he naps."),
        None, None]
    segments = [[1, 4], [2, 2], [1, 400], [10, 12]]
    _, rejected = read(tmp_path, [entry("TVGBench", segment=segment, path=f"{i}.mp4")
                                  for i, segment in enumerate(segments)])
    assert [(r.sample.id, r.sample.start, r.sample.end) for r in rejected] == [("1:1", 2, 2), ("2:2", 1, 400),
                                                                               ("3:3", 10, 12)]
    row = {**GOOD["QVHighlights"], "relevant_windows": [[5, 5]]}
    good = {**row, "relevant_windows": [[1, 2]], "qid": 8}
    _, rejected = read(tmp_path, "\n".join(map(json.dumps, (row, row, good))))
    assert [r.sample and r.sample.id for r in rejected] == ["9:0", None]        # once is enough


@pytest.mark.parametrize("content, name", [(gzip.compress(b"A 0 1##x", mtime=0), "gzip"),
                                           ("A 0 1##x".encode("utf-16"), "UTF-16"),
                                           ("A 0 1##x".encode("utf-16-be"), "UTF-16")])
def test_what_is_no_utf_8_is_called_by_its_name(tmp_path, content, name):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(data.AnnotationError, match=f"a.txt: cannot be read .*{name}.*--annotations"):
        data.read(str(tmp_path / "a.txt"), None)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_qvhighlights_windows_and_test_rows(tmp_path, end, last):
    row = GOOD["QVHighlights"]
    rows = [{**row, "relevant_windows": [[0, 2], [5, 5], [6, 11]]}, {**row, "qid": "t"}, {**row, "qid": "t"},
            {**row, "qid": True}, {**row, "qid": "\ud800"}, {k: row[k] for k in ("qid", "query", "vid", "duration")}]
    lines = [json.dumps(item) for item in rows] + ["", "{broken", "[" * 100_000, json.dumps({**row, "qid": "last"})]
    samples, rejected = read(tmp_path, "\ufeff" + end.join(lines) + end * last)
    assert [(s.id, s.start, s.end, s.clipped) for s in samples] == [
        ("9:0", 0, 2, False), ("9:2", 6, 10, True), ("t:0", 1, 4, False), ("last:0", 1, 4, False)]
    assert [(r.place.rsplit(":")[-1], r.reason) for r in rejected] == [
        ("1", "ends no later than it starts"), ("3", "twice"), ("4", "malformed"), ("5", "malformed"),
        ("6", "no windows"), ("8", "malformed"), ("9", "malformed")]


@pytest.mark.parametrize("form", ["TimeRFT", "TVGBench"])
def test_parts_of_a_video(tmp_path, form):
    """The segment counts from the beginning of the part, and the part's length is what it must fit into."""
    cut = lambda start, end, segment: entry(form, **{"from": start, "to": end, "segment": segment})
    samples, rejected = read(tmp_path, [cut(120.5, 128, [1, 4.0]), cut(0, 8.0, [6, 9]), cut(5, 8.0, [2, 9]),
                                        cut(5, 5, [1, 4]), cut(-1, 5, [1, 4]), cut(5, None, [1, 4]),
                                        cut("1", 5, [1, 4])])
    assert [(s.id, s.start, s.end, s.duration, s.video_start, s.video_end, s.clipped) for s in samples] == [
        ("v:0", 1, 4, 7.5, 120.5, 128, False), ("v:1", 6, 8, 8, 0, 8, True)]
    assert [r.reason for r in rejected] == ["ends more than 5 s after the video"] + ["malformed"] * 4
    assert [r.place.split(": ")[1] for r in rejected] == ["[2]", "[3]", "[4]", "[5]", "[6]"]


@pytest.mark.parametrize("content", [
    b"", b"\n\n", b"hello\n", b"a 3 1##x\n", b"\xff\xfe\x00", b"\xef\xbb\xbf", b"[]", b"{}", b"[1, 2]", b"{", b"null",
    b'{"a": 1}', b"[" * 100_000, b'{"a":' * 100_000, b"[" + b"9" * 5000 + b"]", b'{"query": "x"}',
    b'[{"timestamp": [0, 1]}]',
    b'{"v": {"timestamps": [[0, 1]]}}', b'{"v": {"duration": 9, "timestamps": [[0, 1]], "sentences"', b"\0" * 100])
def test_unusable_file_is_one_clear_error(tmp_path, videos, content):
    (tmp_path / "bad.txt").write_bytes(content)
    words = "bad.txt.*give --annotations a file of one of the formats Charades-STA"
    with pytest.raises(data.AnnotationError, match=words) as caught:
        data.read(str(tmp_path / "bad.txt"), str(videos))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800


def test_any_bytes_give_samples_or_one_error(tmp_path):
    """Good files of every format with bytes and pieces changed, cut out, repeated and swapped."""
    rng = np.random.default_rng(0)
    goods = [b"AO8RW 0.0 6.9##a person sits.\nAO8RW 1 2##x\n", b"\xef\xbb\xbfA 1 2##x"]
    for form in GOOD:
        content = file_of(form, [entry(form), entry(form, qid=8, query="x")])
        goods.append((content if isinstance(content, str) else json.dumps(content)).encode())
    pieces = [b"null", b"NaN", b"1e999", b"-1", b"true", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\n", b"##",
              b"\\ud800", b"\xff"]
    path, outcomes = tmp_path / "x", set()
    for _ in range(1500):
        content = goods[rng.integers(len(goods))]
        for _ in range(rng.integers(1, 4)):
            at, width = rng.integers(len(content) + 1), rng.integers(0, 12)
            content = content[:at] + pieces[rng.integers(len(pieces))] * rng.integers(0, 3) + content[at + width:]
        path.write_bytes(content)
        try:
            samples, rejected = data.read(str(path), None)
        except data.AnnotationError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes.add("error")
            continue
        assert samples and len({s.id for s in samples}) == len(samples)
        for s in samples:
            assert 0 <= s.start < s.end <= (s.duration or 1e9) and s.query == " ".join(s.query.split()) != ""
            json.dumps([s.id, s.video, s.query], ensure_ascii=False).encode()
        outcomes.add("rejected" if rejected else "samples")
    assert outcomes == {"error", "rejected", "samples"}


def test_linter(tmp_path, capsys):
    folder = tmp_path / "videos"
    toy.write_world(tmp_path / "world", seed=0, train_videos=1, test_videos=1)
    good = next((tmp_path / "world" / "videos").glob("*.mp4"))
    folder.mkdir()
    (folder / "good.mp4").write_bytes(good.read_bytes())
    (folder / "bad.mp4").write_bytes(b"no video")
    row = lambda video, sentence, segment, duration=10, start=None, end=None: {
        "video": video, "sentence": sentence, "timestamp": segment, "duration": duration,
        "video_start": start, "video_end": end}
    path = tmp_path / "list.json"
    path.write_text(json.dumps([
        row("x/good.mp4", "a person opens the door", [1, 4]), row("good.mp4", "a person sits", [1, 12]),
        row("bad.mp4", "the table over there", [1, 4]), row("gone.mp4", "a person runs", [1, 4]),
        row("good.mp4", "a person runs", [1, 400]), row("good.mp4", "a person runs", [1, 500]),
        row("good.mp4", "", [1, 2])]))
    assert data.main([str(path)]) == 0
    counts = {"format": "TimeRFT", "records": 7, "samples": 4, "clipped": 1, "without_verb": 1,
              "rejected": {"ends more than 5 s after the video": 2, "no sentence": 1}}
    out, err = capsys.readouterr()
    assert json.loads(out) == counts and out.count("\n") == 1
    assert "2 rejected: ends more than 5 s" in err and "list.json: [4]" in err and "from 1 to 400 s" in err
    assert data.main([str(path), "--videos", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {**counts, "missing": 1, "undecodable": 1}
    assert "gone.mp4" in err and "bad.mp4" in err and "decoding" in err

    path.write_text(json.dumps([row("good.mp4", "he sits", [1, 4], 180, start, start + 180) for start in (0, 3600)]))
    assert data.main([str(path), "--videos", str(folder)]) == 0      # the file is shorter than its parts
    out, err = capsys.readouterr()
    assert json.loads(out)["undecodable"] == 1 and json.loads(out)["missing"] == 0
    for arguments in ([str(tmp_path / "none")], [str(path), "--videos", str(tmp_path / "none")]):
        assert data.main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("data.py: ") and err.count("\n") == 1


def test_linter_as_a_command(tmp_path):
    (tmp_path / "a.txt").write_text("A 2 1##x\n")
    done = subprocess.run([sys.executable, data.__file__, "a.txt"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("data.py: a.txt: no usable sample") and done.stderr.count("\n") == 1


def test_missing_paths(tmp_path, videos):
    with pytest.raises(data.AnnotationError, match="none.txt.*--annotations"):
        data.read(str(tmp_path / "none.txt"), str(videos))
    (tmp_path / "ok.txt").write_text("AO8RW 0 1##x\n")
    for folder in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"{folder}.*--videos"):
            data.read(str(tmp_path / "ok.txt"), str(tmp_path / folder))


def test_a_text_file_is_read_without_decord_or_torch(tmp_path):
    (tmp_path / "ok.txt").write_text("AO8RW 0 1##a person eats.\n")
    script = ("import sys, data; data.read('ok.txt', None)\n"
              "print(sorted({'torch', 'decord', 'transformers', 'spacy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)})
    assert done.stdout == "[]\n", done.stderr
