"""Loader: its worker processes give what load gives; hangs, crashes, mistakes and the cache."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_videos import broken, constant, counted, write

import engine.loader
from engine.loader import Loader, Worker, progress, serve
from engine.video import VideoError, VideoTimeout, load


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Not of a whole number of frames per second: 16 frames in 8.9 s."""
    path = write(tmp_path_factory.mktemp("video") / "a.mp4", constant(10, 8.9), step=2)
    assert load(path).fps == pytest.approx(16 / 8.9)
    return path


@pytest.fixture(scope="module")
def loader():
    loader = Loader(timeout=20.0)
    yield loader
    loader.close()


def same(clip, other):
    return clip.fps == other.fps and clip.frames.equal(other.frames) and clip.key == other.key


def stop(worker):
    """The process does nothing more, so that for its caller it hangs. Returns it."""
    os.kill(worker.process.pid, signal.SIGSTOP)
    return worker.process


def test_loader_gives_what_load_gives(video, loader, tmp_path):
    assert same(loader(video), load(video))
    process = loader.workers[0].process
    assert same(loader(video, start=2.0, end=5.0), load(video, start=2.0, end=5.0))
    for kind in ("missing", "overwritten"):
        path = broken(tmp_path, kind)
        with pytest.raises(VideoError) as expected:
            load(path)
        with pytest.raises(VideoError) as error:
            loader(path)
        assert str(error.value) == str(expected.value)
    path = write(tmp_path / "large.mp4", constant(4, 2), (120, 160))
    small = Loader(total_pixels=4 * 50 * 784)
    small.free = loader.free                                    # saves the start of a worker
    assert same(small(path), load(path, total_pixels=4 * 50 * 784))
    assert not same(small(path), load(path))
    assert loader.workers[0].process is process                 # a broken file costs no worker


def test_a_missing_file_costs_no_worker(tmp_path):
    loader = Loader()
    with pytest.raises(VideoError, match="gone.mp4: no such video file"):
        loader(tmp_path / "gone.mp4")
    assert loader.workers[0].process is None


def test_a_hang_ends_in_time_is_remembered_and_the_next_file_loads(video, tmp_path):
    other = tmp_path / "b.mp4"
    other.symlink_to(video)
    loader = Loader(timeout=0.5)
    loader(other)
    process = stop(loader.workers[0])
    began = time.perf_counter()
    for start in (None, 1.0):
        with pytest.raises(VideoTimeout, match="a.mp4: decoding stood still for 0.5 s") as error:
            loader(video, start)
        assert "--video_timeout" in str(error.value) and "\n" not in str(error.value)
    assert time.perf_counter() - began < 3
    assert process.returncode == -signal.SIGKILL
    assert loader.workers[0].process is None                    # the second time, none was asked
    assert loader(other).frames.equal(load(video).frames)
    loader.close()


def test_workers_decode_at_the_same_time_and_a_hang_holds_up_only_its_own(video, tmp_path):
    paths = [tmp_path / f"{number}.mp4" for number in range(6)]
    for path in paths:
        path.symlink_to(video)
    loader = Loader(timeout=2.0, workers=2)
    for worker in loader.workers:
        worker.start()
    hanging = stop(loader.workers[0])
    other = loader.workers[1].process
    answered = []
    hung = []

    def ask(path):
        try:
            answered.append(loader(path).frames)
        except VideoTimeout as error:
            hung.append(len(answered))
            assert str(path) in str(error)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask, paths))
    assert hung == [5]                                          # all others came before it
    assert all(frames.equal(load(video).frames) for frames in answered)
    assert hanging.returncode == -signal.SIGKILL and loader.workers[1].process is other
    loader.close()


def test_a_loader_that_is_stopped_waits_for_nothing(video):
    loader = Loader(timeout=60.0)
    loader(video)
    process = stop(loader.workers[0])
    threading.Timer(0.3, loader.stop).start()
    began = time.perf_counter()
    with pytest.raises(VideoError, match="a.mp4: crashed the decoder .exit code -9."):
        loader(video)
    with pytest.raises(VideoError, match="a.mp4: not decoded, since the run is ending"):
        loader(video)
    assert time.perf_counter() - began < 30 and process.returncode == -signal.SIGKILL


def test_who_waits_for_a_worker_of_a_loader_that_is_stopped_starts_none(video):
    loader = Loader()
    worker = loader.free.get()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(loader, video)
        time.sleep(0.2)
        loader.stop()
        loader.free.put(worker)
        with pytest.raises(VideoError, match="the run is ending"):
            waiting.result()
    assert worker.process is None


def test_a_crash_is_an_error_and_the_next_file_loads(video, loader):
    loader(video)
    pid = stop(loader.workers[0]).pid       # so that the crash comes while the request is on its way

    def crash():
        os.kill(pid, signal.SIGSEGV)
        os.kill(pid, signal.SIGCONT)

    threading.Timer(0.1, crash).start()
    with pytest.raises(VideoError, match="a.mp4: crashed the decoder .exit code -11.") as error:
        loader(video)
    assert "\n" not in str(error.value) and same(loader(video), load(video))


def test_the_worker_ends_with_its_parent_and_needs_no_main_guard(video, tmp_path):
    """From any working directory, and where the environment keeps Python from looking into that."""
    root = Path(engine.loader.__file__).parent.parent
    script = tmp_path / "unguarded.py"
    script.write_text(f"""
import sys, time
sys.path.insert(0, {str(root)!r})
from engine.loader import Loader
loader = Loader()
loader({str(video)!r})
print(loader.workers[0].process.pid, flush=True)
time.sleep(60)
""")
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, cwd=tmp_path,
                          env=environment) as parent:
        worker = int(parent.stdout.readline())
        assert runs(worker)
        parent.kill()
    for _ in range(600):
        if not runs(worker):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def runs(pid):
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:               # no Linux
        return True
    return state != "Z"                     # ended, and nobody has asked


def test_a_cached_clip_is_the_same_and_needs_no_worker(video, loader, tmp_path):
    first = Loader(cache=tmp_path)
    first.free = loader.free
    first(video)
    first(video, start=3.0, end=6.0)
    second = Loader(cache=tmp_path)
    assert same(second(video), load(video))
    assert same(second(video, 3.0, 6.0), load(video, 3.0, 6.0))
    assert second.workers[0].process is None
    second(video).frames.add_(1)            # writable, and nobody else's
    assert same(second(video), load(video))


def test_what_changes_the_frames_changes_the_entry(video, tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(video.read_bytes())
    asked = []

    def ask(worker, request):
        asked.append(request)
        return counted(4).frames, 2.0

    monkeypatch.setattr(Worker, "ask", ask)
    loader = Loader(cache=tmp_path / "cache")

    def decodes(loader, *times):
        """Whether it has to be decoded: the first time, not the second."""
        before = len(asked)
        loader(path, *times)
        after = len(asked)
        loader(path, *times)
        assert len(asked) == after
        return after > before

    assert decodes(loader)
    assert decodes(Loader(total_pixels=1000, cache=tmp_path / "cache"))
    assert decodes(loader, 1.0) and decodes(loader, None, 9.0)
    os.utime(path, ns=(0, 1))
    assert decodes(loader)
    path.write_bytes(video.read_bytes() + b"\0")
    os.utime(path, ns=(0, 1))               # the same time, another size
    assert decodes(loader)
    monkeypatch.setattr(engine.loader, "DECODER", "another")
    assert decodes(loader)
    assert not decodes(Loader(cache=tmp_path / "cache"))


def test_a_mistake_in_load_is_no_broken_video(video, loader):
    """A VideoError would have the video replaced; here the traceback comes back, and the worker goes on."""
    loader(video)
    process = loader.workers[0].process
    request = {"path": str(video), "start": None, "end": None, "total_pixels": "many"}
    with pytest.raises(RuntimeError, match="(?s)a.mp4.*Traceback.*frame_size.*TypeError"):
        loader.workers[0].ask(request)
    assert same(loader(video), load(video)) and loader.workers[0].process is process


def too_much_for_numpy(*_):
    return np.empty(1 << 60, np.uint8)


def too_much_for_torch(*_):
    return torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("load", [too_much_for_numpy, too_much_for_torch])
def test_a_video_too_large_for_the_memory_is_no_mistake(monkeypatch, load):
    """The worker's loop, run here: it says so of each request, and goes on to the next."""
    monkeypatch.setattr(engine.loader, "load", load)
    monkeypatch.setattr(signal, "signal", lambda *_: None)      # it would ignore SIGTERM from now on
    request = {"path": "/a.mp4", "start": None, "end": None, "total_pixels": 1}
    ours, theirs = socket.socketpair()
    with ours, ours.makefile("r") as answers:
        ours.sendall(2 * (json.dumps(request).encode() + b"\n"))
        ours.shutdown(socket.SHUT_WR)
        serve(theirs.detach(), 60.0)
        ready, *lines = answers.read().splitlines()
    errors = [json.loads(line)["error"] for line in lines if line != "{}"]
    assert ready == "ready" and len(errors) == 2
    assert all(error.startswith("/a.mp4: decoding it takes more memory") for error in errors)


def test_an_answer_that_is_not_read_does_not_answer_the_next_request(video, loader, monkeypatch):
    def no_memory(*_, **__):
        raise RuntimeError("no memory")

    loader(video)
    process = loader.workers[0].process
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(torch, "empty", no_memory)
        loader(video)
    assert loader.workers[0].process is None and process.returncode is not None
    assert same(loader(video, start=4.0), load(video, start=4.0))


def test_the_timeout_is_on_no_progress():
    """A worker that gets on for longer than the timeout is waited for; one that stands still is not."""
    ours, theirs = socket.socketpair()
    ours.settimeout(0.4)
    worker = Worker(timeout=0.4)
    worker.process = SimpleNamespace(wait=lambda seconds: 0)
    worker.owner = os.getpid()
    worker.stream = ours.makefile("rwb")

    def answer(*lines):
        with theirs.makefile("rb") as requests:
            requests.readline()
        for line in lines:
            time.sleep(0.15)
            theirs.sendall(line)

    began = time.perf_counter()
    with ours, theirs, ThreadPoolExecutor(1) as threads:
        threads.submit(answer, *[b"{}\n"] * 6, b'{"shape": [1, 2], "fps": 3.0}\n', b"ab")
        frames, fps = worker.ask({"path": "a"})
        assert bytes(frames.numpy()) == b"ab" and fps == 3 and time.perf_counter() - began > 0.9
        threads.submit(answer, b"{}\n")
        with pytest.raises(VideoTimeout, match="a: decoding stood still for 0.4 s"):
            worker.ask({"path": "a"})


def test_progress_is_told_a_few_times_within_the_timeout(monkeypatch):
    sent = []
    alarms = []
    monkeypatch.setattr(signal, "setitimer", lambda kind, seconds: alarms.append(seconds))
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    tick = progress(SimpleNamespace(sendall=sent.append), 60.0)
    for now in np.arange(0, 10, 0.01):
        monkeypatch.setattr(time, "monotonic", lambda: now)
        tick()
    assert 9 <= len(sent) <= 11 and set(sent) == {b"{}\n"} and alarms == [65.0] * len(sent)
