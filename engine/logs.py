"""What a run tells: lines on the console, files, and on request TensorBoard.

    OUTPUT/metrics.jsonl        the metrics, one line per step
    OUTPUT/samples.jsonl        the first completion of each group, with its reward
    OUTPUT/tensorboard/         the metrics of metrics.jsonl and evaluations.jsonl: by task, such as TVG/reward, those
                                that each task has of its own, the others as step/kl and held_out/mIoU
"""
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from engine import files

# and the task's own part of the reward
BY_TASK = ("reward", "format", "tokens", "truncated", "flat", "verbs_said")
# behind the reward and its parts; all metrics are in metrics.jsonl
ON_CONSOLE = ("kl", "tokens", "seconds")


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
    path, kept, last = Path(path), [], -1
    lines = path.read_text("utf-8", "replace").splitlines(keepends=True) if path.exists() else []
    for line in lines:
        try:
            written = json.loads(line)["step"]
            if not line.endswith("\n") or not 0 <= written < step:
                break
        except (ValueError, KeyError, TypeError, RecursionError):
            break
        kept.append(line)
        last = written
    if last < step - 1 and not gaps:
        say(f"{path}: has no lines of steps {last + 1} to {step - 1}, which the checkpoint is "
            "behind")
    files.write_whole(path, "".join(kept))


def describe(batch: Any, rollouts: Any, texts: list[str], rewards: list, advantages: Any,
             stop_ids: list[int]) -> list[dict]:
    """One row for each of the B * G completions of a Batch: what it was, and what it earned."""
    lengths = rollouts.mask.sum(-1)                                                 # (B, G)
    mean_logprobs = (rollouts.logprobs.sum(-1) / lengths).flatten().tolist()
    last_tokens = rollouts.completions.gather(-1, lengths[..., None] - 1).flatten().tolist()
    group_size, rows = lengths.shape[1], []
    columns = zip(texts, rewards, advantages.flatten().tolist(), lengths.flatten().tolist(),
                  mean_logprobs, last_tokens, strict=True)
    for i, (text, reward, advantage, length, logprob, last_token) in enumerate(columns):
        picked = batch.picked[i // group_size]
        rows.append({"index": picked.index, "id": picked.sample.id, "query": picked.sample.query,
                     "completion": text,
                     "reward": reward.total, **reward.parts, **reward.info, "advantage": advantage,
                     "tokens": length, "logprob": logprob, "truncated": last_token not in stop_ids})
    return rows


def summarise(part: str, rows: list[dict]) -> dict[str, float]:
    """Means over the completions of a step, and `flat`, the share of groups without any advantage; `part` names the
    task's own part of the reward."""
    names = ("reward", "format", part, "tokens", "logprob", "truncated", "verbs_said")
    means = {name: float(np.mean([row[name] for row in rows])) for name in names if name in rows[0]}
    groups = {}
    for row in rows:
        groups.setdefault(row["index"], []).append(row["advantage"])
    flat = [not any(advantages) for advantages in groups.values()]
    return {**means, "flat": float(np.mean(flat))}


class Logs:
    """Only the process of rank 0 writes. What an earlier run wrote from `step` on is taken out first."""

    def __init__(self, output: Path, rank: int, step: int, tensorboard: bool = False):
        self.output, self.is_first = output, rank == 0
        self.named = set()          # errors of videos that were told
        self.board = None
        if self.is_first:
            for name in ("metrics.jsonl", "samples.jsonl"):
                rewind(output / name, step)
            if tensorboard:
                self.board = open_board(output, step)

    def step(self, metrics: dict, rows: list[dict], bad_videos: list[str], seconds: float) -> None:
        """Tell of one step: its metrics, in GRPO with "task" and the name of the reward's "part", one row for each
        completion, and once the name of every video that had to be replaced."""
        if not self.is_first:
            return
        skipped = files.not_finite(metrics)
        metrics = {**metrics, "bad_videos": len(bad_videos), "seconds": seconds}
        if rows:
            metrics["tokens_per_second"] = sum(row["tokens"] for row in rows) / seconds
            first_of_groups = {row["index"]: row for row in reversed(rows)}
            samples = [{"step": metrics["step"], "task": metrics["task"], **row} for row in
                       reversed(first_of_groups.values())]
            files.append(self.output / "samples.jsonl", samples)
            say(short(metrics))
        files.append(self.output / "metrics.jsonl", [metrics])
        if self.board:
            write_step(self.board, metrics)
        if skipped:
            updates = metrics.get("updates", 0)
            changes = f"stops after {updates} update(s)" if updates else "changes nothing"
            say(f"step {metrics['step']} {changes}: {', '.join(skipped)} not finite")
        for error in sorted(set(bad_videos) - self.named):
            say(f"replaced by another sample: {error}")
        self.named.update(bad_videos)

    def evaluation(self, row: dict) -> None:
        """Tell TensorBoard of a line of evaluations.jsonl."""
        if self.board:
            write_evaluation(self.board, row)


def short(metrics: dict) -> str:
    """A line of what a person watches: `step 12  VC  reward 1.12 = format 0.88 + vc 0.25  kl 0.0031  tokens 41 ...`"""
    def shown(name: str) -> str:
        value = metrics.get(name)
        return f"{name} {value:.3g}" if isinstance(value, (int, float)) else f"{name} -"

    rewards = f"{shown('reward')} = {shown('format')} + {shown(metrics['part'])}"
    others = "  ".join(map(shown, ON_CONSOLE))
    return f"step {metrics['step']}  {metrics['task']:3}  {rewards}  {others}"


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
        path = output / name
        for line in path.read_text().splitlines() if path.exists() else ():
            write(board, json.loads(line))
    return board


def write_step(board, metrics: dict) -> None:
    for name, value in metrics.items():
        if name != "step" and isinstance(value, (int, float)):
            group = metrics["task"] if name in (*BY_TASK, metrics["part"]) else "step"
            board.add_scalar(f"{group}/{name}", value, metrics["step"])
    board.flush()


def write_evaluation(board, row: dict) -> None:
    for name, value in row.items():
        if name != "step" and isinstance(value, (int, float)):
            board.add_scalar(f"held_out/{name}", value, row["step"])
    board.flush()
