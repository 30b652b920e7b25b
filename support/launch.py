"""From a command line to `main(config)`: flags, errors of one line, processes, signals, logs. Every script starts
through here."""
import dataclasses
import fcntl
import json
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
LOCK = "in_use"     # the file in --output that a run holds
logging.disable_progress_bar()      # transformers' own, for every file it reads


def flag(default: Any, help: str) -> Any:
    """A field of a Config: its default value, MISSING where the user has to give one, and its reason."""
    return dataclasses.field(default=default, metadata={"help": help}) if not isinstance(default, list) else \
        dataclasses.field(default_factory=default.copy, metadata={"help": help})


def command_line(Config: type, main: Callable, doc: str) -> None:
    """Parse the flags of a Config dataclass and run main(config). A wrong input (any ValueError that a person can
    mend) or a full disk ends with one line and exit code 2, the loss of another process with one line and 1, Ctrl-C
    with one line and 130. A reader of the output that goes away ends nothing."""
    script = Path(sys.argv[0]).name
    parser = HfArgumentParser(Config, description=doc.split("\n\n")[0], allow_abbrev=False,
                              usage="%(prog)s --flag value ...   (--help lists the flags)")
    with surviving_output():
        try:
            config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
            if unknown:
                raise ValueError(f"unknown: {' '.join(unknown)}; --help lists the flags")
            main(config)
        except (ValueError, OSError, RuntimeError) as error:
            lost = isinstance(error, RuntimeError) and "onnection " in str(error) and dist.is_initialized()
            if os.environ.get("TRACEBACK") or isinstance(error, RuntimeError) and not lost:
                raise
            text = "another process of the run ended; its message or torchrun's says why" if lost else str(error)
            print(f"{script}: {printable(' '.join(text.split()))}  (TRACEBACK=1 shows where)", file=sys.stderr)
            sys.exit(1 if lost else 2)
        except KeyboardInterrupt:
            print(f"\n{script}: stopped; the same command, with --resume where the script has it, goes on",
                  file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)       # threads that decode are not waited for
        except SystemExit as stopped:
            if stopped.code:
                raise
    if dist.is_initialized():
        dist.destroy_process_group()


class Survivor:
    """Standard output or error, which goes on silently when nobody reads it any more."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:         # a closed pipe, or a terminal that is gone
            self.mute()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.mute()

    def mute(self) -> None:
        """From now on, and for what is still buffered, the file descriptor leads nowhere."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def surviving_output() -> Iterator[None]:
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Survivor, before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def printable(text: str) -> str:
    """A text with escapes in place of control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """Print a line of a log above the progress bar."""
    tqdm.write(printable(text))


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


def check_numbers(config: Any, *positive: str) -> None:
    """Raise ValueError, naming the flag, unless every number of a Config is finite and not negative, those named here
    above 0, and a probability, ..._prob, at most 1."""
    for name, value in vars(config).items():
        if type(value) in (int, float):
            below, high = name not in positive, 1 if name.endswith("_prob") else 1e12
            if not (0 < value <= high or below and value == 0):     # not so for NaN, either
                raise ValueError(f"--{name} {value}: give a number {'from' if below else 'above'} 0" +
                                 (" to 1" if high == 1 else " on" if below else ""))


def check_output(path: str | Path, flag: str = "--output") -> None:
    """Raise ValueError, naming the flag, unless files can be made in the folder `path`, or in the nearest one above it
    that exists. Makes nothing that stays."""
    try:
        there = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written to ({error.strerror}); give another folder") from error


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


def start_process() -> tuple[int, int, str]:
    """(rank, number of processes, device) of this process. torchrun sets the environment; without it one process
    works alone, and on a GPU still through FSDP2, so that its weights are kept in fp32 and used in bf16."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size(), device
    backend = "nccl" if device != "cpu" else "gloo"
    if device != "cpu":
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timedelta(hours=4))    # evaluation meets only at its end
    elif device != "cpu":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return (dist.get_rank(), dist.get_world_size(), device) if dist.is_initialized() else (0, 1, device)


def gather(mine: list) -> list:
    """The lists of all processes as one, in the order of their ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def full_norm(norm: torch.Tensor) -> float:
    """A gradient norm that may be spread over the processes, as a number."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def not_finite(numbers: dict) -> list[str]:
    """The names of the numbers that are infinite or not a number."""
    return [name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value)]


def append(path: str | Path, rows: list[dict]) -> None:
    """Add rows to a JSON-lines file; numbers that are not finite become null, which JSON has."""
    rows = [{**row, **dict.fromkeys(not_finite(row))} for row in rows]
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror})") from error


def write_whole(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename it, so that nobody ever reads half of it."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())     # else a power cut may leave the name without the text
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror})") from error


def write_config(config: Any, folder: str | Path) -> None:
    write_whole(Path(folder) / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
