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
    loader = Loader(cache="frames")          # loader("video.mp4") is the same clip, decoded in a process of its own,
                                             # which may hang or crash, and kept on disk for the next time
"""

import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import decord
import numpy as np
import torch
import torch.nn.functional as F

from support.cache import Cache

FACTOR = 28                      # pixels: patches of 14 x 14, merged 2 x 2
TOTAL_PIXELS = 3584 * 28 * 28    # of a whole video, 2.8 M
MIN_PIXELS = 16 * 28 * 28        # a frame's share of them is never less
MAX_FRAMES = 768
EPSILON = 1e-3                   # seconds; decord's timestamps are float32
CHUNK = 16                       # frames at full size in memory
OPTIONS = {"fps": 2.0, "total_pixels": TOTAL_PIXELS, "min_pixels": MIN_PIXELS, "max_frames": MAX_FRAMES}
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

    frames: torch.Tensor   # uint8 (T, 3, H, W), T even
    fps: float             # frames a second

    duration = property(lambda self: len(self.frames) / self.fps, doc="Length in seconds.")

    def cut(self, start, end):
        """The segment from `start` to `end` (seconds) as a Clip: bounds to the nearest frame, at least one pair.

        An odd number of frames gains the next one, at the clip's end the one before; bounds are kept inside the clip.
        """
        total = len(self.frames)
        first = min(max(math.floor(start * self.fps + 0.5), 0), total - 2)
        last = min(max(math.floor(end * self.fps + 0.5), first + 2), total)   # exclusive
        if (last - first) % 2:
            first, last = (first, last + 1) if last < total else (first - 1, last)
        return replace(self, frames=self.frames[first:last])

    def grey(self):
        """A Clip of the same shape and rate that shows nothing: every value 128."""
        return replace(self, frames=torch.full_like(self.frames, 128))


def frame_count(duration, available, fps=2.0, max_frames=MAX_FRAMES):
    """Frames to sample: duration (seconds) * fps, at most max_frames and `available`, rounded down to even.

    Never fewer than 4: of a file with 1 to 3 frames some are repeated.
    """
    return max(int(min(duration * fps + EPSILON, max_frames, available)) // 2 * 2, 4)


def frame_size(height, width, frames, total_pixels=TOTAL_PIXELS, min_pixels=MIN_PIXELS):
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


def load(path, start=None, end=None, fps=2.0, total_pixels=TOTAL_PIXELS, min_pixels=MIN_PIXELS, max_frames=MAX_FRAMES):
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
    return Clip(torch.cat(frames).contiguous(), float(n / (stop - begin)))


def require_file(path):
    """Raise VideoError unless there is a file at `path`."""
    if not os.path.isfile(path):
        kind = "is not a regular file" if os.path.exists(path) else "no such video file; check the path and the id"
        raise VideoError(f"{path}: {kind}")


def frame_times(reader):
    """When the frames that decoding gives appear, (N,) seconds from the first one; and the duration, seconds.

    Frames before time 0 are those that an edit list hides (a file cut without re-encoding keeps them from the key frame
    before the cut): decord lists them but never gives them. Without usable timestamps the frame rate tells the times.
    """
    spans = np.asarray(reader.get_frame_timestamp(range(len(reader))), dtype=np.float64)   # (N, 2): appears, goes
    times, last = spans[spans[:, 0] >= 0, 0], spans[-1, 1]
    if np.abs(spans).max() < 1e6 and (np.diff(spans[:, 0]) >= 0).all() and len(times) and last > times[0]:   # not for NaN
        return times - times[0], last - times[0]
    rate = reader.get_avg_fps()
    assert 0 < rate < 1e6, "neither timestamps nor a frame rate"
    return np.arange(len(reader)) / rate, len(reader) / rate


def on_display(times, t):
    """Index of the frame that is shown at time `t`: the latest one that appeared by then."""
    return np.maximum(np.searchsorted(times, t + EPSILON, side="right") - 1, 0)


def decode(reader, index):
    """Yield the frames of a non-decreasing `index` in chunks, uint8 (<= CHUNK, 3, H, W).

    All frames are read in their order. decord's seeking (get_batch, reader[i], skip_frames) gives other frames than those
    asked for in HEVC with open groups of pictures, MPEG-4 with B-frames, AVI, and files with an edit list; at 2 fps it
    also saves nothing, since key frames are further apart. A part deep inside a long file does wait for what is before.
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


class Loader:
    """loader(path, start=None, end=None) -> Clip, as `load`, which runs in worker processes of the loader's own: a
    decoder that hangs or crashes ends only its process and raises VideoError. What has hung is not tried again.

    Several threads may call: as many videos are decoded at a time as there are `workers`. A worker starts when it is
    first needed (which takes it a few seconds, to import torch). With `cache`, a folder, decoded clips are kept there.
    """

    def __init__(self, limit=60.0, cache="", cache_gb=50.0, workers=1, **options):
        """`limit`: seconds that decoding a file may take; `cache_gb`: size of the cache; `options`: as for `load`."""
        self.options, self.hung = dict(OPTIONS, **options), {}   # hung: the path -> what was said of it
        self.cache = Cache(cache, cache_gb) if cache else None
        self.workers = [Worker(limit) for _ in range(workers)]
        self.stopped = False
        self.free = queue.LifoQueue()   # the last one in has started already
        for worker in self.workers:
            self.free.put(worker)

    def __call__(self, path, start=None, end=None):
        path = os.path.abspath(path)
        if self.stopped:
            raise VideoError(f"{path}: not decoded, since the run is ending")
        require_file(path)
        request = {"path": path, "start": start, "end": end, **self.options}
        key = None
        if self.cache:
            file = os.stat(path)
            key = {**request, "bytes": file.st_size, "mtime_ns": file.st_mtime_ns, "decoder": DECODER}
            entry = self.cache.get(key)
            if entry:
                return Clip(torch.from_numpy(entry[0]), entry[1]["fps"])
        worker = self.free.get()
        try:
            if self.stopped:    # maybe while this thread waited for a worker, as below
                raise VideoError(f"{path}: not decoded, since the run is ending")
            if path in self.hung:
                raise VideoTimeout(self.hung[path])
            clip = worker.ask(request)
        except VideoTimeout as error:
            self.hung[path] = str(error)
            raise
        finally:
            self.free.put(worker)
        if key:
            self.cache.put(key, clip.frames.numpy(), {"fps": clip.fps})
        return clip

    def close(self):
        for worker in self.workers:
            worker.close()

    def stop(self):
        """From another thread: end what is being decoded, and decode nothing more. Those who wait get a VideoError."""
        self.stopped = True
        for worker in self.workers:
            process = worker.process
            if process is not None:
                process.kill()


class Worker:
    """A process that decodes one video at a time for a Loader. It ends with its parent, however that ends."""

    def __init__(self, limit):
        self.limit, self.process, self.pid = limit, None, None   # pid: whose worker this is

    def ask(self, request):
        """Have the process decode, and read its answer: a line of json, then the bytes of the frames."""
        if self.process is None or self.pid != os.getpid():   # never share one with a fork
            self.start()
        cause, kind = None, VideoError
        try:
            self.stream.write(json.dumps({**request, "limit": self.limit}).encode() + b"\n")
            self.stream.flush()
            answer = json.loads(self.stream.readline())   # of an ended process: empty, so a ValueError
            if "error" in answer:
                raise VideoError(answer["error"])
            frames = torch.empty(answer["shape"], dtype=torch.uint8)
            if self.stream.readinto(frames.numpy()) == frames.numel():
                return Clip(frames, answer["fps"])
        except VideoError:
            raise
        except TimeoutError:
            kind, cause = VideoTimeout, (f"not decoded within {self.limit:g} s, and not tried again in this run; "
                                         "re-encode it with ffmpeg, or allow more time with --video_limit")
        except (OSError, ValueError):
            pass
        except BaseException:   # an interrupt: what is on the way must not answer the next request
            self.close()
            raise
        code = self.close()
        raise kind(f"{request['path']}: " + (cause or f"crashed the decoder (exit code {code}); "
                                             "get it again or re-encode it with ffmpeg"))

    def start(self):
        """Start this file as a script: so the caller's own main module is not imported again. Its standard output is
        closed to it, since decoders print; it talks over a socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "support.video", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parent.parent,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)   # Ctrl-C is for the caller
        self.pid, self.stream = os.getpid(), ours.makefile("rwb")
        with ours:   # the stream keeps it open
            ours.settimeout(300)
            try:
                ready = self.stream.readline()
            except TimeoutError:
                ready = b""
            ours.settimeout(self.limit)
        if not ready:
            raise ChildProcessError(f"the decoding process does not start (exit code {self.close()}): see its message "
                                    f"above, or try {sys.executable} -c 'import video'")

    def close(self):
        """End the process; returns its exit code, minus the signal's number if a signal ended it."""
        process, self.process = self.process, None
        if process is None or self.pid != os.getpid():
            return None
        try:
            self.stream.close()
        except OSError:   # unsent bytes
            pass
        try:
            return process.wait(0.2)   # it ended itself, or does so now that the stream is closed
        except subprocess.TimeoutExpired:
            process.kill()
        try:
            return process.wait(5)
        except subprocess.TimeoutExpired:   # the kernel waits for a dead disk
            return None

    __del__ = close


def serve(number):
    """The worker: answers requests on socket `number` until its other end is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)   # a scheduler sends it to all processes; the caller may need more frames
    with socket.socket(fileno=number) as connection, connection.makefile("rb") as requests:
        connection.sendall(b"ready\n")
        for line in requests:
            request = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, request.pop("limit") + 5)   # ends this process if the caller no longer can
            try:
                clip = load(**request)
            except VideoError as error:
                connection.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
            else:
                connection.sendall(json.dumps({"shape": clip.frames.shape, "fps": clip.fps}).encode() + b"\n")
                connection.sendall(clip.frames.numpy())
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
