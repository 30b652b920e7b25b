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
from itertools import chain

import av
import numpy as np

EPSILON = 1e-3      # seconds; timestamps may be rounded to milliseconds
FAULTS = 4          # frames that may be lost before a moment; more, and the file counts as broken
REORDERED = 16      # frames by which a packet may come before or after its turn
LONGEST = 1e6       # seconds; times beyond are garbage
UNORDERED = ("avi", "h264", "hevc", "m4v", "mpegvideo", "obu", "ivf")  # have no times of their own, or of packets only


class Unreadable(ValueError):
    """What PyAV gives of a file cannot be used; the message is the cause."""


@dataclass(frozen=True)
class Track:
    """The video track of a file. Time 0 is where the file begins: with its sound, if that begins before the video."""

    path: str
    format: str             # "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", ...
    codec: str              # "h264", "vp9", ...
    times: np.ndarray       # (N,) seconds, ascending: when the frames appear
    end: float              # seconds: when the last one goes
    zero: float | None      # seconds: time 0 on the frames' own clock; None when the i-th frame appears at times[i]
    pixels: int             # of a frame, as the header says


def nothing() -> None:
    """The default of `tick`, which is called with each packet, since decoding may take long."""


def packets(container: av.container.InputContainer, stream: av.VideoStream, tick: Callable) -> Iterator[av.Packet]:
    """The packets that a file really has: one that is cut in the middle ends there."""
    try:
        for packet in container.demux(stream):
            tick()
            if packet.size:     # empty ones repeat a frame in AVI; the last one of all is PyAV's own
                yield packet
    except av.InvalidDataError:
        pass


def video_of(container: av.container.InputContainer) -> av.VideoStream:
    stream = container.streams.best("video")
    if stream is None:
        raise Unreadable("it has no video track")
    stream.codec_context.thread_count = 1       # several videos are decoded at a time; each thread would hold frames
    return stream


def survey(path: str, tick: Callable[[], None] = nothing) -> Track:
    """Go through a file's packets. Raises Unreadable, or av.FFmpegError with what FFmpeg says."""
    with av.open(path, metadata_errors="ignore") as container:
        stream = video_of(container)
        read, cut = [], False
        for packet in packets(container, stream, tick):
            if not (packet.is_discard or hidden(packet, stream.codec_context.name)):
                read.append((packet.pts, packet.dts, packet.duration or 0))
                cut = packet.is_corrupt
        del read[len(read) - cut:]      # half a frame, at which the file was cut
        if not read:
            raise Unreadable("it has no frames")
        sounds = [float(sound.start_time * sound.time_base) for sound in container.streams.audio
                  if sound.start_time is not None]
        base, rate = float(stream.time_base), float(stream.average_rate or stream.guessed_rate or 25)
        format, codec = container.format.name, stream.codec_context.name
        pixels = stream.codec_context.width * stream.codec_context.height
    shown, sent, lengths = (np.array([math.nan if v is None else v for v in column], float) for column in zip(*read))
    if not 0 < rate < LONGEST:
        rate = 25.0
    ordered = format not in UNORDERED and usable(shown * base) and not (np.diff(sent) < 0).any()   # False for NaN
    if ordered:
        order = np.argsort(shown, kind="stable")
        times, lengths = shown[order] * base, lengths[order] * base
    elif format not in UNORDERED and usable(filled := before(shown, lengths) * base):
        times, lengths = filled, lengths * base
    elif usable(sent * base) and (np.diff(sent) > 0).all():
        times, lengths = sent * base, lengths * base
    else:
        times, lengths = np.arange(len(read)) / rate, np.full(len(read), 1 / rate)
    last = lengths[-1] if 0 < lengths[-1] < LONGEST else np.median(np.diff(times)) if len(times) > 1 else 0
    zero = min(times[0], max(min(sounds), 0)) if sounds else times[0]   # sound before 0 is what its codec needs ahead
    return Track(path, format, codec, times - zero, float(times[-1] + (last or 1 / rate) - zero),
                 float(zero) if ordered else None, pixels)


def before(shown: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Ascending times of which the first ones are unknown (NaN): those below 0, which Matroska's reader leaves out."""
    unknown = np.isnan(shown)
    count, known = int(unknown.sum()), np.sort(shown[~unknown])
    if not 0 < count <= len(known) or unknown[count + REORDERED:].any():
        return np.full_like(shown, math.nan)
    gap = np.median(np.diff(known)) if len(known) > 1 else lengths[-1]
    return np.concatenate([known[0] - gap * np.arange(count, 0, -1), known])


def usable(times: np.ndarray) -> bool:
    return bool((np.abs(times) < LONGEST).all())     # False for NaN


def hidden(packet: av.Packet, codec: str) -> bool:
    """Whether a packet is a reference frame of VP8 that is never shown. (VP9 has them in the packet of a shown one.)"""
    return codec == "vp8" and not memoryview(packet)[0] & 0x10


def on_display(times: np.ndarray, t: float | np.ndarray) -> np.ndarray:
    """Index of the frame that is shown at time `t`: the latest one that appeared by then, or else the first."""
    return np.maximum(np.searchsorted(times, t + EPSILON, side="right") - 1, 0)


def decoded(track: Track, tick: Callable) -> Iterator[tuple[float, av.VideoFrame]]:
    """All frames in the order in which they are shown, each with the time (seconds) at which it appears.

    Raises the error of a packet that cannot be decoded, since the pictures after it show damage; but not of the last
    one, where a file was cut, nor of those before the first frame, where a recording may begin in the middle.
    """
    fault, count = None, 0
    with av.open(track.path, metadata_errors="ignore") as container:
        stream = video_of(container)
        base = float(stream.time_base)      # multiplied as in survey, so that ties are the same ties
        for packet in chain(packets(container, stream, tick), [None]):     # None: what is held back
            if fault and packet:
                raise fault
            try:
                images = stream.codec_context.decode(packet)
            except av.FFmpegError as error:
                fault = error if count else None
                continue
            for image in images:
                own = track.zero is not None and image.pts is not None
                yield image.pts * base - track.zero if own else track.times[min(count, len(track.times) - 1)], image
                count += 1


def frames(track: Track, moments: Iterable[float], tick: Callable[[], None] = nothing) -> Iterator[np.ndarray]:
    """The picture on display at each of the ascending `moments` (seconds), uint8 RGB (H, W, 3), upright.

    One that is shown at several moments is the same object each time. Raises av.FFmpegError where a packet is
    damaged, Unreadable when more than FAULTS frames before a moment are lost without a word.
    """
    moments, k, last = list(moments), 0, None
    for time, image in chain(decoded(track, tick), [(math.inf, None)]):
        picture = None
        while last and k < len(moments) and time > moments[k] + EPSILON:
            lost = on_display(track.times, moments[k]) - on_display(track.times, last[0])
            if lost > FAULTS:
                raise Unreadable(f"{lost} frames before {moments[k]:.2f} s are lost")
            picture = upright(last[1]) if picture is None else picture
            yield picture
            k += 1
        if k == len(moments):
            return
        last = time, image
    raise Unreadable("none of its frames can be decoded")


def upright(image: av.VideoFrame) -> np.ndarray:
    """RGB (H, W, 3), turned as the file says: phones write how they were held."""
    pixels = image.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(image.rotation / 90)))
