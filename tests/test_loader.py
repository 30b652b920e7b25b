"""loader.Loader: what comes from its worker processes is what load gives; hangs, crashes, mistakes and the cache."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from test_video import broken, constant, counted, shown, write

from engine import video
from engine.loader import Loader, Worker
from engine.video import VideoError, load


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write(tmp_path_factory.mktemp("toy") / "a.mp4", constant(4, 16))


@pytest.fixture(scope="module")
def loader():
    loader = Loader(limit=20.0)
    yield loader
    loader.close()


def same(clip, other):
    return clip.fps == other.fps and clip.frames.equal(other.frames)


def test_loader_gives_what_load_gives(toy, loader, tmp_path):
    assert same(loader(toy), load(toy)) and shown(loader(toy)) == list(range(0, 64, 2))
    worker = loader.workers[0].process.pid
    assert same(loader(toy, start=10.0, end=15.0), load(toy, start=10.0, end=15.0))
    assert same(loader(write(tmp_path / "b.mp4", constant(7.3, 9), (120, 160))), load(tmp_path / "b.mp4"))
    for kind in ("missing", "overwritten"):
        path = broken(tmp_path, kind)
        with pytest.raises(VideoError) as expected:
            load(path)
        with pytest.raises(VideoError) as error:
            loader(path)
        assert str(error.value) == str(expected.value)
    assert same(loader(toy), load(toy)) and loader.workers[0].process.pid == worker   # a broken file costs no worker


def test_threads_take_turns(toy, loader):
    results = []
    ask = lambda s: results.append(shown(loader(toy, start=s)) == [*range(4 * s, 64, 2)])
    threads = [threading.Thread(target=ask, args=(s,)) for s in range(6)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert results == [True] * 6


def test_a_hang_ends_at_the_limit_is_remembered_and_the_next_file_loads(toy, tmp_path):
    """The process is stopped before the request, so for the caller it hangs."""
    loader, other = Loader(limit=0.5), tmp_path / "b.mp4"
    other.symlink_to(toy)
    assert loader(other).fps == 2
    worker, began = loader.workers[0].process, time.perf_counter()
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(VideoError, match="a.mp4: decoding stood still for 0.5 s") as error:
        loader(toy)
    assert time.perf_counter() - began < 3 and "\n" not in str(error.value)
    assert worker.returncode == -signal.SIGKILL
    with pytest.raises(VideoError, match="a.mp4: decoding stood still for 0.5 s"):
        loader(toy, start=1.0)
    assert loader.workers[0].process is None
    assert shown(loader(other)) == list(range(0, 64, 2)) and loader.workers[0].process.pid != worker.pid
    loader.close()


def test_workers_decode_at_the_same_time_and_a_hang_holds_up_only_its_own(toy, tmp_path):
    loader, files = Loader(limit=2.0, workers=2), [tmp_path / f"{i}.mp4" for i in range(6)]
    for path in files:
        path.symlink_to(toy)
    gate = threading.Barrier(2)
    threads = [threading.Thread(target=lambda path=path: (gate.wait(), loader(path))) for path in files[:2]]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    processes = [worker.process for worker in loader.workers]
    assert all(processes)
    os.kill(processes[0].pid, signal.SIGSTOP)
    results = {}

    def ask(path):
        try:
            results[path] = shown(loader(path))
        except VideoError as error:
            results[path] = error
    threads = [threading.Thread(target=ask, args=(path,)) for path in files]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    hung = [path for path in files if isinstance(results[path], VideoError)]
    assert hung == list(results)[-1:] and str(hung[0]) in str(results[hung[0]])      # all others came before it
    assert all(results[path] == list(range(0, 64, 2)) for path in files if path not in hung)
    assert processes[0].returncode == -signal.SIGKILL and loader.workers[1].process is processes[1]
    loader.close()


def test_the_end_of_a_run_does_not_wait_for_a_video_that_hangs(toy):
    loader = Loader(limit=60.0)
    make = lambda step: batches.pick([toy], step, 0, loader)       # what is unreadable is replaced, by itself
    began = time.perf_counter()
    with pytest.raises(KeyError), batches.prefetched(make, range(9), loader) as made:
        for step, (_, _, clip, _) in made:
            assert shown(clip) == list(range(0, 64, 2))
            if step == 1:
                time.sleep(0.5)                                 # the third is made by now
                worker = loader.workers[0].process
                os.kill(worker.pid, signal.SIGSTOP)
            if step == 2:
                raise KeyError
    assert time.perf_counter() - began < 30 and worker.wait(5) == -signal.SIGKILL
    with pytest.raises(VideoError, match="the run is ending"):
        loader(toy)


def test_a_missing_file_costs_no_worker(tmp_path):
    loader = Loader()
    with pytest.raises(VideoError, match="gone.mp4: no such video file"):
        loader(tmp_path / "gone.mp4")
    assert loader.workers[0].process is None


def test_a_crash_is_an_error_and_the_next_file_loads(toy, loader):
    for number in (signal.SIGSEGV, signal.SIGABRT):
        loader(toy)
        worker = loader.workers[0].process.pid
        os.kill(worker, signal.SIGSTOP)   # so that the crash happens while the request is on its way
        threading.Timer(0.1, lambda: (os.kill(worker, number), os.kill(worker, signal.SIGCONT))).start()
        with pytest.raises(VideoError, match=f"a.mp4: crashed the decoder .exit code -{number.value}.") as error:
            loader(toy)
        assert "\n" not in str(error.value) and same(loader(toy), load(toy))


def test_the_worker_ends_with_its_parent_and_needs_no_main_guard(toy, tmp_path):
    """From any working directory, and where the environment keeps Python from looking into that."""
    script = tmp_path / "unguarded.py"
    root = str(Path(video.__file__).parent.parent)
    script.write_text(f"import sys, time\nsys.path.insert(0, {root!r})\nfrom engine.loader import Loader\n"
                      f"loader = Loader()\nloader({str(toy)!r})\n"
                      "print(loader.workers[0].process.pid, flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, cwd=tmp_path,
                          env={**os.environ, "PYTHONSAFEPATH": "1"}) as parent:
        worker = int(parent.stdout.readline())
        os.kill(worker, 0)
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
            state = Path(f"/proc/{worker}/stat")
            if state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] == "Z":   # ended, nobody has asked
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived its parent")


def test_a_cached_clip_is_the_same_and_needs_no_worker(toy, tmp_path, loader):
    first = Loader(cache=tmp_path / "cache")
    loader(toy)
    vars(first.workers[0]).update(vars(loader.workers[0]))   # saves a start
    clips = [first(toy), first(toy, start=3.0, end=9.0)]
    first.workers[0].process = None
    second = Loader(cache=tmp_path / "cache")
    assert same(second(toy), clips[0]) and same(second(str(toy), 3.0, 9.0), clips[1])
    assert second.workers[0].process is None
    second(toy).frames.add_(1)   # writable, and nobody else's
    assert same(second(toy), clips[0])


def test_what_changes_the_frames_changes_the_entry(toy, tmp_path, monkeypatch):
    path, asked = tmp_path / "a.mp4", []
    path.write_bytes(toy.read_bytes())
    monkeypatch.setattr(Worker, "ask", lambda self, request: asked.append(request) or (counted(4).frames, 2.0))
    make = lambda **options: Loader(cache=tmp_path / "cache", **options)
    make()(path), make()(path)
    assert len(asked) == 1
    for options in ({"fps": 1.0}, {"total_pixels": 1000}, {"min_pixels": 784}, {"max_frames": 8}):
        make(**options)(path)
    make()(path, start=1.0), make()(path, end=9.0)
    assert len(asked) == 7
    os.utime(path, ns=(0, 1))
    make()(path)
    path.write_bytes(toy.read_bytes() + b"\0")
    os.utime(path, ns=(0, 1))   # the same time, another size
    make()(path)
    monkeypatch.setattr(loaders, "DECODER", "another")
    make()(path)
    assert len(asked) == 10


def test_an_unknown_option_is_named_at_once():
    with pytest.raises(TypeError, match="no option total_pixel, only fps, total_pixels"):
        Loader(total_pixel=3)


def test_a_mistake_in_load_is_no_broken_video(toy, loader):
    """A VideoError would have the video replaced; here the traceback comes back, and the worker goes on."""
    loader.options["fps"] = "two"
    with pytest.raises(RuntimeError, match="(?s)a.mp4.*Traceback.*frame_count.*TypeError"):
        loader(toy)
    worker = loader.workers[0].process.pid
    loader.options["fps"] = 2.0
    assert same(loader(toy), load(toy)) and loader.workers[0].process.pid == worker


@pytest.mark.parametrize("load", [lambda **_: np.empty(1 << 60, np.uint8),
                                  lambda **_: torch.empty(1 << 60, dtype=torch.uint8)])
def test_a_video_too_large_for_the_memory_is_no_mistake(monkeypatch, load):
    """The worker's loop, run here: it says so of each request, and goes on to the next."""
    monkeypatch.setattr(loaders, "load", load)
    monkeypatch.setattr(signal, "signal", lambda *_: None)      # it would ignore SIGTERM from now on
    ours, theirs = socket.socketpair()
    with ours, ours.makefile("r") as answers:
        ours.sendall(b'{"path": "/a.mp4", "limit": 60}\n' * 2)
        ours.shutdown(socket.SHUT_WR)
        loaders.serve(theirs.detach())
        ready, *lines = answers.read().splitlines()
    said = [answer for answer in map(json.loads, lines) if answer]
    assert ready == "ready" and len(said) == 2
    assert all(answer["error"].startswith("/a.mp4: decoding it takes more memory") for answer in said)


def test_an_answer_that_is_not_read_does_not_answer_the_next_request(toy, loader, monkeypatch):
    loader(toy)
    worker = loader.workers[0].process
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(torch, "empty", mock.Mock(side_effect=RuntimeError("no memory")))
        loader(toy)
    assert loader.workers[0].process is None and worker.returncode is not None
    assert same(loader(toy, start=8.0), load(toy, start=8.0))


def test_equal_keys_are_equal_frames(toy, loader, tmp_path):
    clips = [load(str(toy)), loader(str(toy)), Loader(cache=tmp_path / "cache")(toy)]
    assert len({clip.key for clip in clips}) == 1
    changed = [clips[0].cut(0, 2), clips[0].cut(1, 2), clips[0].grey(), load(str(toy), end=2.0),
               load(str(toy), fps=1.0)]
    assert len({clip.key for clip in changed} | {clips[0].key}) == 6
    assert loader(toy).cut(1, 2).key == changed[1].key
