"""Annotation files -> samples: a video, a sentence, and from when to when it happens, in seconds.

Seven formats are read, told apart by what is in the file, never by its name:

    Charades-STA text       a line per sample; there may be further # in the sentence               id AO8RW:1 (line)
        AO8RW 0.0 6.9##a person is putting a book on a shelf.
    ActivityNet Captions    one json object, a key per video                                        id v_uqiMw7tQ1Cc:0
        {"v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0.28, 55.15]], "sentences": ["A weight lifting ..."]}}
    QVHighlights jsonl      a json object per line; each window is a sample                         id 9769:0, 9769:1
        {"qid": 9769, "query": "some military ...", "vid": "j7rJstUseKg_360.0_510.0", "duration": 150,
         "relevant_windows": [[72, 82], [84, 94]]}
    TimeRFT json            a list of objects                                                       id KgO7MJNO3oo:0
        {"video": "./timerft_data/KgO7MJNO3oo.mp4", "timestamp": [0.0, 3.5], "sentence": "cnn news shows ...",
         "duration": 10.8, "video_start": 120.6, "video_end": 131.4}
    TVGBench json           a list of objects                                                       id KWZSA:0
        {"path": "./tvgbench_data/KWZSA.mp4", "question": "a person was sitting at a table.", "answer": "13.4-28.1",
         "start": null, "end": null, "duration": 30.12}
    TimeLens-Bench json     one json object, a key per video; several spans are several samples     id OY50F:0
        {"OY50F": {"duration": 30.9, "spans": [[0.5, 5.0]], "queries": ["When does the person ...?"]}}
    TimeLens-100K jsonl     a json object per line, with events, or one query and span  id cv/x:7:0 (line)
        {"video_path": "cv/x.mp4", "duration": 95.7, "events": [{"query": "the man ...", "span": [[13.0, 16.5]]}]}

The list that the paper's authors trained on is of ActivityNet's form, with `verb` and `action` beside, which are not
used: rewards.py finds the verbs.

TimeRFT and TVGBench may use a part of the file only, from video_start to video_end (TVGBench: start, end). The segment
then counts from the beginning of that part, not from the beginning of the file. The published TimeRFT shows this: in
all 665 such records `duration` is video_end - video_start and no segment ends later, while the segments of 319 would
not fit as times of the file. 509 records have the part in the file's name, too
(4jujhM5qhEc_00:00:39:000_00:01:24:700.mp4). The whole video is expected under that name; the linter calls a file that
is too short for its part undecodable.

A segment that overshoots a known end of the video by at most 5 s is clipped to it. An entry that cannot be used is
rejected with its reason, never silently dropped; of two equal entries the second is rejected. Evaluation still counts a
rejected query, with IoU 0, since published scores do: TVGBench has 800 queries, of which 11 have a segment without
length.

If the annotated path of a video, taken relative to --videos, is a file, that file is the video. Otherwise the video is
looked for in --videos and its subfolders (engine/video_folder.py).

    python data.py train.txt                     the linter: one json object of counts; a summary on standard error
    python data.py train.txt --videos videos/    also looks up and decodes every video
"""
import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from engine.files import read_text
from engine.video_folder import bare, finder, stem

OVERSHOOT = 5.0     # seconds by which a segment may end after its video; beyond, it is corrupt
NOISE = 0.02        # seconds; published durations are rounded: clipping this little is not counted


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file, the place and the way out."""


@dataclass(frozen=True)
class Sample:
    id: str                             # unique in its file, and the same whenever it is read
    video: str                          # path of the video file
    query: str
    start: float                        # seconds, from video_start on
    end: float                          # seconds, > start
    duration: float | None              # seconds, of the part if there is one; None: unknown
    video_start: float | None = None    # seconds: the part of the file to decode; None: all of it
    video_end: float | None = None
    clipped: bool = False               # `end` was up to 5 s after the end of the video
    qid: str | None = None              # where a query has several windows: the same for all


@dataclass(frozen=True)
class Rejected:
    place: str      # file:line, or file: key
    reason: str     # one of a few, to be counted
    detail: str     # what the entry has, or should have
    sample: Sample | None = None    # if only its segment is unusable: evaluation counts it

    def __str__(self) -> str:
        return f"{self.place}: {self.reason} ({self.detail})"


def read(path: str, videos: str | None) -> tuple[list[Sample], list[Rejected]]:
    """Samples of an annotation file, their videos looked up in the folder `videos`, and what had to be rejected.

    A video that is not there stays a sample, with the path where it was expected; with `videos` None none is looked up.
    Raises AnnotationError when the file cannot be read, no sample is left, or no video is there, ValueError when the
    folder cannot be read.
    """
    name, _, items = parse(path)
    samples = [item for item in items if isinstance(item, Sample)]
    rejected = [item for item in items if isinstance(item, Rejected)]
    if not samples:
        raise AnnotationError(
            f"{path}: no usable sample in this {name} file, {len(rejected)} rejected, the first at "
            f"{rejected[0]}; mend it, or give --annotations {KNOWN}")
    if videos is None:
        return samples, rejected

    find = finder(videos)

    def locate(sample: Sample | None) -> Sample | None:
        return sample and replace(sample, video=find(sample.video))

    samples = [locate(sample) for sample in samples]
    rejected = [replace(item, sample=locate(item.sample)) for item in rejected]
    if not any(os.path.exists(sample.video) for sample in samples):
        raise AnnotationError(f"{videos}: has none of the videos of {path}, such as "
                              f"{samples[0].video!r}; give --videos the folder of the videos")
    return samples, rejected


def missing(samples: list[Sample]) -> list[str]:
    """The paths of the samples' videos that are not there."""
    paths = dict.fromkeys(sample.video for sample in samples)
    return [path for path in paths if not os.path.exists(path)]


def parse(path: str) -> tuple[str, int, list[Sample | Rejected]]:
    """(the name of a file's format, how many sentences it holds, what became of them); `video` is as annotated.

    Raises AnnotationError when the file cannot be read, or has none of the formats.
    """
    try:
        content = read_text(path)
    except (OSError, ValueError) as error:
        raise AnnotationError(
            f"{path}: cannot be read ({error}); give --annotations {KNOWN}") from error
    name, entries = detect_format(path, content)
    sentences = 0
    items = []
    ids = set()
    keys = set()
    for entry in entries:
        results = read_entry(name, entry)
        if name == "QVHighlights":      # there, one sentence may have several windows
            sentences += 1
        else:
            sentences += len(results)
        key_again = entry.key in keys   # a video of ActivityNet; its ids would be the first one's
        keys.add(entry.key)
        for item in results:
            sample = item if isinstance(item, Sample) else item.sample
            if sample is None:
                pass
            elif not key_again and sample.id not in ids:
                ids.add(sample.id)
            elif isinstance(item, Rejected):
                item = replace(item, sample=None)       # evaluation counts a query once
            else:
                twin = entry.key if key_again else sample.id
                item = Rejected(entry.place, "twice", f"{twin!r} stands before it")
            items.append(item)
    return name, sentences, items


class Entry(NamedTuple):
    place: str          # file:line, or file: key
    key: int | str      # its line, its index in a list, or the video that it is of
    content: Any        # a line of text, or a value of json


class Object(dict):
    """A JSON object with all its pairs. Python's json would silently keep only the last of several pairs with the same
    key."""

    def __init__(self, pairs: list[tuple]):
        super().__init__(pairs)
        self.pairs = pairs


class Malformed(ValueError):
    """An entry that is malformed in a way that is worth telling."""


def detect_format(path: str, content: str) -> tuple[str, list[Entry]]:
    """(the name of a file's format, its entries). Raises AnnotationError when it has none of the formats.

    A file is lines of text, a list, an object with one entry per video, or one object per line; then the keys of its
    entries tell the format.
    """
    # not splitlines(): a sentence may hold unusual line separators. A lone \r is an old Mac's line end
    lines = [Entry(f"{path}:{number}", number, line.strip())
             for number, line in enumerate(re.split(r"\r*\n|\r", content), 1) if line.strip()]
    name = None
    error = ""
    if not content.lstrip().startswith(("{", "[")):
        entries = lines
        if any(LINE.fullmatch(line.content) for line in lines):
            name = "Charades-STA"
    else:
        whole = load_json(content)
        if isinstance(whole, Exception):
            error = f" (as json: {whole})"
        if isinstance(whole, list):
            entries = [Entry(f"{path}: [{index}]", index, item) for index, item in enumerate(whole)]
            name = name_by_key(entries, timestamp="TimeRFT", answer="TVGBench")
        elif isinstance(whole, Object):
            entries = [Entry(f"{path}: {video!r}", video, item) for video, item in whole.pairs]
            name = name_by_key(entries, timestamps="ActivityNet Captions", spans="TimeLens-Bench")
        if name is None and not isinstance(whole, list):        # one line may be the whole file
            entries = [line._replace(content=load_json(line.content)) for line in lines]
            name = name_by_key(entries, video_path="TimeLens-100K", query="QVHighlights")
    if name is None:
        raise AnnotationError(
            f"{path}: none of the formats known here{error}; give --annotations {KNOWN}")
    return name, entries


def load_json(text: str) -> Any:
    """The value of a json text, with an Object for each object, or the error as a value; nesting too deep is one."""
    try:
        return json.loads(text, object_pairs_hook=Object)
    except (ValueError, RecursionError) as error:
        return error


def name_by_key(entries: list[Entry], **names: str) -> str | None:
    """The name for the first of the keys in `names` that any of the entries has."""
    for key, name in names.items():
        for entry in entries:
            if isinstance(entry.content, Object) and key in entry.content:
                return name
    return None


def read_entry(name: str, entry: Entry) -> list[Sample | Rejected]:
    """What an entry of the named format becomes: Samples and Rejected, at least one of them."""
    reader, form = FORMATS[name]
    try:
        if isinstance(entry.content, Object) and len(entry.content.pairs) > len(entry.content):
            counts = Counter(key for key, _ in entry.content.pairs)
            key, _ = counts.most_common(1)[0]
            raise Malformed(f"{key[:40]!r} stands twice")
        items = list(reader(*entry))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return [malformed(entry.place, error, form)]
    return items or [Rejected(entry.place, "no windows", "as in a test set")]


def malformed(place: str, error: Exception, form: str) -> Rejected:
    why = f"{error}; " if isinstance(error, Malformed) else ""
    return Rejected(place, "malformed", f"{why}expected {form}")


def charades(place: str, number: int, line: str) -> Iterator[Sample | Rejected]:
    video, start, end, sentence = LINE.fullmatch(line).groups()
    segment = [float(start), float(end)]
    yield make_sample(place, f"{video}:{number}", video, sentence, segment, None)


def activitynet(place: str, video: str, item: dict) -> Iterator[Sample | Rejected]:
    duration = seconds(item["duration"])
    pairs = zip(item["timestamps"], item["sentences"], strict=True)
    for k, (segment, sentence) in enumerate(pairs):
        yield make_sample(f"{place}[{k}]", f"{video}:{k}", video, sentence, segment, duration)


def qvhighlights(place: str, number: int, item: dict) -> Iterator[Sample | Rejected]:
    if type(item["qid"]) not in (str, int):     # a bool is an int, too
        raise TypeError
    qid = str(item["qid"])
    query = item["query"]
    video = item["vid"]
    duration = seconds(item["duration"])
    for k, window in enumerate(item.get("relevant_windows") or []):
        yield make_sample(place, f"{qid}:{k}", video, query, window, duration, qid=qid)


def timerft(place: str, index: int, item: dict) -> Iterator[Sample | Rejected]:
    video = item["video"]
    bounds = item.get("video_start"), item.get("video_end")
    yield make_sample(place, f"{bare(video)}:{index}", video, item["sentence"], item["timestamp"],
                      seconds(item["duration"]), bounds)


def tvgbench(place: str, index: int, item: dict) -> Iterator[Sample | Rejected]:
    video = item["path"]
    start, end = ANSWER.fullmatch(item["answer"]).groups()
    segment = [float(start), float(end)]
    bounds = item.get("start"), item.get("end")
    yield make_sample(place, f"{bare(video)}:{index}", video, item["question"], segment,
                      seconds(item["duration"]), bounds)


def timelens_bench(place: str, video: str, item: dict) -> Iterator[Sample | Rejected]:
    duration = seconds(item["duration"])
    pairs = zip(item["spans"], item["queries"], strict=True)
    for k, (spans, query) in enumerate(pairs):
        yield from windows(f"{place}[{k}]", f"{video}:{k}", video, query, spans, duration)


def timelens_100k(place: str, number: int, item: dict) -> Iterator[Sample | Rejected]:
    video = item["video_path"]
    duration = seconds(item["duration"])
    for k, event in enumerate(item.get("events", [item])):
        qid = f"{stem(video)}:{number}:{k}"
        yield from windows(place, qid, video, event["query"], event["span"], duration)


def windows(place: str, qid: str, video: Any, query: Any, spans: Any,
            duration: float) -> Iterator[Sample | Rejected]:
    """A sample for each span of one query: [[start, end], ...], or a bare [start, end]."""
    if not isinstance(spans[0], list):
        spans = [spans]
    if len(spans) == 1:
        yield make_sample(place, qid, video, query, spans[0], duration)
    else:
        for k, span in enumerate(spans):
            yield make_sample(place, f"{qid}:{k}", video, query, span, duration, qid=qid)


LINE = re.compile(r"(\S+)[ \t]+([-+.\deE]+)[ \t]+([-+.\deE]+)[ \t]*##(.*)", re.ASCII)
ANSWER = re.compile(r"\s*(\d+\.?\d*)\s*-\s*(\d+\.?\d*)\s*", re.ASCII)
FORMATS = {     # name: (what reads an entry, which raises or rejects what has not this form)
    "Charades-STA": (charades, "'video start end##sentence'"),
    "ActivityNet Captions": (
        activitynet, "an object with duration and as many timestamps as sentences"),
    "QVHighlights": (
        qvhighlights, "an object with qid (text or whole number), query, vid, duration, relevant_windows"),
    "TimeRFT": (timerft, "an object with video, sentence, timestamp, duration"),
    "TVGBench": (tvgbench, "an object with path, question, answer ('13.4-28.1'), duration"),
    "TimeLens-Bench": (timelens_bench, "an object with duration and as many spans as queries"),
    "TimeLens-100K": (
        timelens_100k, "an object with video_path, duration, events: a list of query and span")}
KNOWN = f"a file of one of the formats {', '.join(FORMATS)}"
VALUES = ("texts as video and sentence, and finite numbers of seconds, from 0 on, as start and end "
          "of the segment, duration, and part of the video")


def make_sample(place: str, id: str, video: Any, query: Any, segment: Any, duration: float | None,
                bounds: tuple = (None, None), qid: str | None = None) -> Sample | Rejected:
    """A Sample of values that may be of any type, or why they make none. bounds: (video_start, video_end)."""
    try:
        id = text(id)
        video = text(video)
        query = " ".join(text(query).split())
        start, end = map(seconds, segment)
        if bounds != (None, None):
            bounds = video_start, video_end = seconds(bounds[0]), seconds(bounds[1])
            duration = video_end - video_start
            if video_start < 0:
                raise ValueError
        if duration is not None and duration <= 0:
            raise ValueError
        if not PurePosixPath(video).name:
            raise ValueError
    except (AttributeError, TypeError, ValueError) as error:
        return malformed(place, error, VALUES)

    detail = f"from {start:g} to {end:g} s"
    overshoot = 0.0
    if duration is not None:
        detail += f" of {duration:g} s"
        overshoot = round(end - duration, 6)        # 105.1 - 100.1 is not quite 5
    sample = Sample(id, video, query, start, end, duration, *bounds, overshoot > NOISE, qid)
    if not query:
        return Rejected(place, "no sentence", "it is empty")
    if end <= start:
        return Rejected(place, "ends no later than it starts", detail, sample)
    if overshoot > OVERSHOOT:
        return Rejected(place, f"ends more than {OVERSHOOT:g} s after the video", detail, sample)
    if start < 0 or (duration is not None and start >= duration):
        return Rejected(place, "starts outside the video", detail, sample)
    if duration is None:
        return sample
    return replace(sample, end=min(end, duration))


def seconds(value: Any) -> float:
    if isinstance(value, str):
        raise Malformed(f"{value[:20]!r} is text, where a number is needed")
    if type(value) not in (int, float) or not abs(value) < 1e9:     # no bool, no NaN
        raise ValueError
    return float(value)


def text(value: Any) -> str:
    value.encode()      # ValueError for lone surrogates: JSON can hold them, a file name cannot
    return value


def main(argv: list[str] | None = None) -> int:
    """Prints the counts of an annotation file as one json object, and in words what is wrong with it; returns the exit
    code: 2 when no sample is left."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", help=KNOWN)
    parser.add_argument("--videos", help="folder of the videos: look each one up and decode it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    args = parser.parse_args(argv)
    try:
        report, notes = lint(args.file, args.videos, args.workers)
    except ValueError as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print("\n".join(notes), file=sys.stderr)
    print(json.dumps(report))
    return 0


def lint(path: str, videos: str | None, workers: int) -> tuple[dict, list[str]]:
    """(counts, lines that tell what they are of) of an annotation file and, if `videos` is given, of its videos."""
    import rewards  # only here, since reading samples needs no tagger
    if workers < 1:
        raise ValueError(f"--workers {workers}: give at least 1")
    samples, rejected = read(path, videos)
    name, sentences, _ = parse(path)
    verbs = rewards.verbs([sample.query for sample in samples])
    without_verb = sum(not verb_list for verb_list in verbs)
    clipped = sum(sample.clipped for sample in samples)
    reasons = Counter(item.reason for item in rejected)
    report = {"format": name, "records": sentences, "samples": len(samples), "rejected": reasons,
              "clipped": clipped, "without_verb": without_verb}
    notes = [f"{path}: {name}, {sentences} records, {len(samples)} samples",
             f"{clipped} clipped to the end of their video",
             f"{without_verb} without a verb, so for TVG only"]
    for reason, count in reasons.items():
        first = next(item for item in rejected if item.reason == reason)
        notes.append(f"{count} rejected: {reason}; the first: {first}")
    if videos is not None:
        for kind, faults in check_videos(samples, workers).items():
            report[kind] = len(faults)
            notes.append(f"{len(faults)} videos {kind}")
            notes += [f"  {fault}" for fault in list(faults.values())[:5]]
    return report, notes


def check_videos(samples: list[Sample], workers: int) -> dict[str, dict[str, str]]:
    """{"missing": {path: what is wrong}, "undecodable": {path: what is wrong}} of the samples' videos; a video that
    ends before what is annotated in it counts as undecodable."""
    from engine.loader import Loader  # only here, since reading samples needs no decord
    clips = {}
    for sample in samples:
        clips.setdefault((sample.video, sample.video_start, sample.video_end), []).append(sample)
    check = partial(clip_fault, Loader(workers=workers))
    faults = {"missing": {}, "undecodable": {}}
    with ThreadPoolExecutor(workers) as pool:
        results = tqdm(pool.map(check, clips.values()), "decoding", len(clips), dynamic_ncols=True)
        for (path, _, _), fault in zip(clips, results):
            if fault:
                kind = "undecodable" if os.path.exists(path) else "missing"
                faults[kind][path] = fault
    return faults


def clip_fault(load: Callable, samples: list[Sample]) -> str:
    """What is wrong with the one clip that these samples are of, or ""."""
    from engine.video import VideoError, beyond
    path, start, end = samples[0].video, samples[0].video_start, samples[0].video_end
    try:
        clip = load(path, start, end)
    except VideoError as error:
        return str(error)
    if end is not None and clip.duration < end - start - OVERSHOOT:
        return f"{path}: has only {clip.duration:.1f} s of its part from {start:g} to {end:g} s"
    for sample in samples:
        lack = beyond(clip.duration, sample.start, sample.end, OVERSHOOT)
        if lack:
            return f"{path}: has {lack} ({sample.id})"
    return ""


if __name__ == "__main__":
    sys.exit(main())
