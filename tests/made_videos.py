"""Videos that the tests make: the brightness of a frame tells which one it is."""
from fractions import Fraction

import av
import numpy as np
import torch

from engine.video import Clip

STEP = 3   # grey levels between one frame and the next: frame i is shown as brightness 20 + 3 * i


def write(path, times, size=(28, 28), clock=1000, codec="libx264", pix_fmt=None, step=STEP,
          image=None, encoder=None, **options):
    """Write a video: frame i appears at times[i] seconds, the end is times[-1].

    Its frames show `image` or else the brightness 20 + step * i. clock: units of time per second; encoder: FFmpeg's
    options for the codec; options: those for the container.
    """
    ticks = [round(clock * time) for time in times]
    lengths = dict(zip(ticks, np.diff(ticks).tolist()))
    with av.open(str(path), "w", options=options) as container:
        settings = {"crf": "1", "g": "12", **(encoder or {})}       # g: frames from key to key
        stream = container.add_stream(codec, rate=min(clock, 30), options=settings)
        stream.height, stream.width = size
        odd = size[0] % 2 or size[1] % 2
        stream.pix_fmt = pix_fmt or ("yuv444p" if odd else "yuv420p")
        stream.codec_context.time_base = stream.time_base = Fraction(1, clock)
        packets = []
        for i, tick in enumerate(ticks[:-1]):
            pixels = np.full((*size, 3), 20 + step * i, np.uint8) if image is None else image
            packets += encode(stream, pixels, tick, clock)
        packets += stream.encode(None)
        for packet in packets:
            packet.duration = lengths.get(packet.pts, 1)
            container.mux(packet)
    return path


def encode(stream, pixels, tick, clock):
    """The packets that an encoder gives for one more frame, (h, w, 3)."""
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame.pts = tick
    frame.time_base = Fraction(1, clock)
    return stream.encode(frame)


def shown(clip, step=STEP):
    """Which frames of the file a clip holds."""
    brightness = clip.frames.double().mean((1, 2, 3))       # (T,)
    return ((brightness - 20) / step).round().int().tolist()


def constant(fps, seconds):
    """The times of a video with so many frames per second."""
    return np.arange(round(fps * seconds) + 1) / fps


def counted(n, fps=2.0):
    """A clip whose frame i has the value i everywhere."""
    values = torch.arange(n, dtype=torch.uint8)
    return Clip(values.view(n, 1, 1, 1).expand(n, 3, 28, 28), fps)      # (n, 3, 28, 28)


def broken(folder, kind):
    """A file, or none, that is no video in a way that `kind` tells."""
    path = folder / f"{kind}.mp4"
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not a video")
    else:
        # with the index in front, the file opens and breaks later
        options = {} if kind == "no index" else {"movflags": "faststart"}
        content = write(path, constant(4, 16), size=(64, 64), **options).read_bytes()
        middle = (content.index(b"mdat") + 4 + len(content)) // 2
        damage = b"\xff" * (len(content) - middle) if kind == "overwritten" else b""
        path.write_bytes(content[:middle] + damage)
    return path
