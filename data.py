"""Annotation files -> samples: a video, a sentence, and from when to when it happens, in seconds.

Seven formats are read, told apart by what is in the file, never by its name:

    Charades-STA text       a line a sample; there may be further # in the sentence                 id AO8RW:1 (line)
        AO8RW 0.0 6.9##a person is putting a book on a shelf.
    ActivityNet Captions    one json object, a video a key                                          id v_uqiMw7tQ1Cc:0
        {"v_uqiMw7tQ1Cc": {"duration": 55.15, "timestamps": [[0.28, 55.15]], "sentences": ["A weight lifting ..."]}}
    QVHighlights jsonl      a json object a line; each window is a sample                           id 9769:0, 9769:1
        {"qid": 9769, "query": "some military ...", "vid": "j7rJstUseKg_360.0_510.0", "duration": 150,
         "relevant_windows": [[72, 82], [84, 94]]}
    TimeRFT json            a list of objects                                                       id KgO7MJNO3oo:0
        {"video": "./timerft_data/KgO7MJNO3oo.mp4", "timestamp": [0.0, 3.5], "sentence": "cnn news shows ...",
         "duration": 10.8, "video_start": 120.6, "video_end": 131.4}
    TVGBench json           a list of objects                                                       id KWZSA:0
        {"path": "./tvgbench_data/KWZSA.mp4", "question": "a person was sitting at a table.", "answer": "13.4-28.1",
         "start": null, "end": null, "duration": 30.12}
    TimeLens-Bench json     one json object, a video a key; several spans are several samples         id OY50F:0
        {"OY50F": {"duration": 30.9, "spans": [[0.5, 5.0]], "queries": ["When does the person ...?"]}}
    TimeLens-100K jsonl     a json object a line, of events, or one query and span      id cv/x:7:0 (line)
        {"video_path": "cv/x.mp4", "duration": 95.7, "events": [{"query": "the man ...", "span": [[13.0, 16.5]]}]}

The list that the paper's authors trained on is of ActivityNet's form, with `verb` and `action` beside, which are not
used: rewards.py finds the verbs.

TimeRFT and TVGBench may use a part of the file only, from video_start to video_end (TVGBench: start, end), and the
segment then counts from the beginning of that part, not of the file: in all 665 such records of the published TimeRFT
`duration` is video_end - video_start and no segment ends later, while 319 do not fit as times of the file. 509 of them
have the part in the file's name, too (4jujhM5qhEc_00:00:39:000_00:01:24:700.mp4). The whole video is expected under
that name; the linter calls a file that is too short for its part undecodable.

A segment that overshoots a known end of the video by at most 5 s is clipped to it. What cannot be used is rejected with
its reason, never silently dropped; of what stands twice, the second. Evaluation still counts the queries among these,
with IoU 0, since published scores do: TVGBench has 800, of which 11 have no length.

A video is looked for in its folder and the subfolders (engine/video_folder.py). An annotation file may be anybody's: a path
that leaves the folder (absolute, or with ..) is rejected unless --allow_outside is given. Then the file it names is
taken if there is one, else the bare name is looked for in the folder.

    python data.py train.txt                     the linter: one json object of counts; a summary on standard error
    python data.py train.txt --videos videos/    also looks up and decodes every video
"""
import argparse
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath

from tqdm import tqdm

from engine.files import read_text
from engine.video_folder import bare, finder, leaves, stem

OVERSHOOT = 5.0     # seconds by which a segment may end after its video; beyond, the annotation is corrupt
NOISE = 0.02        # seconds; published durations are rounded: an overshoot this small is clipped but not counted


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file, the place and the way out."""


@dataclass(frozen=True)
class Sample:
    id: str                             # unique in its file, and the same whenever it is read
    video: str                          # path of the video file
    query: str
    start: float                        # seconds, from video_start on
    end: float                          # seconds, > start
    duration: float | None              # seconds, of the part if there is one; None where the annotation has none
    video_start: float | None = None    # seconds: the part of the file to decode; None for the whole file
    video_end: float | None = None
    clipped: bool = False               # `end` was up to 5 s after the end of the video
    qid: str | None = None              # where a query has several windows: samples of one qid are those of one query


@dataclass(frozen=True)
class Rejected:
    place: str      # file:line, or file: key
    reason: str     # one of a few, to be counted
    detail: str     # what was found, or expected
    sample: Sample | None = None    # the query, if only its segment is unusable: evaluation counts it, with IoU 0

    def __str__(self) -> str:
        return f"{self.place}: {self.reason} ({self.detail})"


def read(path: str, videos: str | None, allow_outside: bool = False) -> tuple[list[Sample], list[Rejected]]:
    """Samples of an annotation file, their videos looked up in the folder `videos`, and what had to be rejected.

    A video that is not there stays a sample, with the path where it was expected; with `videos` None none is looked up.
    Raises AnnotationError when the file cannot be read, no sample is left, or no video is there, ValueError when the
    folder cannot be read.
    """
    name, _, items = parse(path, allow_outside or videos is None)
    samples = [item for item in items if isinstance(item, Sample)]
    rejected = [item for item in items if isinstance(item, Rejected)]
    if not samples:
        raise AnnotationError(f"{path}: no usable sample in this {name} file, {len(rejected)} rejected, the first at "
                              f"{rejected[0]}; mend it, or give --annotations {KNOWN}")
    if videos is not None:
        find = finder(videos, allow_outside)
        locate = lambda sample: sample and replace(sample, video=find(sample.video))
        samples, rejected = list(map(locate, samples)), [replace(item, sample=locate(item.sample)) for item in rejected]
        if not any(os.path.exists(sample.video) for sample in samples):     # the first one is, as a rule
            raise AnnotationError(f"{videos}: has none of the videos of {path}, such as {samples[0].video!r}; give "
                                  "--videos the folder of the videos")
    return samples, rejected


def missing(samples: list[Sample]) -> list[str]:
    """The paths of the samples' videos that are not there."""
    return [video for video in dict.fromkeys(sample.video for sample in samples) if not os.path.exists(video)]


def parse(path: str, allow_outside: bool = True) -> tuple[str, int, list[Sample | Rejected]]:
    """(the name of a file's format, how many sentences it holds, what became of them); `video` is as annotated.

    Raises AnnotationError when the file cannot be read, or has none of the formats.
    """
    try:
        content = read_text(path)
    except (OSError, ValueError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); give --annotations {KNOWN}") from error
    # not splitlines(): there may be unusual line separators inside a sentence. A lone \r is an old Mac's line end
    lines = [(number, line.strip()) for number, line in enumerate(re.split(r"\r*\n|\r", content), 1) if line.strip()]
    any_has = lambda items, key: any(isinstance(item, dict) and key in item for item in items)
    name, whole = None, load_json(content) if content.lstrip().startswith(("{", "[")) else None
    if isinstance(whole, list):
        name = "TimeRFT" if any_has(whole, "timestamp") else "TVGBench" if any_has(whole, "answer") else None
        entries = [(f": [{index}]", index, item) for index, item in enumerate(whole)]
    elif isinstance(whole, dict) and (any_has(whole.values(), "timestamps") or any_has(whole.values(), "spans")):
        name = "ActivityNet Captions" if any_has(whole.values(), "timestamps") else "TimeLens-Bench"
        entries = [(f": {video!r}", video, item) for video, item in whole.pairs]
    elif whole is not None:
        entries = [(f":{number}", number, load_json(line)) for number, line in lines]
        has = partial(any_has, [item for *_, item in entries])
        name = "TimeLens-100K" if has("video_path") else "QVHighlights" if has("query") else None
    elif any(LINE.fullmatch(line) for _, line in lines):
        name, entries = "Charades-STA", [(f":{number}", number, line) for number, line in lines]
    if name is None:
        why = f" (as json: {whole})" if isinstance(whole, Exception) else ""
        raise AnnotationError(f"{path}: none of the formats known here{why}; give --annotations {KNOWN}")

    reader, form = FORMATS[name]
    sentences, items, ids, keys = 0, [], set(), set()
    for place, key, entry in entries:
        try:
            if isinstance(entry, Object) and len(entry.pairs) > len(entry):
                raise Malformed(f"{Counter(key for key, _ in entry.pairs).most_common(1)[0][0][:40]!r} stands twice")
            found = reader(path + place, key, entry) or [Rejected(path + place, "no windows", "as in a test set")]
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            why = f"{error}; " if isinstance(error, Malformed) else ""
            found = [Rejected(path + place, "malformed", f"{why}expected {form}")]
        sentences += 1 if name == "QVHighlights" else len(found)    # there, one sentence may have several windows
        again = key in keys                     # a video of ActivityNet: the second one's ids would be the first one's
        keys.add(key)
        for item in found:
            known = again or getattr(getattr(item, "sample", item), "id", None) in ids
            if isinstance(item, Sample) and known:
                item = Rejected(path + place, "twice", f"{(key if again else item.id)!r} stands before it")
            elif isinstance(item, Rejected) and known:
                item = replace(item, sample=None)
            elif isinstance(item, Sample) and leaves(item.video) and not allow_outside:
                item = Rejected(path + place, "its path leaves the folder of the videos", f"{item.video!r}; "
                                "--allow_outside takes that file, or of its name the one in the folder")
            ids.update(made.id for made in [getattr(item, "sample", item)] if made)
            items.append(item)
    return name, sentences, items


class Object(dict):
    """A json object with its pairs as written: json itself keeps the last of those with the same key, and no word."""
    def __init__(self, pairs: list[tuple]):
        super().__init__(pairs)
        self.pairs = pairs


class Malformed(ValueError):
    """An entry that is malformed in a way that is worth telling."""


def load_json(text: str):
    """The value of a json text, with an Object for each object, or the error as a value; nesting too deep is one."""
    try:
        return json.loads(text, object_pairs_hook=Object)
    except (ValueError, RecursionError) as error:
        return error


def charades(place: str, number: int, line: str) -> list[Sample | Rejected]:
    video, start, end, sentence = LINE.fullmatch(line).groups()
    return [make_sample(place, f"{video}:{number}", video, sentence, [float(start), float(end)], None)]


def activitynet(place: str, video: str, item: dict) -> list[Sample | Rejected]:
    duration, pairs = seconds(item["duration"]), zip(item["timestamps"], item["sentences"], strict=True)
    return [make_sample(f"{place}[{k}]", f"{video}:{k}", video, sentence, segment, duration)
            for k, (segment, sentence) in enumerate(pairs)]


def qvhighlights(place: str, _, item: dict) -> list[Sample | Rejected]:
    qid, query, vid, duration = item["qid"], item["query"], item["vid"], seconds(item["duration"])
    if type(qid) not in (str, int):     # a bool is an int, too
        raise TypeError
    return [make_sample(place, f"{qid}:{k}", vid, query, window, duration, qid=str(qid))
            for k, window in enumerate(item.get("relevant_windows") or [])]


def timerft(place: str, index: int, item: dict) -> list[Sample | Rejected]:
    return [make_sample(place, f"{bare(item['video'])}:{index}", item["video"], item["sentence"], item["timestamp"],
                 seconds(item["duration"]), item.get("video_start"), item.get("video_end"))]


def tvgbench(place: str, index: int, item: dict) -> list[Sample | Rejected]:
    segment = [float(second) for second in ANSWER.fullmatch(item["answer"]).groups()]
    return [make_sample(place, f"{bare(item['path'])}:{index}", item["path"], item["question"], segment,
                 seconds(item["duration"]), item.get("start"), item.get("end"))]


def timelens_bench(place: str, video: str, item: dict) -> list[Sample | Rejected]:
    duration, pairs = seconds(item["duration"]), zip(item["spans"], item["queries"], strict=True)
    return [made for k, (spans, query) in enumerate(pairs)
            for made in windows(f"{place}[{k}]", f"{video}:{k}", video, query, spans, duration)]


def timelens_100k(place: str, number: int, item: dict) -> list[Sample | Rejected]:
    video, duration = item["video_path"], seconds(item["duration"])
    return [made for k, event in enumerate(item.get("events", [item]))
            for made in windows(place, f"{stem(video)}:{number}:{k}", video, event["query"], event["span"], duration)]


def windows(place: str, qid: str, video, query, spans, duration) -> list[Sample | Rejected]:
    """A sample for each of the spans [[start, end], ...] of one query, or for its only one, which may be bare."""
    spans = spans if isinstance(spans[0], list) else [spans]
    if len(spans) == 1:
        return [make_sample(place, qid, video, query, spans[0], duration)]
    return [make_sample(place, f"{qid}:{k}", video, query, span, duration, qid=qid) for k, span in enumerate(spans)]


LINE = re.compile(r"(\S+)[ \t]+([-+.\deE]+)[ \t]+([-+.\deE]+)[ \t]*##(.*)", re.ASCII)
ANSWER = re.compile(r"\s*(\d+\.?\d*)\s*-\s*(\d+\.?\d*)\s*", re.ASCII)
FORMATS = {     # name: (what reads an entry, which raises or rejects what has not this form)
    "Charades-STA": (charades, "'video start end##sentence'"),
    "ActivityNet Captions": (activitynet, "an object with duration and as many timestamps as sentences"),
    "QVHighlights": (qvhighlights, "an object with qid (text or whole number), query, vid, duration, relevant_windows"),
    "TimeRFT": (timerft, "an object with video, sentence, timestamp, duration"),
    "TVGBench": (tvgbench, "an object with path, question, answer ('13.4-28.1'), duration"),
    "TimeLens-Bench": (timelens_bench, "an object with duration and as many spans as queries"),
    "TimeLens-100K": (timelens_100k, "an object with video_path, duration, events: a list of query and span")}
KNOWN = f"a file of one of the formats {', '.join(FORMATS)}"


def make_sample(place: str, id: str, video, query, segment, duration, video_start=None, video_end=None,
                qid: str | None = None) -> Sample | Rejected:
    """A Sample of values that may be of any type, or why they are none."""
    try:
        id, name, query = text(id), text(video), " ".join(text(query).split())
        start, end = map(seconds, segment)
        if (video_start, video_end) != (None, None):
            video_start, video_end = seconds(video_start), seconds(video_end)
            duration = video_end - video_start
        if not PurePosixPath(name).name or (video_start or 0) < 0 or (duration is not None and duration <= 0):
            raise ValueError
    except (AttributeError, TypeError, ValueError) as error:
        why = f"{error}; " if isinstance(error, Malformed) else ""
        return Rejected(place, "malformed", f"{why}expected texts as video and sentence, and finite numbers of seconds,"
                        " from 0 on, as start and end of the segment, duration, and part of the video")
    detail = f"from {start:g} to {end:g} s" + (f" of {duration:g} s" if duration else "")
    over = round(end - duration, 6) if duration else 0.0     # 105.1 - 100.1 is not quite 5
    sample = Sample(id, name, query, start, end, duration, video_start, video_end, over > NOISE, qid)
    if not query:
        return Rejected(place, "no sentence", "it is empty")
    if end <= start:
        return Rejected(place, "ends no later than it starts", detail, sample)
    if over > OVERSHOOT:
        return Rejected(place, f"ends more than {OVERSHOOT:g} s after the video", detail, sample)
    if start < 0 or (duration and start >= duration):
        return Rejected(place, "starts outside the video", detail, sample)
    return replace(sample, end=min(end, duration or end))


def seconds(value) -> float:
    if isinstance(value, str):
        raise Malformed(f"{value[:20]!r} is text, where a number is needed")
    if type(value) not in (int, float) or not abs(value) < 1e9:     # no bool, no NaN
        raise ValueError
    return float(value)


def text(value) -> str:
    value.encode()      # json can hold lone surrogates, no file name or log can: UnicodeEncodeError, a ValueError
    return value


def main(argv: list[str] | None = None) -> int:
    """Prints the counts of an annotation file as one json object, and in words what is wrong with it; returns the exit
    code: 2 when no sample is left."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", help=KNOWN)
    parser.add_argument("--videos", help="folder of the video files: look each one up and decode it")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that decode")
    parser.add_argument("--allow_outside", action="store_true", help="accept annotated paths that leave that folder")
    args = parser.parse_args(argv)
    try:
        if args.workers < 1:
            raise AnnotationError(f"--workers {args.workers}: give at least 1")
        samples, rejected = read(args.file, args.videos, args.allow_outside)
    except ValueError as error:
        print(f"data.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    import rewards  # here only: whoever reads samples needs no tagger
    name, sentences, _ = parse(args.file)
    report = {"format": name, "records": sentences, "samples": len(samples),
              "rejected": Counter(item.reason for item in rejected),
              "clipped": sum(sample.clipped for sample in samples),
              "without_verb": sum(not verbs for verbs in rewards.verbs([sample.query for sample in samples]))}
    notes = [f"{args.file}: {name}, {sentences} records, {len(samples)} samples",
             f"{report['clipped']} clipped to the end of their video",
             f"{report['without_verb']} without a verb, so for TVG only"]
    notes += [f"{count} rejected: {reason}; the first: {next(item for item in rejected if item.reason == reason)}"
              for reason, count in report["rejected"].items()]
    if args.videos is not None:
        for kind, bad in zip(("missing", "undecodable"), check_videos(samples, args.workers)):
            report[kind] = len(bad)
            notes += [f"{len(bad)} videos {kind}", *(f"  {bad[path]}" for path in list(bad)[:5])]
    print("\n".join(notes), file=sys.stderr)
    print(json.dumps(report))
    return 0


def check_videos(samples: list[Sample], workers: int) -> tuple[dict[str, str], dict[str, str]]:
    """path -> what is wrong: the videos that are missing, those that cannot be decoded or do not hold their part, or a
    segment that is annotated in them."""
    from engine.loader import Loader  # here only: whoever reads samples needs neither decord nor torch
    from engine.video import VideoError, beyond
    missing, undecodable, load, segments = {}, {}, Loader(workers=workers), {}
    for sample in samples:
        segments.setdefault((sample.video, sample.video_start, sample.video_end), []).append(sample)

    def wrong(video: tuple) -> str | None:
        path, start, end = video
        try:
            clip = load(path, start=start, end=end)
        except VideoError as error:
            return str(error)
        if end is not None and clip.duration < end - start - OVERSHOOT:
            return f"{path}: has only {clip.duration:.1f} s of its part from {start:g} to {end:g} s"
        lacks = [(sample, lack) for sample in segments[video]
                 if (lack := beyond(clip.duration, sample.start, sample.end, OVERSHOOT))]
        if lacks:
            sample, lack = lacks[0]
            return f"{path}: has {lack} ({sample.id}" + (f" and {len(lacks) - 1} more)" if lacks[1:] else ")")

    with ThreadPoolExecutor(workers) as pool:
        found = tqdm(pool.map(wrong, segments), desc="decoding", total=len(segments), dynamic_ncols=True)
        for (path, *_), error in zip(segments, found):
            if error:
                (undecodable if os.path.exists(path) else missing)[path] = error
    return missing, undecodable


if __name__ == "__main__":
    sys.exit(main())
