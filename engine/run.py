"""One training run in one output folder: its lock, where it starts, its steps, its logs, its checkpoints, its end."""
import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from engine import checkpoint, files, lora
from engine.batches import Batch
from engine.distributed import gather, start_process
from engine.logs import Logs, say, summarise

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
LOCK = "in_use"         # the file in --output that a run holds
# steps in a row with a loss, reward or gradient that is not finite, after which a run ends
MAX_BAD_STEPS = 10
# flags that a resumed run may give another value
MAY_CHANGE = {"output", "videos", "cache", "cache_gb", "video_timeout", "workers", "steps",
              "save_every", "resume", "micro_batch_size", "learning_rate",
              "gradient_checkpointing", "eval_every", "tensorboard"}


class Run:
    """A training run in its output folder. Uses the fields model, annotations, output, steps, save_every, resume and,
    where the script has it, tensorboard of `config`."""

    def __init__(self, config: Any):
        """Look at the output folder before anything is loaded. Raises ValueError when the folder is not empty and the
        run is not to go on, or when the checkpoint in it was made with other flags."""
        self.config, self.output, self.notes = config, Path(config.output), []
        self.rank, self.world, _ = start_process()
        self.step = 0                                       # the next one
        self.bad_steps, self.bad_in_a_row = 0, []           # steps that changed nothing
        self.stop = threading.Event()               # a signal of STOPPING came: see stop_signals
        is_occupied, self.start = gather([(occupied(self.output),
                                           checkpoint.newest(self.output))])[0]
        if is_occupied and not config.resume:
            raise ValueError(f"--output {self.output} is not empty; give --resume to continue the "
                             "run in it, or another folder")
        inputs = [Path(config.annotations), *lora.files(config.model, "*.safetensors")]
        stats = {path.name: path.stat() for path in inputs if path.exists()}
        self.files = {name: [stat.st_size, int(stat.st_mtime)] for name, stat in stats.items()}
        if self.start:
            self.continue_from(checkpoint.read_state(self.start / "state.json"))
        elif (self.output / "model").exists():
            raise ValueError(f"--output {self.output} holds a finished run without a checkpoint to "
                             "go on from; give another folder, or delete it to begin anew")
        elif (self.output / "config.json").is_file():       # killed before its first checkpoint
            self.compare(self.output, files.read_config(self.output / "config.json"))

    def continue_from(self, state: dict) -> None:
        """Take the counters of a checkpoint's state. Raises ValueError when it was made with other flags."""
        self.step, self.bad_steps, self.bad_in_a_row = (state[key] for key in ("step", "bad_steps",
                                                                               "bad_in_a_row"))
        self.compare(self.start, state["config"])
        for name in self.files:
            if state["files"].get(name) != self.files[name]:
                self.notes.append(f"{name} has another size or date than when {self.start} was "
                                  "made: is it the same?")
        if self.step >= self.config.steps:
            self.notes.append(f"{self.start} has done --steps {self.config.steps}: only model/ is "
                              "written")

    def compare(self, place: Path, before: dict) -> None:
        """Raise ValueError unless the run in `place`, with the config `before`, is this one."""
        now = asdict(self.config)
        other_flags = sorted(now.keys() ^ before.keys())
        if other_flags:
            raise ValueError(f"{place} was made by another script, or another version of it (--"
                             f"{' --'.join(other_flags)}); give another --output")
        for name in files.changed_flags(now, before):
            if name not in MAY_CHANGE:
                raise ValueError(f"--{name} {now[name]}: {place} was made with {before[name]}; "
                                 "give the same flag to --resume, or start in another --output")
            if name != "resume":
                self.notes.append(f"--{name} was {before[name]}, is {now[name]} from step "
                                  f"{self.step} on")

    def restore(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill them from the checkpoint that the run goes on from, if any."""
        self.policy, self.optimizer = policy, optimizer     # what save_if_due writes
        self.logs = Logs(self.output, self.rank, self.step,
                         getattr(self.config, "tensorboard", False))
        if self.start:
            checkpoint.restore(self.start, policy, optimizer)

    def announce(self, line: str, rejected: list) -> None:
        """Write the config, and say what there is to train on, what not, and what a resumed run has to say."""
        if self.rank > 0:
            return
        if self.step < self.config.steps:       # else only model/ is written
            files.write_config(self.config, self.output)
        say(f"{line}; {self.world} process(es)")
        for note in (*(f"rejected {item}" for item in rejected), *self.notes):
            say(note)

    def steps(self, title: str) -> Iterator[int]:
        """The steps that are left, with a progress bar."""
        self.bar = tqdm(range(self.step, self.config.steps), title, initial=self.step,
                        total=self.config.steps, disable=self.rank > 0, dynamic_ncols=True)
        for step in self.bar:
            self.began = time.perf_counter()
            yield step

    def log(self, step: int, metrics: dict, batch: Batch, completions: list[dict] = ()) -> None:
        """Log a step: its metrics, which videos of the batch were replaced, and in GRPO what logs.describe says of this
        process's completions."""
        rows = sorted(gather(list(completions)), key=lambda row: row["index"])
        bad_videos = gather([str(error) for picked in batch.picked for error in picked.errors])
        if rows:
            task = batch.task
            metrics = {"task": task.name, "part": task.part, **summarise(task.part, rows),
                       **metrics}
        else:
            self.bar.set_postfix(loss=f"{metrics['loss']:.3f}")
        bad = files.not_finite(metrics)
        if bad:
            self.bad_steps += 1
            self.bad_in_a_row.append(f"{' and '.join(bad)} in step {step}")
        elif metrics["loss"] is not None:       # None: a flat batch, which proves nothing
            self.bad_in_a_row = []
        learning_rate = self.optimizer.param_groups[0]["lr"]
        metrics = {"step": step, **metrics, "bad_steps": self.bad_steps, "lr": learning_rate}
        self.logs.step(metrics, rows, bad_videos, time.perf_counter() - self.began)

    def evaluation(self, row: dict) -> None:
        """Tell of an evaluation on held-out queries what engine/checkpoint.Evaluations does not."""
        self.logs.evaluation(row)

    def save_if_due(self, step: int) -> None:
        """After each step, by every process: write a checkpoint when one is due, and end the program when a signal
        came to any process. Raises ValueError after too many bad steps in a row."""
        self.step = step + 1
        if len(self.bad_in_a_row) >= MAX_BAD_STEPS:
            newest = checkpoint.newest(self.output)
            advice = "There is no checkpoint yet; try a lower --learning_rate"
            if newest:
                advice = (f"Go back to {newest} with --resume and a lower --learning_rate, or "
                          "further by deleting it")
            raise ValueError(f"not finite: {', '.join(self.bad_in_a_row)}; that is {MAX_BAD_STEPS} "
                             f"steps in a row. {advice}")
        stopping = any(gather([self.stop.is_set()]))
        every = self.config.save_every
        # none on the way through bad steps, so that the newest one is from before the trouble
        is_due = every > 0 and self.step % every == 0 and not self.bad_in_a_row
        if is_due or stopping or self.step == self.config.steps:
            state = {"step": self.step, "bad_steps": self.bad_steps,
                     "bad_in_a_row": self.bad_in_a_row,
                     "files": self.files, "config": asdict(self.config)}
            folder = self.output / "checkpoints" / f"step_{self.step:06d}"
            checkpoint.write(folder, state, self.policy, self.optimizer)
        if stopping:
            sys.exit(0)


def one_run(main: Callable) -> Callable:
    """Of a script's main(config): refuses an --output in which another process is at work. The lock is the kernel's, so
    that a kill frees it; the first of several processes holds it for all, also on a disk that nodes share."""
    @wraps(main)
    def locked(config: Any) -> Any:
        if not config.output:
            return main(config)
        files.check_output(config.output)
        rank, _, _ = start_process()
        with lock(Path(config.output), rank) as problem:
            problem, = gather([problem] if rank == 0 else [])
            if problem:
                raise ValueError(problem)
            return main(config)
    return locked


@contextmanager
def lock(folder: Path, rank: int) -> Iterator[str | None]:
    """Hold the lock of a folder, or say why not. It leaves no file, and no folder in which nothing was written."""
    # the script says what is wrong with a file
    if rank > 0 or folder.exists() and not folder.is_dir():
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
            file.write(f"process {os.getpid()} on {socket.gethostname()}, {Path(sys.argv[0]).name} "
                       f"since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
        except BlockingIOError:
            file.seek(0)
            holder = file.read() or "a process that is just ending"
            problem = (f"--output {folder} is in use by {holder}; give another folder, or wait "
                       "until it has ended")
        except OSError as error:            # a disk without locks
            say(f"{folder}: cannot be locked ({error.strerror}), so make sure that no other run "
                "writes to it")
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
    if not folder.is_dir():
        return folder.exists()
    return any(path.name != LOCK for path in folder.iterdir())


@contextmanager
def stop_signals(stop: threading.Event) -> Iterator[None]:
    """Within it, signals of STOPPING set the event `stop`, so that a run can end after its step: SIGTERM, Ctrl-C, a
    closed terminal (but not under nohup), a scheduler's warning. A second signal ends the process at once, unless it
    comes within two seconds: torchrun and a scheduler may both pass on the same one. Only in a main thread, where
    Python allows it; afterwards signals do what they did before."""
    first = None

    def handle(number, frame):
        nonlocal first
        now = time.monotonic()
        if first is not None and now - first > 2:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if first is None and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step, with a checkpoint for --resume; a second "
                        b"signal ends it now\n")
        first = now if first is None else first
        stop.set()

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for number in STOPPING:
            if not (number == signal.SIGHUP and under_nohup):
                handlers[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
