"""What a model in training scores on held-out queries, a line an evaluation, and the best of them so far.

    OUTPUT/evaluations.jsonl    {"step": steps done, "mIoU": ..., ...}; what is after the checkpoint that a run goes on
                                from is taken out, and comes again
    OUTPUT/best/                the model with the highest mIoU, the earliest of several, as it is saved at the end, and
                                in evaluation.jsonl its line
"""
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from engine import distributed, files, logs

HIDDEN = ("R1>", "best_window", "event_", "un")      # begin the names of scores that the console has no room for


class Evaluations:
    """The evaluations of a run: when one is due, and what is kept of it. Every process makes one and calls it alike."""

    def __init__(self, output: str | Path, step: int, every: int, steps: int):
        """`step`: steps done so far; an evaluation is due before the first one, every `every` (0: not), after `steps`.
        A run that goes on keeps its best, whichever step that is from."""
        self.output, self.every, self.steps = Path(output), every, steps
        self.first = not dist.is_initialized() or dist.get_rank() == 0
        found = []
        if self.first:
            best = self.output / "best"
            for name in ("best.new", "best.old"):       # whole, but killed before it had its name
                if not best.exists() and (self.output / name / "evaluation.jsonl").exists():
                    os.replace(self.output / name, best)
                shutil.rmtree(self.output / name, ignore_errors=True)
            logs.rewind(self.output / "evaluations.jsonl", step + 1, gaps=True)
            read = lambda path: [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            found = [(read(self.output / "evaluations.jsonl"), read(best / "evaluation.jsonl"))]
        (rows, kept), = distributed.gather(found)
        self.done = {row["step"] for row in rows}
        self.best = max((row["mIoU"] for row in kept), default=-1.0)

    def due(self, step: int) -> bool:
        return step not in self.done and (step in (0, self.steps) or self.every > 0 and step % self.every == 0)

    def add(self, row: dict, save: Callable[[Path], None]) -> None:
        """Log a row of "step" and scores, and if its mIoU is the highest so far, save(folder) the model as best/."""
        if better := row["mIoU"] > self.best:
            self.best = row["mIoU"]
            save(self.output / "best.new")
        self.done.add(row["step"])
        if not self.first:
            return
        best, new, old = (self.output / name for name in ("best", "best.new", "best.old"))
        if better:
            files.write_whole(new / "evaluation.jsonl", json.dumps(row) + "\n")
            if best.exists():       # a folder cannot replace another: whenever this is killed, one of them is whole
                os.replace(best, old)
            os.replace(new, best)
            shutil.rmtree(old, ignore_errors=True)
        files.append(self.output / "evaluations.jsonl", [row])
        shown = {key: value for key, value in row.items() if isinstance(value, float) and not key.startswith(HIDDEN)}
        logs.say(f"after {row['step']} steps, held out: " + "  ".join(f"{key} {value:.3g}" for key, value in
                                                                         shown.items()) + ", the best so far" * better)
