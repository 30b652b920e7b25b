"""What a run of train.py tells: files, a line a step on the console, and on request TensorBoard.

    OUTPUT/metrics.jsonl        numbers, a line a step
    OUTPUT/samples.jsonl        a completion of each group, with its reward
    OUTPUT/tensorboard/         the numbers of metrics.jsonl and evaluations.jsonl: those that every task has its own
                                of by task, such as TVG/reward, the others as step/kl and held_out/mIoU
"""
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from engine import files

BY_TASK = ("reward", "format", "tokens", "truncated", "flat", "verbs_said")     # and the task's own part of the reward
WATCHED = ("kl", "tokens", "seconds")       # on the console, behind the reward and its parts; all are in metrics.jsonl


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


def rewind(path: str | Path, step: int, gaps: bool = False) -> None:
    """Keep the lines of a log that steps before `step` wrote; those after it, and after a torn one, are written
    again. Says so when lines of steps before it are missing, unless it has `gaps`."""
    lines, last = [], -1
    for line in Path(path).read_text("utf-8", "replace").splitlines(keepends=True) if Path(path).exists() else ():
        try:
            written = json.loads(line)["step"]
            if not line.endswith("\n") or not 0 <= written < step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        lines.append(line)
        last = written
    if last < step - 1 and not gaps:
        say(f"{path}: has no lines of steps {last + 1} to {step - 1}, which the checkpoint is behind")
    files.write_whole(path, "".join(lines))


class Logs:
    """Only the first process, of rank 0, writes. What an earlier run wrote from `step` on is taken out first."""

    def __init__(self, output: Path, rank: int, group_size: int, step: int, tensorboard: bool = False):
        self.output, self.first, self.group_size, self.named, self.board = output, rank == 0, group_size, set(), None
        if not self.first:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            rewind(output / name, step)
        self.board = open_board(output, step) if tensorboard else None

    def step(self, numbers: dict, rows: list[dict], seconds: float) -> None:
        """Tell of one step: its numbers, with "step", "task" and the name of the reward's "part", a row for each
        completion, and once the name of every video that had to be replaced."""
        if not self.first:
            return
        bad = [error for row in rows for error in row.pop("bad_videos")]
        skipped = files.not_finite(numbers)
        numbers = {**numbers, "bad_videos": len(bad), "seconds": seconds,
                   "tokens_per_second": sum(row["tokens"] for row in rows) / seconds}
        files.append(self.output / "metrics.jsonl", [numbers])
        files.append(self.output / "samples.jsonl", [{"step": numbers["step"], "task": numbers["task"], **row}
                                                      for row in rows[::self.group_size]])
        say(short(numbers))
        if self.board:
            write_step(self.board, numbers)
        if skipped:
            changes = f"stops after {done} update(s)" if (done := numbers["updates"]) else "changes nothing"
            say(f"step {numbers['step']} {changes}: {', '.join(skipped)} not finite")
        for error in sorted(set(bad) - self.named):
            say(f"replaced by another sample: {error}")
        self.named.update(bad)

    def evaluation(self, row: dict) -> None:
        """Tell TensorBoard of a line of evaluations.jsonl; the rest is engine/best.py's."""
        if self.board:
            write_evaluation(self.board, row)


def short(numbers: dict) -> str:
    """A line of what a person watches: `step 12  VC  reward 1.12 = format 0.88 + vc 0.25  kl 0.0031  tokens 41 ...`"""
    shown = lambda key: f"{key} {numbers[key]:.3g}" if isinstance(numbers.get(key), (int, float)) else f"{key} -"
    return (f"step {numbers['step']}  {numbers['task']:3}  {shown('reward')} = {shown('format')} + "
            f"{shown(numbers['part'])}  " + "  ".join(map(shown, WATCHED)))


def check_board() -> None:
    """Raise ValueError where TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard needs a package more: pip install tensorboard") from error


def open_board(output: Path, step: int):
    """A torch SummaryWriter of OUTPUT/tensorboard, which has again what is in the files: so a run that goes on has
    every step once."""
    from torch.utils.tensorboard import SummaryWriter
    shutil.rmtree(output / "tensorboard", ignore_errors=True)
    board = SummaryWriter(output / "tensorboard")
    for name, write in (("metrics.jsonl", write_step), ("evaluations.jsonl", write_evaluation)):
        for line in (output / name).read_text().splitlines() if (output / name).exists() else ():
            write(board, json.loads(line))
    return board


def write_step(board, numbers: dict) -> None:
    for key, value in numbers.items():
        if key != "step" and isinstance(value, (int, float)):
            of = numbers["task"] if key in (*BY_TASK, numbers["part"]) else "step"
            board.add_scalar(f"{of}/{key}", value, numbers["step"])
    board.flush()


def write_evaluation(board, row: dict) -> None:
    for key, value in row.items():
        if key != "step" and isinstance(value, (int, float)):
            board.add_scalar(f"held_out/{key}", value, row["step"])
    board.flush()
