"""When frames are shown: files cut short, late tracks, hidden frames, any format, damage."""
import itertools
import math
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from made_videos import constant, encode, shown, write

import tasks
from data import Sample
from engine import video, video_times
from engine.video import VideoError, load

VP9 = {"codec": "libvpx-vp9", "encoder": {"cpu-used": "8", "b": "0"}}
NAN = math.nan


@pytest.fixture
def ten_fps(monkeypatch):
    """`load` gives ten frames per second, all that these videos have."""
    monkeypatch.setattr(video, "FPS", 10.0)


def cut_short(path, **options):
    """8 s at 10 fps, of which 45 frames and half of the next one are left."""
    write(path, constant(10, 8), (64, 64), step=2, **options)
    with av.open(str(path)) as file:
        packet = next(itertools.islice(file.demux(video=0), 45, None))
        place = packet.pos + packet.size // 2
    path.write_bytes(path.read_bytes()[:place])
    return path


def with_sound(path, first, codec="aac", picture="libx264"):
    """A video of 2 s at 10 fps, whose first frame comes `first` seconds after the beginning of 10 s of sound."""
    with av.open(str(path), "w") as file:
        pictures = file.add_stream(picture, rate=10, options={"crf": "1", "g": "12", "qmax": "2"})
        pictures.width = pictures.height = 64
        tones = file.add_stream(codec, rate=48000)
        packets = []
        for i in range(20):
            pixels = np.full((64, 64, 3), 20 + 6 * i, np.uint8)
            packets += encode(pictures, pixels, i + round(10 * first), 10)
        packets += pictures.encode(None)
        size = tones.codec_context.frame_size or 1024
        for i in range(0, 480_000, size):
            packets += silence(tones, i, size)
        packets += tones.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)
    return path


def silence(tones, tick, size):
    frame = av.AudioFrame.from_ndarray(np.zeros((2, size), np.float32), "fltp", "stereo")
    frame.sample_rate = 48000
    frame.pts = tick
    frame.time_base = Fraction(1, 48000)
    return tones.encode(frame)


@pytest.mark.parametrize("name, options", [
    ("a.mp4", {"movflags": "faststart"}), ("a.mkv", {}), ("a.avi", {}), ("a.ts", {}), ("a.webm", VP9)])
def test_a_file_cut_short_has_the_frames_that_are_left_at_their_times(tmp_path, ten_fps, name, options):
    clip = load(cut_short(tmp_path / name, **options))
    assert clip.duration == pytest.approx(4.5, abs=1e-3) and len(clip.frames) == 44
    expected = np.floor(np.arange(44) / clip.fps * 10 + 0.01)
    assert np.abs(np.array(shown(clip, 2)) - expected).max() <= 1


@pytest.mark.parametrize("name", tasks.TASKS)
def test_no_task_gets_a_segment_that_the_file_does_not_hold(tmp_path, name):
    """Its times count from the beginning of the part of the file that is meant."""
    path = write(tmp_path / "a.mp4", constant(4, 16))
    encoder = SimpleNamespace(encode=lambda text, clip: clip)

    def prepare(start, end):
        sample = Sample("a:1", str(path), "a person opens the door.", start, end, None, 10.0, 20.0)
        return tasks.prepare(sample, tasks.TASKS[name], encoder, load)

    assert len(prepare(5.0, 10.0).frames) > 0
    with pytest.raises(VideoError, match="a.mp4: has 6.00 s of video, so nothing from 7 to 8 s"):
        prepare(7.0, 8.0)


@pytest.mark.parametrize("name, codec, picture", [
    ("a.mp4", "aac", "libx264"), ("a.mkv", "aac", "libx264"), ("a.mov", "aac", "mpeg4"),
    ("a.ts", "aac", "libx264"), ("a.flv", "aac", "libx264"), ("a.webm", "libopus", "libvpx-vp9")])
def test_a_video_that_starts_after_the_sound_keeps_its_time(tmp_path, monkeypatch, name, codec, picture):
    monkeypatch.setattr(video, "FPS", 5.0)
    clip = load(with_sound(tmp_path / name, 2.0, codec, picture))
    assert clip.duration == pytest.approx(4.0, abs=0.06)        # some sounds begin a little before 0
    frames = np.array(shown(clip, 6))
    assert (frames[:11] == 0).all()
    assert np.abs(frames - np.maximum(2 * np.arange(20) - 20, 0)).max() <= 1


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_video_that_starts_with_the_sound_starts_at_0_and_ends_before_it(tmp_path, ten_fps, name):
    path = with_sound(tmp_path / name, 0.0)
    with av.open(str(path)) as file:
        assert file.duration / 1e6 > 9.9
    assert shown(load(path), 6) == list(range(20))


@pytest.mark.parametrize("name, codec, encoder", [
    ("a.ts", "libx264", {}), ("b.ts", "mpeg2video", {"bf": "2"}), ("a.wmv", "wmv2", {}),
    ("a.h264", "libx264", {}), ("a.hevc", "libx265", {"x265-params": "log-level=none"}),
    ("a.mpg", "mpeg1video", {"bf": "2"}), ("a.flv", "libx264", {}), ("a.avi", "mpeg4", {"bf": "2"}),
    ("a.webm", "libvpx", {"b": "2M", "crf": "4", "cpu-used": "8"}), ("a.3gp", "mpeg4", {})])
def test_every_frame_of_other_formats(tmp_path, monkeypatch, name, codec, encoder):
    monkeypatch.setattr(video, "FPS", 25.0)
    if codec != "libvpx":
        encoder = {"qmin": "1", "qmax": "2", **encoder}
    path = write(tmp_path / name, constant(25, 1.2), (64, 64), 25, codec, step=7, encoder=encoder)
    clip = load(path)
    assert clip.duration == pytest.approx(1.2, abs=1e-3) and shown(clip, 7) == list(range(30))
    assert shown(load(path, start=0.4, end=0.8), 7) == list(range(10, 20))


def test_negative_times_in_matroska(tmp_path, ten_fps):
    path = write(tmp_path / "a.mkv", np.arange(-4, 41) / 10, avoid_negative_ts="disabled")
    clip = load(path)
    assert clip.duration == pytest.approx(4.4) and shown(clip) == list(range(44))


def test_reference_frames_that_are_never_shown(tmp_path, ten_fps):
    """A key frame of VP8 stands a second time behind itself, marked as not to be shown: it changes no picture."""
    plain = write(tmp_path / "a.webm", constant(10, 3), (64, 64), codec="libvpx", step=7,
                  encoder={"cpu-used": "8", "b": "2M", "crf": "4", "g": "5"})
    path = tmp_path / "b.webm"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size == 0:
                continue
            content = bytes(packet)
            when = packet.pts
            packet.stream = track
            target.mux(packet)
            if packet.is_keyframe:
                hidden = av.Packet(bytes([content[0] & ~0x10]) + content[1:])
                hidden.pts = hidden.dts = when + 1
                hidden.time_base = Fraction(1, 1000)
                hidden.stream = track
                target.mux(hidden)
    with av.open(str(path)) as file:
        assert sum(packet.size > 0 for packet in file.demux(video=0)) == 36
    assert np.allclose(video_times.survey(str(path)).times, np.arange(30) / 10, atol=1e-3)
    clip = load(path)
    assert shown(clip, 7) == list(range(30)) and clip.duration == pytest.approx(3.0)


@pytest.mark.parametrize("name, codec, by_decord", [
    ("a.mp4", "libx264", True), ("a.mkv", "libx264", True), ("a.webm", "libvpx-vp9", False),
    ("a.ts", "libx264", False), ("a.wmv", "wmv2", False)])
def test_times_and_pictures_are_those_that_pyav_decodes(tmp_path, name, codec, by_decord):
    rng = np.random.default_rng(5)
    times = np.concatenate([[0], np.cumsum(rng.integers(2, 20, 40))]) / 50
    path = str(write(tmp_path / name, times, clock=50, codec=codec, size=(32, 32), step=5))
    with av.open(path) as file:
        images = list(file.decode(video=0))
    truth = [image.to_ndarray(format="rgb24") for image in images]
    track = video_times.survey(path)
    assert np.allclose(track.times, [image.time - images[0].time for image in images], atol=1e-6)
    assert np.allclose(track.times, times[:-1], atol=2e-3)
    middles = (track.times + np.append(track.times[1:], track.end)) / 2
    pictures = list(video_times.frames(track, np.repeat(middles, 2)))
    assert np.array_equal(pictures[::2], truth)
    assert all(one is other for one, other in zip(pictures[::2], pictures[1::2]))
    reader = video.decord_reader(track)
    assert (reader is not None) == by_decord
    if reader:
        frames = video.decord_frames(reader, np.arange(40), video_times.nothing)
        assert np.array_equal(list(frames), truth)


def test_decord_is_trusted_only_where_it_lists_the_same_frames_and_times(tmp_path, monkeypatch):
    track = video_times.survey(str(write(tmp_path / "a.mp4", constant(10, 3), (64, 64))))
    listed = track.times

    class Reader:
        def __init__(self, *args, **options):
            pass

        def __len__(self):
            return len(listed)

        def get_frame_timestamp(self, index):
            return np.stack([listed, listed + 0.1], 1)      # (N, 2)

    monkeypatch.setattr(video.decord, "VideoReader", Reader)
    assert video.decord_reader(track)
    listed = track.times + 0.3                              # another time 0
    assert video.decord_reader(track)
    listed = np.append(track.times, 3.0)
    assert video.decord_reader(track) is None
    listed = track.times * 1.1
    assert video.decord_reader(track) is None


@pytest.mark.parametrize("shown_at, sent_at, more, times, end, zero", [
    ([2, 4, 3], [0, 1, 2], {}, [0, 1, 2], 3, 2),                            # decoded in another order
    ([2, 4, 3], [0, 1, 2], {"duration": 0.5}, [0, 1, 2], 2.5, 2),
    ([2, 3], [2, 3], {"sounds": [1.5, 0.5]}, [1.5, 2.5], 3.5, 0.5),         # the first sound
    ([2, 3], [2, 3], {"sounds": [2.5]}, [0, 1], 2, 2),
    ([2, 3], [2, 3], {"sounds": [-0.3]}, [2, 3], 4, 0),                     # before 0: not played
    ([-2, -1], [-2, -1], {"sounds": [-0.1]}, [0, 1], 2, -2),
    ([NAN, NAN, 0, 1], [NAN, NAN, 0, 1], {"format": "matroska,webm"}, [0, 1, 2, 3], 4, None),
    ([0, NAN, NAN], [NAN] * 3, {"rate": 5}, [0, 0.2, 0.4], 0.6, None),      # most are unknown
    ([0, *[1] * 40, NAN], [NAN] * 42, {"rate": 5}, np.arange(42) / 5, 8.4, None),   # the last one is
    ([10, 11, 0, 1], [10, 11, 0, 1], {"rate": 5}, [0, 0.2, 0.4, 0.6], 0.8, None),   # starts again
    ([0.5, 0.3, 0.4], [0, 1, 2], {"format": "avi"}, [0, 1, 2], 3, None),
    ([NAN] * 3, [NAN] * 3, {"format": "h264"}, [0, 0.04, 0.08], 0.12, None),    # 25 fps if none is told
    ([2**60, 0], [0, 0.1], {"rate": 1e9}, [0, 0.1], 0.2, None),
    ([0.7], [0.7], {"rate": 4}, [0], 0.25, 0.7)])
def test_times_are_used_if_they_make_sense(shown_at, sent_at, more, times, end, zero):
    durations = [more.get("duration", 0)] * len(shown_at)
    packets = np.array([shown_at, sent_at, durations], float).T     # (N, 3)
    timeline = video_times.timeline(more.get("format", "mpegts"), packets, more.get("rate", 25.0),
                                    more.get("sounds", []))
    assert np.allclose(timeline[0], times) and timeline[1] == pytest.approx(end)
    assert timeline[2] == (None if zero is None else pytest.approx(zero))


def test_a_file_of_sound_has_no_video_track(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        tones = file.add_stream("aac", rate=48000)
        file.mux([*silence(tones, 0, 1024), *tones.encode(None)])
    with pytest.raises(VideoError, match="a.mp4: cannot be decoded .it has no video track; the file"):
        load(tmp_path / "a.mp4")


def test_many_lost_frames_are_a_broken_file_and_few_are_not(tmp_path, monkeypatch):
    path = write(tmp_path / "a.ts", constant(10, 3), (64, 64), step=6)
    track = video_times.survey(str(path))
    images = list(video_times.decoded(track, video_times.nothing))

    def lose(count):
        left = images[:10] + images[10 + count:]
        monkeypatch.setattr(video_times, "decoded", lambda track, tick: iter(left))

    lose(3)
    assert len(list(video_times.frames(track, [0.5, 1.25, 2.0]))) == 3
    lose(6)
    with pytest.raises(video_times.Unreadable, match="frames before 1.55 s are lost"):
        list(video_times.frames(track, [0.5, 1.55]))
    images.clear()
    with pytest.raises(VideoError, match="none of its frames can be decoded"):
        lose(0)
        load(path)


def damaged(path, number):
    """A video of 30 frames, of which one cannot be decoded."""
    write(path, constant(10, 3), (64, 64), step=6, **VP9)
    with av.open(str(path)) as file:
        content = bytes(next(itertools.islice(file.demux(video=0), number, None)))
    head, _, tail = path.read_bytes().rpartition(content)       # equal ones come before it
    path.write_bytes(head + bytes(len(content)) + tail)
    return path


def test_a_damaged_packet_breaks_what_comes_after_it(tmp_path, ten_fps):
    path = damaged(tmp_path / "a.webm", 12)
    assert shown(load(path, end=1.0), 6) == list(range(10))
    with pytest.raises(VideoError, match="a.webm: cannot be decoded .Invalid data"):
        load(path)


def test_a_damaged_last_packet_costs_one_frame(tmp_path, ten_fps):
    clip = load(damaged(tmp_path / "a.webm", 29))
    assert shown(clip, 6) == [*range(29), 28]


def test_where_decord_fails_pyav_goes_on(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", constant(10, 3), (64, 64), step=6)
    expected = load(path).frames
    decord_frames = video.decord_frames

    def failing(*args):
        yield from itertools.islice(decord_frames(*args), 3)
        raise RuntimeError("decord")

    monkeypatch.setattr(video, "decord_frames", failing)
    assert load(path).frames.equal(expected)


@pytest.mark.parametrize("limit", ["DECORD_PIXELS", "DECORD_BYTES"])
def test_decord_opens_no_video_that_is_too_large_for_it(tmp_path, monkeypatch, limit):
    track = video_times.survey(str(write(tmp_path / "a.mp4", constant(10, 3), (64, 64))))
    assert video.decord_reader(track)
    monkeypatch.setattr(video, limit, 100)
    assert video.decord_reader(track) is None


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_few_frames_are_held_at_full_size_and_each_step_ticks(tmp_path, name, codec):
    path = write(tmp_path / name, constant(2, 20), (480, 640), codec=codec, step=5,
                 encoder={"cpu-used": "8"})
    load(path)                                                  # what is imported late
    ticks = []
    tracemalloc.start()
    clip = load(path, tick=lambda: ticks.append(1))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(clip.frames) == 40 and peak < 4 * 480 * 640 * 3 and len(ticks) >= 75
