"""When the frames of a video file are shown, and the frames themselves, with PyAV.

The file is read twice, in order and without seeking: `survey` goes through its packets, which says what is really there
(the header of a file that was cut short promises more), `frames` decodes them. A frame carries the time at which it is
shown, so reference frames that are never shown (VP8) and those before the cut of an edit list do no harm.

    track = survey("video.mp4")
    for picture in frames(track, [0.0, 0.5]):    # uint8 (H, W, 3)
        ...
"""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise

import av
import numpy as np

EPSILON = 1e-3      # seconds; timestamps may be rounded to milliseconds
FAULTS = 4          # frames that may be lost before a moment; more, and the file counts as broken
REORDERED = 16      # frames by which a packet may come before or after its turn
LONGEST = 1e6       # seconds; times beyond are garbage
USUAL_RATE = 25.0   # frames per second, where a file tells none
# formats whose times are missing, or those of packets
UNTIMED = ("avi", "h264", "hevc", "m4v", "mpegvideo", "obu", "ivf")


class Unreadable(ValueError):
    """What PyAV gives of a file cannot be used; the message is the cause."""


@dataclass(frozen=True)
class Track:
    """The video track of a file. Time 0 is where the file begins: with its sound, if that begins before the video."""

    path: str
    format: str             # "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", ...
    codec: str              # "h264", "vp9", ...
    pixels: int             # of a frame, as the header says
    times: np.ndarray       # (N,) seconds, ascending: when each frame appears
    end: float              # seconds: when the last frame goes
    zero: float | None      # seconds: time 0 on the frames' own clock; None: count the frames


def nothing() -> None:
    """The default of `tick`, which is called with each packet, since decoding may take long."""


def survey(path: str, tick: Callable[[], None] = nothing) -> Track:
    """Go through a file's packets. Raises Unreadable, or av.FFmpegError with what FFmpeg says."""
    with av.open(path, metadata_errors="ignore") as container:
        stream = video_stream(container)
        codec = stream.codec_context
        rows = packet_times(container, stream, tick)
        sounds = []
        for sound in container.streams.audio:
            if sound.start_time is not None:
                sounds.append(float(sound.start_time * sound.time_base))
        seconds = np.array(rows, float) * float(stream.time_base)       # (N, 3)
        rate = float(stream.average_rate or stream.guessed_rate or USUAL_RATE)
        times, end, zero = timeline(container.format.name, seconds, rate, sounds)
        pixels = codec.width * codec.height
        return Track(path, container.format.name, codec.name, pixels, times, end, zero)


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise Unreadable("it has no video track")
    # several videos are decoded at a time, and each thread would hold frames
    stream.codec_context.thread_count = 1
    return stream


def packets(container: av.container.InputContainer, stream: av.VideoStream,
            tick: Callable[[], None]) -> Iterator[av.Packet]:
    """The packets that a file really has: one that is cut in the middle ends there."""
    try:
        for packet in container.demux(stream):
            tick()
            if packet.size:     # empty ones repeat a frame in AVI; PyAV adds one at the end
                yield packet
    except av.InvalidDataError:
        pass


def packet_times(container: av.container.InputContainer, stream: av.VideoStream,
                 tick: Callable[[], None]) -> list[tuple]:
    """(when it is shown, when it has to be decoded, for how long it is shown) of each packet with a frame that is
    shown, in the stream's units; NaN where the file does not tell. Raises Unreadable when there is no packet."""
    rows = []
    cut = False
    for packet in packets(container, stream, tick):
        if packet.is_discard or is_hidden(packet, stream.codec_context.name):
            continue
        shown = math.nan if packet.pts is None else packet.pts
        sent = math.nan if packet.dts is None else packet.dts
        rows.append((shown, sent, packet.duration or 0))
        cut = packet.is_corrupt
    if cut:
        rows.pop()      # half a frame, at which the file was cut
    if not rows:
        raise Unreadable("it has no frames")
    return rows


def is_hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet is a reference frame of VP8 that is never shown. (VP9 has them in the packet of a shown one.)"""
    return codec == "vp8" and not memoryview(packet)[0] & 0x10


def timeline(format: str, packets: np.ndarray, rate: float, sounds: list[float]) -> tuple:
    """(times, end, zero) of a Track, from what its packets say.

    packets (N, 3): when a packet is shown, when it has to be decoded, and its duration, in seconds, NaN where unknown;
    rate: frames per second, as the header says; sounds: when the tracks of sound start, in seconds.
    """
    shown, sent, durations = packets.T      # (N,) each
    if not 0 < rate < LONGEST:
        rate = USUAL_RATE
    timed = format not in UNTIMED
    completed = complete(shown, durations)
    restarted = (np.diff(sent) < 0).any()       # the clock starts again; False for NaN
    ordered = timed and usable(shown) and not restarted
    if ordered:
        order = np.argsort(shown, kind="stable")
        times = shown[order]
        durations = durations[order]
    elif timed and usable(completed):
        times = completed
    elif usable(sent) and (np.diff(sent) > 0).all():
        times = sent
    else:
        times = np.arange(len(packets)) / rate
        durations = np.full(len(packets), 1 / rate)

    zero = times[0]
    if sounds:
        zero = min(zero, max(min(sounds), 0))       # sound before 0 is what its codec needs ahead
    end = times[-1] + last_duration(times, durations, rate)
    return times - zero, float(end - zero), float(zero) if ordered else None


def complete(times: np.ndarray, durations: np.ndarray) -> np.ndarray:
    """Ascending times of which the first ones are unknown (NaN): those below 0, which Matroska's reader leaves out.
    All are NaN where others are unknown."""
    unknown = np.isnan(times)
    count = int(unknown.sum())
    known = np.sort(times[~unknown])
    if not 0 < count <= len(known) or unknown[count + REORDERED:].any():
        return np.full_like(times, math.nan)
    gap = durations[-1]
    if len(known) > 1:
        gap = np.median(np.diff(known))
    return np.concatenate([known[0] - gap * np.arange(count, 0, -1), known])


def usable(times: np.ndarray) -> bool:
    return bool((np.abs(times) < LONGEST).all())     # False for NaN


def last_duration(times: np.ndarray, durations: np.ndarray, rate: float) -> float:
    """Seconds for which the last frame is shown: its own duration, else the usual gap between frames."""
    if 0 < durations[-1] < LONGEST:
        return durations[-1]
    gap = np.median(np.diff(times)) if len(times) > 1 else 0
    return gap or 1 / rate


def on_display(times: np.ndarray, t: float | np.ndarray) -> np.ndarray:
    """Index of the frame that is shown at time `t`: the latest one that appeared by then, or else the first."""
    return np.maximum(np.searchsorted(times, t + EPSILON, side="right") - 1, 0)


def decoded(track: Track, tick: Callable[[], None]) -> Iterator[tuple[float, av.VideoFrame]]:
    """All frames in the order in which they are shown, each with the time (seconds) at which it appears.

    Raises the error of a packet that cannot be decoded, since the pictures after it show damage; but not of the last
    one, where a file was cut, nor of those before the first frame, where a recording may begin in the middle.
    """
    fault = None
    count = 0
    with av.open(track.path, metadata_errors="ignore") as container:
        stream = video_stream(container)
        base = float(stream.time_base)      # multiplied as in survey: ties are the same ties
        for packet in chain(packets(container, stream, tick), [None]):     # None: what is held back
            if fault and packet:
                raise fault
            try:
                images = stream.codec_context.decode(packet)
            except av.FFmpegError as error:
                if count:
                    fault = error
                continue
            for image in images:
                if track.zero is None or image.pts is None:
                    time = track.times[min(count, len(track.times) - 1)]
                else:
                    time = image.pts * base - track.zero
                yield time, image
                count += 1


def frames(track: Track, moments: Iterable[float],
           tick: Callable[[], None] = nothing) -> Iterator[np.ndarray]:
    """The picture on display at each of the ascending `moments` (seconds), uint8 RGB (H, W, 3), upright.

    One that is shown at several moments is the same object each time. Raises av.FFmpegError where a packet is
    damaged, Unreadable when more than FAULTS frames before a moment are lost without a word.
    """
    moments = list(moments)
    position = 0            # of the moment that comes next
    for (appears, image), (goes, _) in pairwise(chain(decoded(track, tick), [(math.inf, None)])):
        picture = None
        while position < len(moments) and goes > moments[position] + EPSILON:
            moment = moments[position]
            lost = on_display(track.times, moment) - on_display(track.times, appears)
            if lost > FAULTS:
                raise Unreadable(f"{lost} frames before {moment:.2f} s are lost")
            if picture is None:
                picture = upright(image)
            yield picture
            position += 1
        if position == len(moments):
            return
    raise Unreadable("none of its frames can be decoded")


def upright(image: av.VideoFrame) -> np.ndarray:
    """RGB (H, W, 3), turned as the file says: phones write how they were held."""
    pixels = image.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(image.rotation / 90)))
