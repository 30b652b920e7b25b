"""Video file -> `Clip`: uint8 frames at about 2 frames per second, within a pixel budget for the whole video.

The rules are those of Qwen2.5-VL (even number of frames, sides that are multiples of 28), with these departures:

1. Frame i is the one on display at time i / fps. The n frames are spaced by duration / n, and `fps` = n / duration is
   the rate they really have, so the model's time positions tell the true time. Qwen spreads the frames up to the very
   last one, which stretches time by up to one sample.
2. Frames are not enlarged beyond rounding to a multiple of 28. Qwen enlarges a small frame to MIN_PIXELS, which adds
   tokens and no information; here MIN_PIXELS is only the floor of a frame's share of the budget in a long video.
3. The budget counts the pixels of every frame ("approximately 2.8 million pixels per video"). Qwen counts a pair of
   frames, which the model merges, once; for that reading pass `total_pixels=2 * TOTAL_PIXELS`.

Time 0 is where the file begins, as in a player: a video track that starts later than the sound shows its first frame
until then. Where a file has no sound, or does not tell when its tracks start (raw streams), the first frame is time 0.

PyAV tells which frames there are and when (video_times.py). Their pixels come from decord where it lists the same
frames and times, else from PyAV, which reads all that FFmpeg does.

    clip = load("video.mp4")                 # clip.frames (T, 3, H, W), clip.fps, clip.duration
    segment = clip.cut(start=3.5, end=9.0)   # what an inversion task sees
"""
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F

from engine import video_times
from engine.video_times import EPSILON, on_display

FACTOR = 28                      # pixels: patches of 14 x 14, merged 2 x 2
TOTAL_PIXELS = 3584 * 28 * 28    # of a whole video, 2.8 M
MIN_PIXELS = 16 * 28 * 28        # a frame's share of them is never less
FPS = 2.0                        # frames per second
MAX_FRAMES = 768                 # of a clip; a longer video has fewer per second
VERSION = 2                      # of `load`, for cached clips: count up when its frames change
DECODER = (f"version {VERSION}, decord {decord.__version__}, PyAV {av.__version__}, "
           f"{FPS} fps, {MIN_PIXELS} pixels, {MAX_FRAMES} frames")
DECORD = {                       # format -> codecs that decord reads well
    "mov,mp4,m4a,3gp,3g2,mj2": ("h264", "hevc", "av1", "mpeg4"),
    "matroska,webm": ("h264", "hevc", "av1")}
DECORD_PIXELS = 1920 * 1920      # of a frame; decord holds more frames at a time than PyAV
DECORD_BYTES = 1 << 30           # of a file; decord reads it whole when it opens it, without a tick

decord.logging.set_level(decord.logging.QUIET)   # what goes wrong is said by VideoError


class VideoError(ValueError):
    """A video that cannot be used; the message is one line that names the file and the cause."""


class VideoTimeout(VideoError):
    """A video that takes too long to decode."""


@dataclass(frozen=True)
class Clip:
    """RGB frames and the rate at which they were really sampled."""

    frames: torch.Tensor        # uint8 (T, 3, H, W), T even
    fps: float                  # frames per second
    key: tuple | None = None    # file, start, end, budget, cuts: equal keys mean equal frames

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
        stop = min(max(math.floor(end * self.fps + 0.5), first + 2), total)     # exclusive
        if (stop - first) % 2 == 1:
            if stop < total:
                stop += 1
            else:
                first -= 1
        return replace(self, frames=self.frames[first:stop], key=self.extended_key(first, stop))

    def grey(self) -> "Clip":
        """A Clip of the same shape and rate that shows nothing: every value 128."""
        frames = torch.full_like(self.frames, 128)
        return replace(self, frames=frames, key=self.extended_key("grey"))

    def extended_key(self, *change: int | str) -> tuple | None:
        if self.key is None:
            return None
        return (*self.key, *change)


def frame_count(duration: float, available: int) -> int:
    """Frames to sample: duration (seconds) * FPS, at most MAX_FRAMES and `available`, rounded down to even.

    Never fewer than 4: of a file with 1 to 3 frames some are repeated.
    """
    count = int(min(duration * FPS + EPSILON, MAX_FRAMES, available))
    return max(count // 2 * 2, 4)


def frame_size(height: int, width: int, frames: int,
               total_pixels: int = TOTAL_PIXELS) -> tuple[int, int]:
    """(height, width) in pixels of each of `frames` frames, multiples of 28, that keeps a video within its budget.

    Sides are rounded to the nearest multiple of 28 or, if the frame then has more than max(total_pixels / frames,
    MIN_PIXELS), scaled by the same factor and rounded down.
    """
    budget = max(total_pixels / frames, MIN_PIXELS)
    rows = max(round(height / FACTOR), 1)           # in units of 28 pixels
    columns = max(round(width / FACTOR), 1)
    if rows * columns * FACTOR**2 > budget:
        scale = math.sqrt(budget / (height * width))
        longest = int(budget) // FACTOR**2      # for a very long side, when the other is already 1
        rows = max(min(int(height * scale) // FACTOR, longest), 1)
        columns = max(min(int(width * scale) // FACTOR, longest), 1)
    return rows * FACTOR, columns * FACTOR


def beyond(duration: float, start: float, end: float, slack: float) -> str:
    """Why a clip of `duration` seconds cannot hold what is annotated from `start` to `end`, or "".

    The segment has to begin before the clip ends, and to end at most `slack` seconds after that.
    """
    if start < duration and end <= duration + slack:
        return ""
    return (f"{duration:.2f} s of video, so nothing from {start:g} to {end:g} s: "
            "the file is cut short, or is not the annotated one; get it again")


def load(path: str | Path, start: float | None = None, end: float | None = None,
         total_pixels: int = TOTAL_PIXELS, tick: Callable[[], None] = video_times.nothing) -> Clip:
    """Decode a video file, or what it shows from `start` to `end` (seconds), into a Clip whose time 0 is `start`.

    Frames are upright: the rotation that phones write into a file is applied. One frame is held at full size beside
    those of the decoder. `tick` is called whenever something was read or decoded.
    Raises VideoError: file missing, not a video, or broken where it has to be decoded; `start` after the video's end.
    """
    require_file(path)
    try:
        track = video_times.survey(os.path.abspath(path), tick)
        begin = max(start or 0.0, 0.0)
        stop = track.end if end is None else min(end, track.end)
        if not begin < stop:
            raise VideoError(
                f"{path}: lasts {track.end:.2f} s, so it has no part from {start} to {end} s")
        available = np.searchsorted(track.times, stop - EPSILON) - on_display(track.times, begin)
        count = frame_count(stop - begin, int(available))
        moments = begin + np.arange(count) * (stop - begin) / count     # (T,) seconds
        frames = resized(decode(track, moments, tick), count, total_pixels)
    except (av.FFmpegError, video_times.Unreadable) as error:
        cause = getattr(error, "strerror", None) or error
        size = os.path.getsize(path)
        raise VideoError(f"{path}: cannot be decoded ({cause}; the file has {size} bytes); "
                         "get it again or re-encode it with ffmpeg") from error
    return Clip(frames, float(count / (stop - begin)), (str(path), start, end, total_pixels))


def require_file(path: str | Path) -> None:
    """Raise VideoError unless there is a file at `path` that may be read."""
    if not os.path.exists(path):
        raise VideoError(f"{path}: no such video file; check the path and the id")
    if not os.path.isfile(path):
        raise VideoError(f"{path}: is not a regular file")
    if not os.access(path, os.R_OK):
        raise VideoError(f"{path}: may not be read by this user; change its permissions (chmod +r)")


def resized(pictures: Iterable[np.ndarray], count: int, total_pixels: int) -> torch.Tensor:
    """`count` pictures (h, w, 3) of a video as frames (T, 3, H, W), as large as the budget allows."""
    frames = []
    previous = None
    for picture in pictures:
        if picture is not previous:
            previous = picture
            if not frames:
                size = frame_size(*picture.shape[:2], count, total_pixels)      # (H, W)
            frame = torch.from_numpy(picture).permute(2, 0, 1)[None]            # (1, 3, h, w)
            if frame.shape[-2:] != size:
                # (1, 3, H, W), on uint8, as the Qwen2.5-VL processor: rounded and clamped
                frame = F.interpolate(frame, size=size, mode="bicubic", antialias=True)
        frames.append(frame)
    return torch.cat(frames).contiguous()


def decode(track: video_times.Track, moments: np.ndarray,
           tick: Callable[[], None]) -> Iterator[np.ndarray]:
    """The picture on display at each of the ascending `moments` (seconds), uint8 RGB (h, w, 3); one that is shown at
    several moments is the same object each time."""
    done = 0
    reader = decord_reader(track)
    if reader:
        try:
            for picture in decord_frames(reader, on_display(track.times, moments), tick):
                yield picture
                done += 1
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError):
            pass                                    # PyAV tells whether it is the file's fault
    if done < len(moments):
        yield from video_times.frames(track, moments[done:], tick)


def decord_reader(track: video_times.Track) -> decord.VideoReader | None:
    """decord's reader of a file, if it is of a kind that decord reads well and lists the frames and times of PyAV.

    Otherwise None: decord lists reference frames that are never shown in VP8 and VP9, misreads mpeg-ts and wmv, does
    without times in AVI, and refuses other formats.
    """
    if track.zero is None or track.codec not in DECORD.get(track.format, ()):
        return None
    if track.pixels > DECORD_PIXELS or os.path.getsize(track.path) > DECORD_BYTES:
        return None
    try:    # fault_tol: after as many frames replaced by their neighbours it raises
        reader = decord.VideoReader(track.path, num_threads=1, fault_tol=video_times.FAULTS)
        spans = reader.get_frame_timestamp(range(len(reader)))  # (N, 2): appears, goes
    except (decord.DECORDError, RuntimeError):
        return None
    times = np.asarray(spans, dtype=np.float64)[:, 0]           # (N,)
    times = times[times >= 0]   # those before are hidden by an edit list: listed, but never given
    if len(times) != len(track.times):
        return None
    shifts = times - track.times        # equal where decord only has another time 0
    if np.abs(np.diff(shifts)).max(initial=0) >= 4 * EPSILON:
        return None
    return reader


def decord_frames(reader: decord.VideoReader, index: np.ndarray,
                  tick: Callable[[], None]) -> Iterator[np.ndarray]:
    """The frames of a non-decreasing `index`, uint8 (h, w, 3).

    All frames are read in their order. decord's seeking (get_batch, reader[i], skip_frames) gives other frames than
    those asked for in HEVC with open groups of pictures, MPEG-4 with B-frames, and files with an edit list; at 2 fps it
    also saves nothing, since key frames are further apart. A clip deep inside a long file waits for what is before it.
    """
    position = -1
    for i in index:
        if position < i:
            while position < i:
                frame = reader.next()
                position += 1
                tick()
            height, width, _ = frame.shape
            # narrow frames come with padded rows, (h, w, 4 and more)
            rows = frame.asnumpy().reshape(height, -1)
            picture = np.ascontiguousarray(rows[:, :3 * width]).reshape(height, width, 3)
        yield picture
