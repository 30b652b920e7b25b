"""video.py: the right frames at the right times, even counts, sizes within the budget, and one clear error a bad file.

    python -m pytest test_video.py
"""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from engine.video import MIN_PIXELS, TOTAL_PIXELS, Clip, VideoError, frame_count, frame_size, load

STEP = 3   # grey levels between one frame and the next: frame i is shown as brightness 20 + 3 * i


def write(path, times, size=(28, 28), clock=1000, codec="libx264", pix_fmt=None, step=STEP, image=None, encoder={},
          **options):
    """Write a video: frame i appears at times[i] seconds, the end is times[-1], its brightness is 20 + step * i."""
    ticks = [round(clock * time) for time in times]
    length = dict(zip(ticks, np.diff(ticks).tolist()))
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=min(clock, 30),
                                      options={"crf": "1", "g": "12", **encoder})   # g: key frames
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt or ("yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p")
        stream.codec_context.time_base = stream.time_base = Fraction(1, clock)
        for i, tick in enumerate([*ticks[:-1], None]):   # None empties the encoder
            frame = None
            if tick is not None:
                pixels = np.full((*size, 3), 20 + step * i, np.uint8) if image is None else image
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = tick, Fraction(1, clock)
            for packet in stream.encode(frame):
                packet.duration = length.get(packet.pts, 1)
                container.mux(packet)
    return path


def shown(clip, step=STEP):
    """Which frames of the file a clip holds."""
    return ((clip.frames.double().mean((1, 2, 3)) - 20) / step).round().int().tolist()


def constant(fps, seconds):
    return np.arange(round(fps * seconds) + 1) / fps


def counted(n, fps=2.0):
    """A clip whose frame i has the value i everywhere."""
    return Clip(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 28, 28), fps)


@pytest.mark.parametrize("duration, available, options, expected", [
    (35.1415, 335, {}, 70),                       # 70.28
    (16, 64, {}, 32),
    (15.99999, 64, {}, 32),                       # a timestamp's rounding costs no pair
    (15.9, 64, {}, 30),                           # 31.8
    (600, 18000, {}, 768),
    (600, 18000, {"max_frames": 101}, 100),
    (10, 300, {"fps": 1.0}, 10),
    (0.5, 15, {}, 4),                             # at least 4
    (60, 31, {}, 30),                             # one frame every two seconds
    (60, 5, {}, 4), (60, 3, {}, 4), (0.033, 1, {}, 4),
])
def test_frame_count(duration, available, options, expected):
    assert frame_count(duration, available, **options) == expected


@pytest.mark.parametrize("height, width, frames, expected", [
    (28, 28, 32, (28, 28)),                       # small frames stay small
    (50, 66, 4, (56, 56)),                        # 1.8 and 2.4 patches
    (10, 300, 4, (28, 308)),
    (360, 640, 70, (140, 252)),                   # 40,141 pixels a frame: 360 x 640 / 2.396 = 150.3 x 267.1
    (224, 224, 768, (112, 112)),                  # the floor, 12,544 pixels a frame
    (448, 448, 14, (448, 448)),                   # exactly the budget
])
def test_frame_size(height, width, frames, expected):
    assert frame_size(height, width, frames) == expected


def test_frame_size_is_within_the_budget_and_never_enlarges():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(2 ** x) for x in rng.uniform(0, 13, 2))   # 1 to 8192, all shapes
        frames = int(rng.integers(2, 385)) * 2
        h, w = frame_size(height, width, frames)
        assert h % 28 == w % 28 == 0 and h >= 28 and w >= 28
        assert h * w <= max(TOTAL_PIXELS / frames, MIN_PIXELS)
        assert h <= max(height + 14, 28) and w <= max(width + 14, 28)


@pytest.mark.parametrize("start, end, first, last", [
    (2.0, 4.0, 4, 8),
    (2.1, 4.2, 4, 8),                             # nearest frames
    (2.0, 4.4, 4, 10),                            # 9 would be odd: one more
    (0, 10, 0, 20), (-3, 99, 0, 20),              # the whole clip, and more
    (8.5, 10.0, 16, 20),                          # odd at the end: one more before
    (3.0, 3.0, 6, 8), (3.0, 3.1, 6, 8),           # at least one pair
    (0.0, 0.0, 0, 2), (10.0, 10.0, 18, 20),
    (12.0, 15.0, 18, 20), (-5.0, -1.0, 0, 2),     # outside
    (5.0, 4.0, 10, 12),
])
def test_cut(start, end, first, last):
    segment = counted(20).cut(start, end)
    assert segment.frames[:, 0, 0, 0].tolist() == list(range(first, last))
    assert segment.fps == 2.0 and segment.duration == (last - first) / 2


def test_cut_always_gives_pairs():
    clip = counted(14, fps=1.931)
    for start in np.linspace(-1, 9, 41):
        for length in np.linspace(0, 9, 37):
            n = len(clip.cut(start, start + length).frames)
            assert n >= 2 and n % 2 == 0


def test_grey_has_the_same_shape_and_shows_nothing():
    clip = counted(6)
    assert clip.grey().frames.shape == clip.frames.shape and clip.grey().fps == clip.fps
    assert clip.grey().frames.unique().tolist() == [128] and clip.grey().frames.dtype == torch.uint8


def test_a_key_says_what_the_frames_show(tmp_path):
    path = write(tmp_path / "a.mp4", constant(4, 16))
    key = load(path, 3.0, end=9.0, fps=1.0, total_pixels=10 ** 6, max_frames=8).key
    assert key == (str(path), 3.0, 9.0, 1.0, 10 ** 6, MIN_PIXELS, 8)
    clip = Clip(counted(20).frames, 2.0, key)
    assert clip.cut(2.0, 4.4).key == (*key, 4, 10) and clip.cut(2.1, 4.2).key == clip.cut(2.0, 4.0).key
    assert clip.grey().key == (*key, "grey") and clip.grey().cut(2.0, 4.0).key == (*key, "grey", 4, 8)
    assert counted(20).key is counted(20).cut(2.0, 4.0).key is counted(20).grey().key is None


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])   # the AVI has no usable timestamps
def test_constant_rate_is_sampled_exactly(tmp_path, name):
    path = write(tmp_path / name, constant(4, 16), clock=4)
    clip = load(path)
    assert clip.frames.shape == (32, 3, 28, 28) and clip.frames.dtype == torch.uint8
    assert shown(clip) == list(range(0, 64, 2))
    assert clip.fps == 2 and clip.duration == 16
    assert shown(load(path, fps=0.5)) == list(range(0, 64, 8))
    assert shown(load(path, start=10.0, end=15.0)) == list(range(40, 60, 2))


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    path = write(tmp_path / "a.mp4", np.arange(-2, 41) / 4)   # its muxer hides the frames before 0
    with av.open(str(path)) as file:
        assert round((next(file.decode(video=0)).to_ndarray(format="rgb24").mean() - 20) / STEP) == 2
    clip = load(path)
    assert clip.duration == 10 and shown(clip) == list(range(2, 42, 2))
    assert shown(load(path, start=5.0)) == list(range(22, 42, 2))


CODECS = [("a.mp4", "libsvtav1", "yuv420p", {}), ("a.mkv", "libsvtav1", "yuv420p10le", {}),
          ("a.mp4", "libx264", "yuv420p10le", {}),
          ("a.mp4", "libx265", "yuv420p10le", {}), ("a.mkv", "libx265", "yuv420p", {}),
          ("a.webm", "libvpx-vp9", "yuv420p", {}),
          ("a.mp4", "mpeg4", "yuv420p", {"bf": "2", "qmax": "2"}),
          ("a.avi", "mpeg4", "yuv420p", {"bf": "2", "qmax": "2"})]


@pytest.mark.parametrize("name, codec, pix_fmt, encoder", CODECS)
def test_frames_are_right_in_every_codec(tmp_path, name, codec, pix_fmt, encoder):
    quiet = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "10"}}.get(codec, {})
    path = write(tmp_path / name, constant(4, 10), (64, 64), 4, codec, pix_fmt, 6, encoder={**encoder, **quiet})
    assert shown(load(path), 6) == list(range(0, 40,
                                              2))   # even ones: AV1 in 10 bits blurs each odd frame into the one before
    assert shown(load(path, fps=1), 6) == list(range(0, 40, 4))
    assert shown(load(path, fps=0.4), 6) == [0, 10, 20, 30]   # across key frames
    assert shown(load(path, start=5.0, end=9.0), 6) == list(range(20, 36, 2))


@pytest.mark.parametrize("width", [16, 24, 32, 48, 96, 144, 30, 45, 100])   # of the first six decord pads the rows
def test_narrow_and_odd_widths(tmp_path, width):
    image = np.zeros((64, width, 3), np.uint8)
    image[:, width // 2:] = 200
    clip = load(write(tmp_path / "a.mp4", constant(4, 1), (64, width), image=image))
    middle = clip.frames[..., 28, :].double()
    assert middle[..., :clip.frames.shape[-1] // 4].mean() < 20 and middle[...,
                                                                           -clip.frames.shape[-1] // 4:].mean() > 180


@pytest.mark.parametrize("matrix, corners", [((0, 1, -1, 0), "CADB"), ((-1, 0, 0, -1), "DCBA"),
                                             ((0, -1, 1, 0), "BDAC")])
def test_rotation_written_in_the_file_is_applied(tmp_path, matrix, corners):
    grey = {"A": 20, "B": 90, "C": 160, "D": 230}   # A B over C D
    image = np.kron([[20, 90], [160, 230]], np.ones((56, 84)))[..., None].repeat(3, -1).astype(np.uint8)
    path = write(tmp_path / "a.mp4", constant(4, 2), image.shape[:2], image=image)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40   # the display matrix of the track header
    a, b, c, d = (value << 16 for value in matrix)
    data[place:place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frame = load(path).frames[0, 0].int()
    assert frame.shape == ((112, 168) if corners == "DCBA" else (168, 112))
    for corner, (y, x) in zip(corners, [(5, 5), (5, -5), (-5, 5), (-5, -5)]):
        assert abs(frame[y, x] - grey[corner]) < 5


@pytest.mark.parametrize("name, fps, seconds", [("a.mp4", 9.5329, 7.5), ("a.mkv", 12.5, 5.1), ("a.mp4", 29.97, 2.4)])
def test_frame_is_the_one_on_display(tmp_path, name, fps, seconds):
    times = constant(fps, seconds)
    clip = load(write(tmp_path / name, times))
    assert clip.duration == pytest.approx(times[-1], abs=2e-3)
    for i, frame in enumerate(shown(clip)):
        assert times[frame] <= i / clip.fps + 2e-3 and i / clip.fps < times[frame + 1] + 2e-3


def test_variable_rate_follows_the_timestamps(tmp_path):
    times = [*np.arange(40) / 10, *range(4, 13)]   # 10 a second, then 1 a second
    clip = load(write(tmp_path / "a.mp4", times))
    assert clip.fps == 2 and clip.duration == 12
    assert shown(clip) == [0, 5, 10, 15, 20, 25, 30, 35, *np.repeat(range(40, 48), 2)]


def test_part_of_a_file(tmp_path):
    path = write(tmp_path / "a.mp4", constant(4, 16))
    clip = load(path, start=3.0, end=9.0)
    assert shown(clip) == list(range(12, 36, 2)) and clip.fps == 2
    assert shown(load(path, start=12.0, end=99.0)) == list(range(48, 64, 2))
    assert shown(load(path, end=4.0)) == list(range(0, 16, 2))
    short = load(path, start=3.0, end=3.5)                     # two frames of the file, repeated
    assert shown(short) == [12, 12, 13, 13] and short.duration == 0.5
    for start, end in [(16.0, 20.0), (5.0, 5.0), (6.0, 5.0)]:
        with pytest.raises(VideoError, match="a.mp4.*lasts 16.00 s"):
            load(path, start=start, end=end)


def test_options_limit_frames_and_pixels(tmp_path):
    path = write(tmp_path / "a.mp4", constant(4, 16), size=(120, 160))
    assert load(path, fps=1.0).frames.shape == (16, 3, 112, 168)
    assert shown(load(path, max_frames=8)) == list(range(0, 64, 8))
    assert load(path, total_pixels=32 * 4 * 784, min_pixels=4 * 784).frames.shape == (32, 3, 28, 56)


def test_one_frame_is_repeated(tmp_path):
    clip = load(write(tmp_path / "a.mp4", [0.0, 0.04]))
    assert shown(clip) == [0, 0, 0, 0] and clip.duration == pytest.approx(0.04)


@pytest.mark.parametrize("size, expected", [((45, 77), (56, 84)), ((50, 66), (56, 56)), ((360, 640), (280, 504))])
def test_constant_colour_survives_resizing(tmp_path, size, expected):
    clip = load(write(tmp_path / "a.mp4", constant(10, 2), size), total_pixels=4 * 200 * 784)
    assert clip.frames.shape == (4, 3, *expected) and shown(clip) == [0, 5, 10, 15]
    assert (clip.frames.amax((2, 3)) - clip.frames.amin((2, 3))).max() <= 2
    assert clip.frames.is_contiguous()


def broken(folder, kind):
    path = folder / f"{kind}.mp4"
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not a video")
    elif kind != "missing":
        options = {} if kind == "no index" else {"movflags": "faststart"}   # index at the front: opens, then breaks
        data = write(path, constant(4, 16), size=(64, 64), **options).read_bytes()
        media = data.index(b"mdat") + 4
        middle = (media + len(data)) // 2
        path.write_bytes(data[:middle] + (b"\xff" * (len(data) - middle) if kind == "overwritten" else b""))
    return path


@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "no index", "overwritten"])
def test_bad_files_raise_one_line_that_names_them(tmp_path, kind):
    path = broken(tmp_path, kind)
    with pytest.raises(VideoError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="a.mp4: is not a regular file"):
        load(tmp_path / "a.mp4")
