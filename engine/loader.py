"""Videos decoded in processes of their own, which may hang or crash, and kept on disk for the next time.

    loader = Loader(cache="frames", workers=2)
    clip = loader("video.mp4")              # the clip that video.load gives
"""
import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from engine.cache import Cache
from engine.video import DECODER, TOTAL_PIXELS, Clip, VideoError, VideoTimeout, load, require_file

STARTING = 300      # seconds that a worker may take to start: importing torch from a slow disk


class Loader:
    """loader(path, start=None, end=None) -> Clip, as `load`, which runs in worker processes of the loader's own: a
    decoder that hangs or crashes ends only its process and raises VideoError. What has hung is not tried again. Any
    other error in `load` is a mistake in the code, and raises RuntimeError with its traceback.

    Several threads may call: as many videos are decoded at a time as there are `workers`. A worker starts when it is
    first needed (which takes it a few seconds, to import torch). With `cache`, a folder, decoded clips are kept there.
    """

    def __init__(self, total_pixels: int = TOTAL_PIXELS, timeout: float = 60.0,
                 cache: str | Path = "", cache_gb: float = 50.0, workers: int = 1):
        """`total_pixels`: as for `load`; `timeout`: seconds for which decoding may stand still, however long the video
        is; `cache_gb`: size of the cache."""
        self.total_pixels = total_pixels
        self.cache = Cache(cache, cache_gb) if cache else None
        self.hung = {}                      # path -> message
        self.stopped = False
        self.workers = [Worker(timeout) for _ in range(workers)]
        self.free = queue.LifoQueue()       # the last one in has started already
        for worker in self.workers:
            self.free.put(worker)

    def __call__(self, path: str | Path, start: float | None = None,
                 end: float | None = None) -> Clip:
        path = os.path.abspath(path)
        self.check_running(path)
        require_file(path)
        request = {"path": path, "start": start, "end": end, "total_pixels": self.total_pixels}
        key = tuple(request.values())       # of the clip, as `load` makes it
        if self.cache is None:
            return Clip(*self.decode(request), key)
        file = os.stat(path)
        entry = {**request, "bytes": file.st_size, "mtime_ns": file.st_mtime_ns, "decoder": DECODER}
        cached = self.cache.get(entry)
        if cached:
            frames, info = cached
            return Clip(torch.from_numpy(frames), info["fps"], key)
        frames, fps = self.decode(request)
        self.cache.put(entry, frames.numpy(), {"fps": fps})
        return Clip(frames, fps, key)

    def decode(self, request: dict) -> tuple[torch.Tensor, float]:
        """(frames, fps) from the next worker that is free."""
        path = request["path"]
        worker = self.free.get()
        try:
            self.check_running(path)        # it may have been stopped while this thread waited
            if path in self.hung:
                raise VideoTimeout(self.hung[path])
            return worker.ask(request)
        except VideoTimeout as error:
            self.hung[path] = str(error)
            raise
        finally:
            self.free.put(worker)

    def check_running(self, path: str) -> None:
        if self.stopped:
            raise VideoError(f"{path}: not decoded, since the run is ending")

    def close(self) -> None:
        for worker in self.workers:
            worker.close()

    def stop(self) -> None:
        """From another thread: end what is being decoded, and decode nothing more. Those who wait get a VideoError."""
        self.stopped = True
        for worker in self.workers:
            process = worker.process
            if process is not None:
                process.kill()


class Worker:
    """A process that decodes one video at a time for a Loader. It ends with its parent, however that ends."""

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.process = None
        self.owner = None       # process id of the process whose worker this is

    def ask(self, request: dict) -> tuple[torch.Tensor, float]:
        """(frames, fps) of a request, frames uint8 (T, 3, H, W), decoded by the process: it answers with lines of
        json, empty ones as long as it gets on, then with bytes. Raises VideoError, and RuntimeError for a mistake."""
        if self.process is None or self.owner != os.getpid():   # never share one with a fork
            self.start()
        path = request["path"]
        try:
            self.stream.write(json.dumps(request).encode() + b"\n")
            self.stream.flush()
            answer = {}
            while not answer:
                answer = json.loads(self.stream.readline())     # ValueError if it has ended
            if "shape" in answer:
                frames = torch.empty(answer["shape"], dtype=torch.uint8)
                if self.stream.readinto(frames.numpy()) < frames.numel():
                    raise ConnectionError("the process ended while it answered")
        except TimeoutError as error:
            self.close()
            raise VideoTimeout(
                f"{path}: decoding stood still for {self.timeout:g} s, and is not tried again in "
                "this run; re-encode it with ffmpeg, or allow more time with --video_timeout"
            ) from error
        except (OSError, ValueError) as error:
            code = self.close()
            raise VideoError(f"{path}: crashed the decoder (exit code {code}); "
                             "get it again or re-encode it with ffmpeg") from error
        except BaseException:
            # an interrupt, no memory here: what is on the way must not answer the next request
            self.close()
            raise
        if "error" in answer:
            raise VideoError(answer["error"])
        if "mistake" in answer:
            raise RuntimeError(f"decoding {path} failed:\n{answer['mistake']}")
        return frames, answer["fps"]

    def start(self) -> None:
        """Run this module in a new Python: so the caller's own main module is not imported again. It finds what the
        caller finds (sys.path), wherever that works and whatever PYTHONSAFEPATH says. Its standard output is closed to
        it, since decoders print; it talks over a socket."""
        ours, theirs = socket.socketpair()
        root = Path(__file__).resolve().parent.parent
        paths = os.pathsep.join(os.path.abspath(path) for path in (root, *sys.path))
        command = [sys.executable, "-m", "engine.loader", str(theirs.fileno()), str(self.timeout)]
        environment = {**os.environ, "PYTHONPATH": paths}
        with theirs:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], cwd=root, env=environment,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True)     # Ctrl-C is for the caller
        self.owner = os.getpid()
        self.stream = ours.makefile("rwb")
        with ours:   # the stream keeps it open
            ours.settimeout(STARTING)
            try:
                ready = self.stream.readline()
            except TimeoutError:
                ready = b""
            ours.settimeout(self.timeout)
        if not ready:
            raise ChildProcessError(
                f"the decoding process does not start (exit code {self.close()}): see its message "
                f"above, or try in {root}: {sys.executable} -c 'import engine.loader'")

    def close(self) -> int | None:
        """End the process; returns its exit code, minus the signal's number if a signal ended it."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
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


def serve(number: int, timeout: float) -> None:
    """The worker: answers requests on socket `number` until its other end is closed."""
    # a scheduler sends it to all processes, and the caller may need more frames
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=number) as connection, connection.makefile("rb") as requests:
        connection.sendall(b"ready\n")
        for line in requests:
            request = json.loads(line)
            frames = None
            tick = progress(connection, timeout)
            try:
                clip = load(request["path"], request["start"], request["end"],
                            request["total_pixels"], tick)
                frames = clip.frames.numpy()
                answer = {"shape": frames.shape, "fps": clip.fps}
            except VideoError as error:
                answer = {"error": str(error)}
            except Exception as error:
                # numpy's error; torch's
                if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
                    answer = {"error": f"{request['path']}: decoding it takes more memory than "
                                       "there is; re-encode it in a smaller size with ffmpeg"}
                else:       # sent back whole: a mistake in `load` must not look like a broken video
                    answer = {"mistake": traceback.format_exc()}
            connection.sendall(json.dumps(answer).encode() + b"\n")
            if frames is not None:
                connection.sendall(frames)
            signal.setitimer(signal.ITIMER_REAL, 0)


def progress(connection: socket.socket, timeout: float) -> Callable[[], None]:
    """A function to be called whenever decoding gets on: it tells the caller, who waits for that `timeout` seconds, a
    few times in them, and puts off the alarm that ends this process should the caller not be able to."""
    latest = -math.inf      # when the caller was told

    def tick() -> None:
        nonlocal latest
        now = time.monotonic()
        if now - latest > min(timeout / 4, 1):
            latest = now
            signal.setitimer(signal.ITIMER_REAL, timeout + 5)
            connection.sendall(b"{}\n")

    tick()
    return tick


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]))
