"""video.py: the right frames at the right times, even counts, sizes within the budget, one clear error per bad file."""
import os
import struct

import av
import numpy as np
import pytest
import torch
from made_videos import STEP, broken, constant, counted, shown, write

from engine import video
from engine.video import Clip, VideoError, beyond, frame_count, frame_size, load


@pytest.mark.parametrize("duration, available, expected", [
    (35.1415, 335, 70),                     # 70.28
    (15.99999, 64, 32),                     # a timestamp's rounding costs no pair
    (15.9, 64, 30),                         # 31.8
    (600, 18000, 768),
    (60, 31, 30),                           # one frame every two seconds
    (0.5, 15, 4), (60, 3, 4),               # at least 4
])
def test_frame_count(duration, available, expected):
    assert frame_count(duration, available) == expected


@pytest.mark.parametrize("height, width, frames, expected", [
    (28, 28, 32, (28, 28)),                 # small frames stay small
    (50, 66, 4, (56, 56)),                  # 1.8 and 2.4 patches
    (10, 300, 4, (28, 308)),
    (360, 640, 70, (140, 252)),             # 40,141 pixels: 360 x 640 / 2.396 = 150.3 x 267.1
    (224, 224, 768, (112, 112)),            # the floor, 12,544 pixels per frame
    (448, 448, 14, (448, 448)),             # exactly the budget
])
def test_frame_size(height, width, frames, expected):
    assert frame_size(height, width, frames) == expected


def test_frame_size_keeps_the_budget_and_never_enlarges():
    rng = np.random.default_rng(0)
    for _ in range(500):
        height, width = (2 ** rng.uniform(0, 13, 2)).astype(int)        # 1 to 8192, all shapes
        frames = int(rng.integers(2, 385)) * 2
        h, w = frame_size(height, width, frames)
        assert h % 28 == w % 28 == 0 and h * w <= max(3584 * 784 / frames, 16 * 784)
        assert 28 <= h <= max(height + 14, 28) and 28 <= w <= max(width + 14, 28)


@pytest.mark.parametrize("start, end, first, stop", [
    (2.1, 4.2, 4, 8),                       # nearest frames
    (2.0, 4.4, 4, 10), (2.3, 4.0, 5, 9),    # odd: one more
    (8.5, 10.0, 16, 20),                    # odd at the end: one more before
    (-3, 99, 0, 20),                        # the whole clip
    (3.0, 3.1, 6, 8), (10.0, 10.0, 18, 20),         # at least one pair
    (12.0, 15.0, 18, 20), (-5.0, -1.0, 0, 2),       # outside
    (5.0, 4.0, 10, 12),
])
def test_cut(start, end, first, stop):
    segment = counted(20).cut(start, end)
    assert segment.frames[:, 0, 0, 0].tolist() == list(range(first, stop))
    assert segment.fps == 2.0 and segment.duration == (stop - first) / 2


def test_grey_has_the_same_shape_and_shows_nothing():
    clip = counted(6, fps=1.5)
    grey = clip.grey()
    assert grey.frames.shape == clip.frames.shape and grey.fps == clip.fps
    assert grey.frames.unique().tolist() == [128] and grey.frames.dtype == torch.uint8


def test_a_key_says_what_the_frames_show(tmp_path):
    path = write(tmp_path / "a.mp4", constant(4, 16))
    key = load(path, 3.0, end=9.0, total_pixels=10 ** 6).key
    assert key == (str(path), 3.0, 9.0, 10 ** 6)
    clip = Clip(counted(20).frames, 2.0, key)
    assert clip.cut(2.0, 4.4).key == (*key, 4, 10)
    assert clip.cut(2.1, 4.2).key == clip.cut(2.0, 4.0).key
    assert clip.grey().cut(2.0, 4.0).key == (*key, "grey", 4, 8)
    assert counted(20).cut(2.0, 4.0).key is None


def test_a_clip_holds_what_begins_in_it_and_ends_in_it_or_little_later():
    assert beyond(10.0, 9.9, 12.0, slack=2.0) == ""
    assert beyond(10.0, 10.0, 11.0, slack=2.0).startswith("10.00 s of video, so nothing from 10 to 11")
    assert beyond(10.0, 9.0, 12.1, slack=2.0) != ""


@pytest.mark.parametrize("name, codec, pix_fmt, encoder", [
    ("a.mp4", "libx264", "yuv420p", {}),
    ("a.mkv", "libx264", "yuv420p10le", {}),
    ("a.avi", "libx264", "yuv420p", {}),                            # has no usable times
    ("a.mp4", "libsvtav1", "yuv420p", {"preset": "10"}),
    ("a.mkv", "libsvtav1", "yuv420p10le", {"preset": "10"}),
    ("a.mp4", "libx265", "yuv420p10le", {"x265-params": "log-level=none"}),
    ("a.mkv", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
    ("a.webm", "libvpx-vp9", "yuv420p", {}),
    ("a.mp4", "mpeg4", "yuv420p", {"bf": "2", "qmax": "2"}),
    ("a.avi", "mpeg4", "yuv420p", {"bf": "2", "qmax": "2"})])
def test_frames_are_right_in_every_codec(tmp_path, monkeypatch, name, codec, pix_fmt, encoder):
    """Even ones: AV1 in 10 bits blurs each odd frame into the one before."""
    path = write(tmp_path / name, constant(4, 10), (64, 64), 4, codec, pix_fmt, 6, encoder=encoder)
    clip = load(path)
    assert clip.frames.shape == (20, 3, 56, 56) and clip.frames.dtype == torch.uint8
    assert shown(clip, 6) == list(range(0, 40, 2))
    assert clip.fps == 2 and clip.duration == 10
    assert shown(load(path, start=5.0, end=9.0), 6) == list(range(20, 36, 2))
    monkeypatch.setattr(video, "MAX_FRAMES", 5)
    assert shown(load(path), 6) == [0, 10, 20, 30]          # across key frames


def test_frames_hidden_by_an_edit_list_are_not_counted(tmp_path):
    path = write(tmp_path / "a.mp4", np.arange(-2, 41) / 4)     # its muxer hides the frames before 0
    with av.open(str(path)) as file:
        first = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert round((first.mean() - 20) / STEP) == 2
    clip = load(path)
    assert clip.duration == 10 and shown(clip) == list(range(2, 42, 2))
    assert shown(load(path, start=5.0)) == list(range(22, 42, 2))


@pytest.mark.parametrize("width", [16, 48, 144, 45, 100])    # of the first three decord pads the rows
def test_narrow_and_odd_widths(tmp_path, width):
    image = np.zeros((64, width, 3), np.uint8)
    image[:, width // 2:] = 200
    clip = load(write(tmp_path / "a.mp4", constant(4, 1), (64, width), image=image))
    line = clip.frames[..., 28, :].double()                 # (T, 3, W)
    quarter = line.shape[-1] // 4
    assert line[..., :quarter].mean() < 20 and line[..., -quarter:].mean() > 180


@pytest.mark.parametrize("by_decord", [True, False])
@pytest.mark.parametrize("matrix, corners", [((0, 1, -1, 0), "CADB"), ((0, -1, 1, 0), "BDAC")])
def test_rotation_written_in_the_file_is_applied(tmp_path, monkeypatch, matrix, corners, by_decord):
    grey = {"A": 20, "B": 90, "C": 160, "D": 230}           # A B over C D
    image = np.kron([[20, 90], [160, 230]], np.ones((56, 84)))      # (112, 168)
    image = image[..., None].repeat(3, -1).astype(np.uint8)         # (112, 168, 3)
    path = write(tmp_path / "a.mp4", constant(4, 2), image.shape[:2], image=image)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40                 # the display matrix of the track header
    a, b, c, d = (value << 16 for value in matrix)
    content[place:place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    if not by_decord:
        monkeypatch.setattr(video, "decord_reader", lambda track: None)
    frame = load(path).frames[0, 0].int()
    assert frame.shape == (168, 112)
    for corner, (y, x) in zip(corners, [(5, 5), (5, -5), (-5, 5), (-5, -5)]):
        assert abs(frame[y, x] - grey[corner]) < 5


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_frame_is_the_one_on_display(tmp_path, name):
    times = [*np.arange(40) / 9.53, *np.arange(4.5, 13)]    # 9.53 per second, then 1 per second
    clip = load(write(tmp_path / name, times))
    assert clip.fps == 1.92 and clip.duration == 12.5
    for i, frame in enumerate(shown(clip)):
        assert times[frame] - 2e-3 <= i / clip.fps < times[frame + 1] + 2e-3


def test_from_start_to_end(tmp_path):
    path = write(tmp_path / "a.mp4", constant(4, 16))
    assert shown(load(path, start=12.0, end=99.0)) == list(range(48, 64, 2))
    assert shown(load(path, end=4.0)) == list(range(0, 16, 2))
    short = load(path, start=3.0, end=3.5)                  # two frames of the file, repeated
    assert shown(short) == [12, 12, 13, 13] and short.duration == 0.5
    for start, end in [(16.0, 20.0), (5.0, 5.0)]:
        with pytest.raises(VideoError, match="a.mp4.*lasts 16.00 s"):
            load(path, start, end)


def test_one_frame_is_repeated(tmp_path):
    clip = load(write(tmp_path / "a.mp4", [0.0, 0.04]))
    assert shown(clip) == [0, 0, 0, 0] and clip.duration == pytest.approx(0.04)


def test_fine_stripes_become_grey_where_the_budget_makes_a_frame_smaller(tmp_path):
    image = np.zeros((360, 640, 3), np.uint8)
    image[:, ::2] = 200
    path = write(tmp_path / "a.mp4", constant(4, 2), (360, 640), image=image, pix_fmt="yuv444p")
    frames = load(path, total_pixels=4 * 50 * 784).frames
    assert frames.shape == (4, 3, 140, 252) and frames.is_contiguous()
    assert frames[..., 9:-9].min() > 70 and frames[..., 9:-9].max() < 130


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


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)     # root may read all
    with pytest.raises(VideoError, match="a.mp4: may not be read by this user; change its perm"):
        load(tmp_path / "a.mp4")
