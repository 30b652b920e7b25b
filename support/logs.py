"""What a run of train.py tells: files, a line a step on the console, and on request TensorBoard.

    OUTPUT/metrics.jsonl        numbers, a line a step
    OUTPUT/samples.jsonl        a completion of each group, with its reward
    OUTPUT/tensorboard/         the numbers of metrics.jsonl and evaluations.jsonl: those that every task has its own
                                of by task, such as TVG/reward, the others as step/kl and held_out/mIoU
"""
import json
import shutil
from pathlib import Path

from support import checkpoint, launch

BY_TASK = ("reward", "format", "tokens", "truncated", "flat", "verbs_said")     # and the task's own part of the reward
WATCHED = ("kl", "tokens", "seconds")       # on the console, behind the reward and its parts; all are in metrics.jsonl


class Logs:
    """Only the first process, of rank 0, writes. What an earlier run wrote from `step` on is taken out first."""

    def __init__(self, output: Path, rank: int, group_size: int, step: int, tensorboard: bool = False):
        self.output, self.first, self.group_size, self.named, self.board = output, rank == 0, group_size, set(), None
        if not self.first:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            checkpoint.rewind(output / name, step)
        self.board = open_board(output, step) if tensorboard else None

    def step(self, numbers: dict, rows: list[dict], seconds: float) -> None:
        """Tell of one step: its numbers, with "step", "task" and the name of the reward's "part", a row for each
        completion, and once the name of every video that had to be replaced."""
        if not self.first:
            return
        bad = [error for row in rows for error in row.pop("bad_videos")]
        skipped = launch.not_finite(numbers)
        numbers = {**numbers, "bad_videos": len(bad), "seconds": seconds,
                   "tokens_per_second": sum(row["tokens"] for row in rows) / seconds}
        launch.append(self.output / "metrics.jsonl", [numbers])
        launch.append(self.output / "samples.jsonl", [{"step": numbers["step"], "task": numbers["task"], **row}
                                                      for row in rows[::self.group_size]])
        launch.say(short(numbers))
        if self.board:
            write_step(self.board, numbers)
        if skipped:
            changes = f"stops after {done} update(s)" if (done := numbers["updates"]) else "changes nothing"
            launch.say(f"step {numbers['step']} {changes}: {', '.join(skipped)} not finite")
        for error in sorted(set(bad) - self.named):
            launch.say(f"replaced by another sample: {error}")
        self.named.update(bad)

    def evaluation(self, row: dict) -> None:
        """Tell TensorBoard of a line of evaluations.jsonl; the rest is support/best.py's."""
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
