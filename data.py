"""Annotation files -> samples: a video, a sentence, and from when to when it happens.

Charades-STA text, one line a sample:

    AO8RW 0.0 6.9##a person is putting a book on a shelf.
    video start end##sentence      (seconds; the sentence may hold further #)

A line that cannot be used is rejected with its reason and counted, never silently dropped.
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from video import VideoError

EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class AnnotationError(ValueError):
    """An annotation file that cannot be used; the message names the file, the place and the way out."""


@dataclass(frozen=True)
class Sample:
    id: str                 # unique in its file: "<video>:<line>"
    video: str              # path of the video file
    query: str
    start: float            # seconds
    end: float              # seconds, > start
    duration: float | None  # seconds, where the annotation gives it


@dataclass(frozen=True)
class Rejected:
    place: str              # file:line
    reason: str


LINE = re.compile(r"(\S+) +(\S+) +(\S+?)##(.*)")


def read(path: str, videos: str) -> tuple[list[Sample], list[Rejected]]:
    """Samples of an annotation file, their videos looked up in the folder `videos`, and what had to be rejected.

    Raises AnnotationError when the file or the folder cannot be read, or no sample is left.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: cannot be read ({error}); give --annotations a Charades-STA text file") from error
    files = video_files(videos)
    samples, rejected = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        match = LINE.fullmatch(line.strip())
        try:
            name, start, end, query = match[1], float(match[2]), float(match[3]), " ".join(match[4].split())
        except (TypeError, ValueError):
            rejected.append(Rejected(place, "not of the form 'video start end##sentence'"))
            continue
        if not 0 <= start < end < float("inf"):
            rejected.append(Rejected(place, f"no segment from {start} to {end} s"))
        elif not query:
            rejected.append(Rejected(place, "no sentence"))
        else:
            samples.append(Sample(f"{name}:{number}", files.get(name, str(Path(videos, name + ".mp4"))), query,
                                  start, end, None))
    if not samples:
        first = f", the first at {rejected[0].place}: {rejected[0].reason}" if rejected else ""
        raise AnnotationError(f"{path}: no usable line of the form 'video start end##sentence' "
                              f"({len(rejected)} rejected{first})")
    return samples, rejected


def video_files(folder: str) -> dict[str, str]:
    """Video id -> path for every video file in a folder."""
    try:
        found = {p.stem: str(p) for p in sorted(Path(folder).iterdir()) if p.suffix.lower() in EXTENSIONS}
    except OSError as error:
        raise AnnotationError(f"{folder}: cannot be listed ({error}); give --videos the folder of the videos") from error
    if not found:
        raise AnnotationError(f"{folder}: no video files ({', '.join(EXTENSIONS)}); give --videos the folder of the videos")
    return found


def pick(samples: list, index: int, seed: int, make):
    """(sample, make(sample)) for the sample at `index` of an endless stream: a new order every epoch, the same for
    any number of processes. Where make raises VideoError, a substitute drawn from (seed, index, attempt) takes its
    place and the error is returned too.

    Returns (sample, made, errors). Raises the last VideoError when ten samples in a row have no readable video.
    """
    epoch, position = divmod(index, len(samples))
    place, errors = np.random.default_rng([seed, epoch]).permutation(len(samples))[position], []
    for attempt in range(1, 11):
        try:
            return samples[place], make(samples[place]), errors
        except VideoError as error:
            errors.append(error)
            place = np.random.default_rng([seed, index, attempt]).integers(len(samples))
    raise errors[-1]
