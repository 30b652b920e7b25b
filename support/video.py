"""Video file -> `Clip`: uint8 frames at about 2 frames a second, within a pixel budget for the whole video.

The rules are those of Qwen2.5-VL (even number of frames, sides that are multiples of 28), with these departures:

1. Frame i is the one on display at time i / fps. The n frames are spaced by duration / n, and `fps` = n / duration is
   the rate they really have, so the model's time positions tell the true time. Qwen spreads the frames up to the very
   last one, which stretches time by up to one sample.
2. Frames are not enlarged beyond rounding to a multiple of 28. Qwen enlarges a small frame to `min_pixels`, which adds
   tokens and no information; here `min_pixels` is only the floor of a frame's share of the budget in a long video.
3. The budget counts the pixels of every frame ("approximately 2.8 million pixels per video"). Qwen counts a pair of
   frames, which the model merges, once; for that reading pass `total_pixels=2 * TOTAL_PIXELS`.

    clip = load("video.mp4")                 # clip.frames (T, 3, H, W), clip.fps, clip.duration
    segment = clip.cut(start=3.5, end=9.0)   # what an inversion task sees
"""
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import decord
import numpy as np
import torch
import torch.nn.functional as F

FACTOR = 28                      # pixels: patches of 14 x 14, merged 2 x 2
TOTAL_PIXELS = 3584 * 28 * 28    # of a whole video, 2.8 M
MIN_PIXELS = 16 * 28 * 28        # a frame's share of them is never less
MAX_FRAMES = 768
EPSILON = 1e-3                   # seconds; decord's timestamps are float32
CHUNK = 16                       # frames at full size in memory
DECODER = f"decord {decord.__version__}, 1"   # part of a cached clip's name; count up when `load` gives other frames
MISREAD = (".ts", ".mts", ".m2ts", ".wmv", ".asf")   # decord silently gives other frames than those asked for

decord.logging.set_level(decord.logging.QUIET)   # what goes wrong is said by VideoError


class VideoError(ValueError):
    """A video that cannot be used; the message is one line that names the file and the cause."""


class VideoTimeout(VideoError):
    """A video that takes too long to decode."""


@dataclass(frozen=True)
class Clip:
    """RGB frames and the rate at which they were really sampled."""

    frames: torch.Tensor        # uint8 (T, 3, H, W), T even
    fps: float                  # frames a second
    key: tuple | None = None    # what they show: file, part, options, cut. Clips of equal keys have equal frames

    @property
    def duration(self) -> float:
        """Length in seconds."""
        return len(self.frames) / self.fps

    def cut(self, start: float, end: float) -> "Clip":
        """The segment from `start` to `end` (seconds) as a Clip: bounds to the nearest frame, at least one pair.

        An odd number of frames gains the next one, at the clip's end the one before; bounds are kept inside the clip.
        """
        total = len(self.frames)
        first = min(max(math.floor(start * self.fps + 0.5), 0), total - 2)
        last = min(max(math.floor(end * self.fps + 0.5), first + 2), total)   # exclusive
        if (last - first) % 2:
            first, last = (first, last + 1) if last < total else (first - 1, last)
        return replace(self, frames=self.frames[first:last], key=self.key and (*self.key, first, last))

    def grey(self) -> "Clip":
        """A Clip of the same shape and rate that shows nothing: every value 128."""
        return replace(self, frames=torch.full_like(self.frames, 128), key=self.key and (*self.key, "grey"))


def frame_count(duration: float, available: int, fps: float = 2.0, max_frames: int = MAX_FRAMES) -> int:
    """Frames to sample: duration (seconds) * fps, at most max_frames and `available`, rounded down to even.

    Never fewer than 4: of a file with 1 to 3 frames some are repeated.
    """
    return max(int(min(duration * fps + EPSILON, max_frames, available)) // 2 * 2, 4)


def frame_size(height: int, width: int, frames: int, total_pixels: int = TOTAL_PIXELS,
               min_pixels: int = MIN_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels of each of `frames` frames, multiples of 28, that keeps a video within its budget.

    Sides are rounded to the nearest multiple of 28 or, if the frame then has more than max(total_pixels / frames,
    min_pixels), scaled by the same factor and rounded down.
    """
    budget = max(total_pixels / frames, min_pixels)
    h, w = (max(round(side / FACTOR), 1) * FACTOR for side in (height, width))
    if h * w > budget:
        scale = math.sqrt(budget / (height * width))
        longest = int(budget) // FACTOR**2   # a very long side, when the other is already 28
        h, w = (max(min(int(side * scale) // FACTOR, longest), 1) * FACTOR for side in (height, width))
    return h, w


def load(path: str | Path, start: float | None = None, end: float | None = None, fps: float = 2.0,
         total_pixels: int = TOTAL_PIXELS, min_pixels: int = MIN_PIXELS, max_frames: int = MAX_FRAMES) -> Clip:
    """Decode a video file, or its part from `start` to `end` (seconds), into a Clip whose time 0 is `start`.

    Frames are upright: decord applies the rotation that phones write into a file.
    Raises VideoError: file missing, not a video, or broken where it has to be decoded; part outside the video.
    """
    require_file(path)
    if Path(path).suffix.lower() in MISREAD:
        raise VideoError(f"{path}: decord misreads this format; convert it with ffmpeg -i {Path(path).name} video.mp4")
    try:   # fault_tol: more than 4 frames replaced by their neighbours count as a broken file
        reader = decord.VideoReader(str(path), num_threads=1, fault_tol=4)
        times, duration = frame_times(reader)
        begin, stop = max(start or 0.0, 0.0), duration if end is None else min(end, duration)
        if not begin < stop:
            raise VideoError(f"{path}: lasts {duration:.2f} s, so it has no part from {start} to {end} s")
        available = int(np.searchsorted(times, stop - EPSILON) - on_display(times, begin))
        n = frame_count(stop - begin, available, fps, max_frames)
        index = on_display(times, begin + np.arange(n) * (stop - begin) / n)   # (n,)
        frames = []
        for batch in decode(reader, index):   # (<= CHUNK, 3, H, W)
            size = frame_size(*batch.shape[-2:], n, total_pixels, min_pixels)
            if batch.shape[-2:] != size:   # on uint8, as the Qwen2.5-VL processor: rounded and clamped
                batch = F.interpolate(batch, size=size, mode="bicubic", antialias=True)
            frames.append(batch)
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError) as error:
        cause = (str(error).splitlines() or ["?"])[0].split(": ")[-1]
        raise VideoError(f"{path}: cannot be decoded ({cause}; the file has {Path(path).stat().st_size} bytes); "
                         "get it again or re-encode it with ffmpeg") from error
    key = (str(path), start, end, fps, total_pixels, min_pixels, max_frames)
    return Clip(torch.cat(frames).contiguous(), float(n / (stop - begin)), key)


def require_file(path: str | Path) -> None:
    """Raise VideoError unless there is a file at `path`."""
    if not os.path.isfile(path):
        kind = "is not a regular file" if os.path.exists(path) else "no such video file; check the path and the id"
        raise VideoError(f"{path}: {kind}")


def frame_times(reader: decord.VideoReader) -> tuple[np.ndarray, float]:
    """When the frames that decoding gives appear, (N,) seconds from the first one; and the duration, seconds.

    Frames before time 0 are those that an edit list hides (a file cut without re-encoding keeps them from the key frame
    before the cut): decord lists them but never gives them. Without usable timestamps the frame rate tells the times.
    """
    spans = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)   # (N, 2): appears, goes
    times, last = spans[spans[:, 0] >= 0, 0], spans[-1, 1]
    usable = np.abs(spans).max() < 1e6 and (np.diff(spans[:, 0]) >= 0).all()   # False for NaN
    if usable and len(times) and last > times[0]:
        return times - times[0], last - times[0]
    rate = reader.get_avg_fps()
    assert 0 < rate < 1e6, "neither timestamps nor a frame rate"
    return np.arange(len(reader)) / rate, len(reader) / rate


def on_display(times: np.ndarray, t: float | np.ndarray) -> np.ndarray:
    """Index of the frame that is shown at time `t`: the latest one that appeared by then."""
    return np.maximum(np.searchsorted(times, t + EPSILON, side="right") - 1, 0)


def decode(reader: decord.VideoReader, index: np.ndarray) -> Iterator[torch.Tensor]:
    """Yield the frames of a non-decreasing `index` in chunks, uint8 (<= CHUNK, 3, H, W).

    All frames are read in their order. decord's seeking (get_batch, reader[i], skip_frames) gives other frames than
    those asked for in HEVC with open groups of pictures, MPEG-4 with B-frames, AVI, and files with an edit list; at 2
    fps it also saves nothing, since key frames are further apart. A part deep inside a long file does wait for what is
    before.
    """
    position, chunk = -1, []
    for k, i in enumerate(index, 1):
        while position < i:
            frame, position = reader.next(), position + 1
            height, width, _ = frame.shape
        rows = frame.asnumpy().reshape(height, -1)   # narrow frames come with padded rows, (H, W, 4 and more)
        chunk.append(rows[:, :3 * width].reshape(height, width, 3))
        if len(chunk) == CHUNK or k == len(index):
            yield torch.from_numpy(np.stack(chunk)).permute(0, 3, 1, 2)
            chunk = []
