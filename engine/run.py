"""One run in one output folder: the lock that it holds, and the signals that end it."""
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from engine.distributed import gather, start_process
from engine.files import check_output
from engine.logs import say

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
LOCK = "in_use"     # the file in --output that a run holds


def one_run(main: Callable) -> Callable:
    """Of a script's main(config): refuses a --output in which another process is at work. The lock is the kernel's, so
    that a kill frees it; the first of several processes holds it for all, also on a disk that nodes share."""
    @wraps(main)
    def locked(config: Any) -> Any:
        if not config.output:
            return main(config)
        check_output(config.output)
        rank, _, _ = start_process()
        with held(Path(config.output), rank) as problem:
            if problem := gather([problem] if rank == 0 else [])[0]:
                raise ValueError(problem)
            return main(config)
    return locked


@contextmanager
def held(folder: Path, rank: int) -> Iterator[str | None]:
    """Hold the lock of a folder, or say why not. It leaves no file, and no folder in which nothing was written."""
    if rank > 0 or folder.exists() and not folder.is_dir():     # the script says what is wrong with a file
        yield None
        return
    path, problem = folder / LOCK, None
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                raise BlockingIOError       # its holder has just ended and deleted it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}, {Path(sys.argv[0]).name} since "
                       f"{time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            problem = (f"--output {folder} is in use by {file.read() or 'a process that is just ending'}; give another "
                       "folder, or wait until it has ended")
        except OSError as error:            # a disk without locks
            say(f"{folder}: cannot be locked ({error.strerror}), so make sure that no other run writes to it")
        try:
            yield problem
        finally:
            if not problem:
                path.unlink(missing_ok=True)
                if not any(folder.iterdir()):
                    folder.rmdir()


def occupied(folder: str | Path) -> bool:
    """Whether there is anything at `folder` but an empty folder, or one with a lock."""
    folder = Path(folder)
    return folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An Event that STOPPING signals set, so that a run can end after its step: SIGTERM, Ctrl-C, a closed terminal (but
    not under nohup), a scheduler's warning. Another one ends the process at once, unless it comes within two seconds:
    torchrun and a scheduler may both pass on the same one. Only in a main thread, where Python allows it; afterwards
    signals do what they did before."""
    asked, since = threading.Event(), []

    def handle(number, frame):
        since.append(time.monotonic())
        if asked.is_set() and since[-1] - since[0] > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not asked.is_set() and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step, with a checkpoint for --resume; a second signal ends it now\n")
        asked.set()

    main_thread = threading.current_thread() is threading.main_thread()
    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in STOPPING if main_thread and not (number == signal.SIGHUP and under_nohup)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
