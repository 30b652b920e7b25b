"""What is annotated against what is decoded: files cut short, late tracks, hidden frames, any format, long videos."""
import io
import itertools
import json
import os
import signal
import socket
import threading
import time
import tracemalloc
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from test_video import constant, shown, write

import data
import evaluate
import tasks
from data import Sample
from engine import loader, video, video_times
from engine.loader import Worker
from engine.video import Clip, VideoError, load

ECHO = SimpleNamespace(encode=lambda text, clip: clip)      # in place of an encoder
VP9 = {"codec": "libvpx-vp9", "encoder": {"cpu-used": "8", "b": "0"}}


def sample(path, start, end, **more):
    return Sample(f"{path.stem}:1", str(path), "a person opens the door.", start, end, None, **more)


def cut_short(path, packets=45, **options):
    """8 s at 10 fps, of which so many frames and half of the next one are left."""
    write(path, constant(10, 8), (64, 64), clock=1000, step=2, **options)
    with av.open(str(path)) as file:
        packet = next(itertools.islice(file.demux(video=0), packets, None))
        place = packet.pos + packet.size // 2
    path.write_bytes(path.read_bytes()[:place])
    return path


def with_sound(path, first, codec="aac", video="libx264", sound=10.0):
    """A video of 2 s at 10 fps, whose first frame comes `first` seconds after the beginning of `sound` seconds."""
    with av.open(str(path), "w") as file:
        pictures = file.add_stream(video, rate=10, options={"crf": "1", "g": "12", "qmax": "2"})
        pictures.width = pictures.height = 64
        tones = file.add_stream(codec, rate=48000)
        packets = []
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 6 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i + round(10 * first), Fraction(1, 10)
            packets += pictures.encode(frame)
        size = tones.codec_context.frame_size or 1024
        for i in range(0, int(sound * 48000), size):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, size), np.float32), "fltp", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48000, i, Fraction(1, 48000)
            packets += tones.encode(frame)
        packets += [*pictures.encode(None), *tones.encode(None)]
        for packet in sorted(packets, key=lambda p: float(p.dts * p.time_base)):
            file.mux(packet)
    return path


CUT = [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {}), ("a.avi", {}), ("a.ts", {}), ("a.webm", VP9)]


@pytest.mark.parametrize("name, options", CUT)
def test_a_file_cut_short_has_the_frames_that_are_left_at_their_times(tmp_path, name, options):
    path = cut_short(tmp_path / name, **options)
    clip = load(path, fps=10)
    assert clip.duration == pytest.approx(4.5, abs=1e-3) and len(clip.frames) == 44
    assert abs(np.array(shown(clip, 2)) - np.floor(np.arange(44) / clip.fps * 10 + 0.01)).max() <= 1
    for task in tasks.TASKS.values():
        tasks.prepare(sample(path, 0.0, clip.duration + 4.9), task, ECHO, load)
        tasks.prepare(sample(path, clip.duration - 0.1, clip.duration + 1), task, ECHO, load)
        for start, end in ((clip.duration, clip.duration + 1), (clip.duration + 1, clip.duration + 2),
                           (0.0, clip.duration + 5.1)):
            with pytest.raises(VideoError, match=rf"{name}: has {clip.duration:.2f} s of video, so nothing from"):
                tasks.prepare(sample(path, start, end), task, ECHO, load)


def test_a_segment_counts_from_the_beginning_of_its_part(tmp_path):
    path = write(tmp_path / "a.mp4", constant(4, 16))
    part = {"video_start": 10.0, "video_end": 20.0}                 # of which the file has 6 s
    tasks.prepare(sample(path, 5.0, 10.0, **part), tasks.TASKS["AR"], ECHO, load)
    with pytest.raises(VideoError, match="has 6.00 s of video, so nothing from 7 to 8 s"):
        tasks.prepare(sample(path, 7.0, 8.0, **part), tasks.TASKS["AR"], ECHO, load)


def test_sound_that_goes_on_is_no_video(tmp_path):
    path = with_sound(tmp_path / "a.mp4", 0.0)
    with av.open(str(path)) as file:
        assert file.duration / 1e6 > 9.9
    with pytest.raises(VideoError, match="has 2.00 s of video, so nothing from 5 to 7 s"):
        tasks.prepare(sample(path, 5.0, 7.0), tasks.TASKS["VC"], ECHO, load)


def test_the_linter_names_them(tmp_path):
    whole, short = write(tmp_path / "b.mp4", constant(4, 8)), cut_short(tmp_path / "a.mkv")
    samples = [sample(whole, 5.0, 7.0), *(sample(short, end - 1, end) for end in (2.0, 7.5, 8.0))]
    missing, bad = data.check_videos([*samples, sample(tmp_path / "c.mp4", 0.0, 1.0)], 1)
    assert list(missing) == [str(tmp_path / "c.mp4")] and list(bad) == [str(short)]
    assert "nothing from 6.5 to 7.5 s" in bad[str(short)] and bad[str(short)].endswith("(a:1 and 1 more)")


def test_training_replaces_them():
    clip = Clip(torch.zeros(40, 3, 28, 28, dtype=torch.uint8), 2.0)
    samples = [Sample(name, "x", "a person sits.", *segment, None) for name, segment in (("good", (1.0, 3.0)),
                                                                                        ("late", (20.0, 23.0)))]
    make = lambda each: tasks.prepare(each, tasks.TASKS["AR"], ECHO, lambda *part: clip)
    for index in range(4):
        picked = batches.pick(samples, index, 0, make)
        assert picked.item.id == "good" and all("nothing from 20 to 23 s" in str(error) for error in picked.errors)


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_evaluation_counts_them(folder, tmp_path, task):
    (tmp_path / "v").mkdir()
    write(tmp_path / "v" / "a.mp4", constant(4, 4))
    (tmp_path / "a.txt").write_text("a 1.0 3.0##a person sits.\na 6.0 8.0##a person opens the door.\n")
    scores = evaluate.main(evaluate.Config(model=str(folder / "model"), annotations=str(tmp_path / "a.txt"),
                                           videos=str(tmp_path / "v"), output=str(tmp_path / "o"), tasks=[task],
                                           max_tokens=2))
    rows = {row["id"]: row for row in map(json.loads, open(tmp_path / "o" / "predictions.jsonl"))}
    assert "error" not in rows["a:1"] and "nothing from 6 to 8 s" in rows["a:2"]["error"]
    assert rows["a:2"][tasks.TASKS[task].part] == 0 and len(rows) == 2
    assert scores[task if task != "TVG" else "mIoU"] <= 0.5     # of two


LATE = [("a.mp4", "aac", "libx264"), ("a.mkv", "aac", "libx264"), ("a.mov", "aac", "mpeg4"), ("a.ts", "aac", "libx264"),
        ("a.flv", "aac", "libx264"), ("a.webm", "libopus", "libvpx-vp9")]


@pytest.mark.parametrize("name, codec, picture", LATE)
def test_a_video_that_starts_after_the_sound_keeps_its_time(tmp_path, name, codec, picture):
    clip = load(with_sound(tmp_path / name, 2.0, codec, picture), fps=5)
    assert clip.duration == pytest.approx(4.0, abs=0.06)           # some sounds begin a little before 0
    found = np.array(shown(clip, 6))
    assert (found[:11] == 0).all() and abs(found - np.maximum(2 * np.arange(20) - 20, 0)).max() <= 1


def test_a_video_that_starts_before_the_sound_or_with_it_starts_at_0(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        assert shown(load(with_sound(tmp_path / name, 0.0), fps=10), 6) == list(range(20))


FOREIGN = [("a.ts", "libx264", {}), ("a.m2ts", "libx264", {}), ("b.ts", "mpeg2video", {"bf": "2"}),
           ("a.wmv", "wmv2", {}), ("b.wmv", "msmpeg4v3", {}), ("a.h264", "libx264", {}),
           ("a.hevc", "libx265", {"x265-params": "log-level=none"}), ("a.mpg", "mpeg2video", {}),
           ("b.mpg", "mpeg1video", {"bf": "2"}), ("a.flv", "libx264", {}), ("a.avi", "libx264", {}),
           ("b.avi", "mpeg4", {"bf": "2"}), ("a.webm", "libvpx", {"b": "2M"}), ("a.3gp", "mpeg4", {})]


@pytest.mark.parametrize("name, codec, encoder", FOREIGN)
def test_formats_that_decord_refuses_or_misreads(tmp_path, name, codec, encoder):
    quality = {"crf": "4", "cpu-used": "8"} if codec == "libvpx" else {"qmin": "1", "qmax": "2"}
    path = write(tmp_path / name, constant(25, 1.2), (64, 64), 25, codec, step=7, encoder={**quality, **encoder})
    clip = load(path, fps=25)
    assert clip.duration == pytest.approx(1.2, abs=1e-3) and shown(clip, 7) == list(range(30))
    assert shown(load(path, start=0.4, end=0.8, fps=5), 7) == [10, 12, 15, 17]       # 4 frames at least


@pytest.mark.parametrize("format, codec", [("matroska", "libx264"), ("webm", "libvpx-vp9")])
def test_files_without_a_duration(tmp_path, format, codec):
    """As browsers record: the file is written in one go, and nothing is filled in afterwards."""
    pipe, path = io.BytesIO(), tmp_path / "a.webm"
    with av.open(SimpleNamespace(write=pipe.write), "w", format=format) as file:
        track = file.add_stream(codec, rate=10, options={"crf": "1", "cpu-used": "8"})
        track.width = track.height = 64
        for i in range(30):
            file.mux(track.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 6 * i, np.uint8))))
        file.mux(track.encode(None))
    path.write_bytes(pipe.getvalue())
    with av.open(str(path)) as file:
        assert file.duration is None
    clip = load(path, fps=10)
    assert clip.duration == pytest.approx(3.0, abs=0.01) and shown(clip, 6) == list(range(30))


def test_negative_times_in_matroska(tmp_path):
    path = write(tmp_path / "a.mkv", np.arange(-4, 41) / 10, avoid_negative_ts="disabled")
    clip = load(path, fps=10)
    assert clip.duration == pytest.approx(4.4) and shown(clip) == list(range(44))


def test_reference_frames_that_are_never_shown(tmp_path):
    """A key frame of VP8 stands a second time behind itself, marked as not to be shown: it changes no picture."""
    plain, path = write(tmp_path / "a.webm", constant(10, 3), (64, 64), codec="libvpx", step=7,
                        encoder={"cpu-used": "8", "b": "2M", "crf": "4", "g": "5"}), tmp_path / "b.webm"
    with av.open(str(plain)) as source, av.open(str(path), "w") as target:
        track = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                content, when, key = bytes(packet), packet.pts, packet.is_keyframe
                packet.stream = track
                target.mux(packet)
                if key:
                    again = av.Packet(bytes([content[0] & ~0x10]) + content[1:])
                    again.pts = again.dts = when + 1
                    again.time_base, again.stream = Fraction(1, 1000), track
                    target.mux(again)
    with av.open(str(path)) as file:
        assert sum(packet.size > 0 for packet in file.demux(video=0)) == 36
    track = video_times.survey(path)
    assert np.allclose(track.times, np.arange(30) / 10, atol=1e-3)
    clip = load(path, fps=10)
    assert shown(clip, 7) == list(range(30)) and clip.duration == pytest.approx(3.0)


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"),
                                         ("a.ts", "libx264"), ("a.wmv", "wmv2")])
def test_times_are_those_that_pyav_decodes(tmp_path, name, codec):
    rng = np.random.default_rng(5)
    times = np.concatenate([[0], np.cumsum(rng.integers(2, 20, 40))]) / 50
    path = write(tmp_path / name, times, clock=50, codec=codec, size=(32, 32), step=5)
    with av.open(str(path)) as file:
        truth = np.array([frame.time for frame in file.decode(video=0)])
    track = video_times.survey(path)
    assert np.allclose(track.times, truth - truth[0], atol=1e-6) and np.allclose(track.times, times[:-1], atol=2e-3)
    middles = (track.times + np.append(track.times[1:], track.end)) / 2
    pictures = list(video_times.frames(track, np.repeat(middles, 2)))
    assert all(pictures[i] is pictures[i + 1] for i in range(0, 80, 2))
    truth = [frame.to_ndarray(format="rgb24") for frame in av.open(str(path)).decode(video=0)]
    assert all((a == b).all() for a, b in zip(pictures[::2], truth, strict=True))
    reader = video.agreeing(track)
    assert (reader is not None) == (name in ("a.mp4", "a.mkv"))
    if reader:
        found = video.by_decord(reader, np.arange(40), video_times.nothing)
        assert all((a == b).all() for a, b in zip(found, truth, strict=True))


def fake(pts, dts, **more):
    """A file of which only the packets' times matter."""
    packets = [SimpleNamespace(pts=a, dts=b, duration=more.get("length", 0), size=1, is_discard=False, is_corrupt=False)
               for a, b in itertools.zip_longest(pts, dts)]
    codec = SimpleNamespace(name="h264", width=8, height=8, thread_count=0)
    track = SimpleNamespace(time_base=Fraction(1, 10), average_rate=more.get("rate"), guessed_rate=None,
                            codec_context=codec)
    streams = SimpleNamespace(best=lambda kind: track, audio=[SimpleNamespace(start_time=v, time_base=Fraction(1, 10))
                                                              for v in more.get("sounds", ())])
    return SimpleNamespace(streams=streams, format=SimpleNamespace(name=more.get("format", "mpegts")),
                           demux=lambda stream: iter(packets), __enter__=None)


@pytest.mark.parametrize("pts, dts, more, times, end, zero", [
    ([20, 40, 30], [0, 10, 20], {}, [0, 1, 2], 3, 2),                               # decoded in another order
    ([20, 40, 30], [0, 10, 20], {"length": 5}, [0, 1, 2], 2.5, 2),
    ([20, 30], [20, 30], {"sounds": [15, 5, None]}, [1.5, 2.5], 3.5, 0.5),          # the first sound
    ([20, 30], [20, 30], {"sounds": [25]}, [0, 1], 2, 2),
    ([20, 30], [20, 30], {"sounds": [-3]}, [2, 3], 4, 0),                           # before 0: not played
    ([-20, -10], [-20, -10], {"sounds": [-1]}, [0, 1], 2, -2),
    ([None, None, 0, 10], [None, None, 0, 10], {"format": "matroska,webm"}, [0, 1, 2, 3], 4, None),
    ([0, None, None], [None] * 3, {"rate": 5}, [0, 0.2, 0.4], 0.6, None),           # most unknown, no decoding times
    ([0] + [10] * 40 + [None], [None] * 42, {"rate": 5}, np.arange(42) / 5, 8.4, None),     # the last one unknown
    ([100, 110, 0, 10], [100, 110, 0, 10], {"rate": 5}, [0, 0.2, 0.4, 0.6], 0.8, None),  # the clock starts again
    ([5, 3, 4], [0, 10, 20], {"format": "avi"}, [0, 1, 2], 3, None),
    ([None] * 3, [None] * 3, {"format": "h264"}, [0, 0.04, 0.08], 0.12, None),      # 25 a second if nothing tells
    ([2**62, 0], [0, 1], {"rate": Fraction(10**9)}, [0, 0.1], 0.2, None),
    ([7], [7], {"rate": 4}, [0], 0.25, 0.7)])
def test_times_are_used_if_they_make_sense(monkeypatch, pts, dts, more, times, end, zero):
    class Opened:
        __enter__ = lambda self: fake(pts, dts, **more)
        __exit__ = lambda self, *error: None

    monkeypatch.setattr(av, "open", lambda *args, **options: Opened())
    track = video_times.survey("x")
    assert np.allclose(track.times, times) and track.end == pytest.approx(end)
    assert track.zero == (None if zero is None else pytest.approx(zero))


def test_no_track_no_frames(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        tones = file.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), "fltp", "stereo")
        frame.sample_rate = 48000
        file.mux([*tones.encode(frame), *tones.encode(None)])
    with pytest.raises(VideoError, match="a.mp4: cannot be decoded .it has no video track; the file"):
        load(tmp_path / "a.mp4")


def test_many_lost_frames_are_a_broken_file_and_few_are_not(tmp_path, monkeypatch):
    path = write(tmp_path / "a.ts", constant(10, 3), (64, 64), step=6)
    track, whole = video_times.survey(path), video_times.decoded
    for lost, broken in ((3, False), (6, True)):
        monkeypatch.setattr(video_times, "decoded", lambda *args: (item for i, item in enumerate(whole(*args))
                                                            if not 10 <= i < 10 + lost))
        if broken:
            with pytest.raises(video_times.Unreadable, match="frames before 1.5.* s are lost"):
                list(video_times.frames(track, [0.5, 1.55]))
        else:
            assert len(list(video_times.frames(track, [0.5, 1.25, 2.0]))) == 3
    monkeypatch.setattr(video_times, "decoded", lambda *args: iter(()))
    with pytest.raises(VideoError, match="none of its frames can be decoded"):
        load(path)


@pytest.mark.parametrize("place, broken", [(12, True), (29, False)])
def test_a_damaged_packet_breaks_a_file_unless_it_is_the_last(tmp_path, place, broken):
    path = write(tmp_path / "a.webm", constant(10, 3), (64, 64), step=6, **VP9)
    with av.open(str(path)) as file:
        content = [bytes(packet) for packet in file.demux(video=0)][place]
    head, _, tail = path.read_bytes().rpartition(content)       # equal ones come before it
    path.write_bytes(head + bytes(len(content)) + tail)
    load(path, end=1.0)                                         # what is before it is whole
    if broken:
        with pytest.raises(VideoError, match="a.webm: cannot be decoded .Invalid data"):
            load(path)
    else:
        assert shown(load(path, fps=10), 6) == [*range(29), 28]


def test_where_decord_fails_pyav_goes_on(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", constant(10, 3), (64, 64), step=6)
    expected, whole, asked = load(path), video.by_decord, []

    def fails(*args):
        for i, picture in enumerate(whole(*args)):
            if i == 3:
                raise RuntimeError("decord")
            asked.append(i)
            yield picture
    monkeypatch.setattr(video, "by_decord", fails)
    assert load(path).frames.equal(expected.frames) and asked == [0, 1, 2]
    monkeypatch.setattr(video.decord, "VideoReader", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(path)
    for limit in ("DECORD_PIXELS", "DECORD_BYTES"):            # above, decord is not asked
        with monkeypatch.context() as small:
            small.setattr(video, limit, 100)
            assert load(path).frames.equal(expected.frames)


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_few_frames_are_held_at_full_size_and_each_step_is_told(tmp_path, name, codec):
    path, ticks = write(tmp_path / name, constant(2, 20), (480, 640), clock=1000, codec=codec, step=5,
                        encoder={"cpu-used": "8"}), []
    load(path)                                                  # what is imported late
    tracemalloc.start()
    clip = load(path, tick=lambda: ticks.append(1))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(clip.frames) == 40 and peak < 4 * 480 * 640 * 3 and len(ticks) >= 75


def test_a_file_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", constant(4, 1))
    monkeypatch.setattr(os, "access", lambda path, mode: False)             # root may read all
    with pytest.raises(VideoError, match="a.mp4: may not be read by this user; change its permissions"):
        load(path)


def test_the_limit_is_on_no_progress():
    """A worker that gets on for longer than the limit is waited for; one that stands still is not."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0.4)
    worker = Worker(limit=0.4)
    worker.process, worker.pid = SimpleNamespace(wait=lambda seconds: 0), os.getpid()
    worker.stream = ours.makefile("rwb")

    def answer(*lines):
        with theirs.makefile("rb") as requests:
            requests.readline()
        for line in lines:
            time.sleep(0.15)
            theirs.sendall(line)
    began = time.perf_counter()
    thread = threading.Thread(target=answer, args=[b"{}\n"] * 6 + [b'{"shape": [1, 2], "fps": 3.0}\n', b"ab"])
    thread.start()
    frames, fps = worker.ask({"path": "a"})
    thread.join()
    assert bytes(frames.numpy()) == b"ab" and fps == 3 and time.perf_counter() - began > 0.9
    thread = threading.Thread(target=answer, args=[b"{}\n"])
    thread.start()
    with pytest.raises(video.VideoTimeout, match="a: decoding stood still for 0.4 s.*--video_timeout"):
        worker.ask({"path": "a"})
    thread.join()
    ours.close(), theirs.close()


def test_progress_is_told_a_few_times_within_the_limit(monkeypatch):
    now, sent, alarms = [0.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "setitimer", lambda kind, seconds: alarms.append(seconds))
    tick = loader.progress(SimpleNamespace(sendall=sent.append), 60.0)
    for step in range(1000):
        now[0] = step / 100
        tick()
    assert 9 <= len(sent) <= 11 and set(sent) == {b"{}\n"} and alarms == [65.0] * len(sent)
