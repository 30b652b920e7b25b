"""Checkpoints of a training run, from which `--resume` continues it wherever it was killed, and its best model.

    OUTPUT/checkpoints/step_000100/     after 100 steps: the policy's weights and AdamW's averages in safetensors
                                        files, some for each process, and state.json: next step, counters, config,
                                        and a CRC-32 of each of these files
    OUTPUT/checkpoints/step_000100.tmp  is being written, or was when the run was killed; the next one deletes it
    OUTPUT/evaluations.jsonl            {"step": steps done, "mIoU": ..., ...}, one line per evaluation on held-out
                                        queries; lines of steps after a checkpoint come again when the run goes on
    OUTPUT/best/                        the model with the highest mIoU of these, the earliest of several, and in
                                        evaluation.jsonl its line

A folder gets its name when all processes have written it, so what has a name is whole. torch.distributed.checkpoint
cuts the tensors anew for any number of processes (several nodes need a shared OUTPUT). Nothing is pickled. What a run
draws follows from seed and step, so no random state is kept; the reference comes from --model again.
"""
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from engine import files, lora
from engine.distributed import gather
from engine.logs import rewind, say

KEPT = 2                # checkpoints, the newest ones
TENSORS_PER_FILE = 64   # a file is put together in memory
# begin the names of scores that the console has no room for
HIDDEN = ("R1>", "best_window", "event_", "un")
# it says so whenever one process works alone
warnings.filterwarnings("ignore", "torch.distributed is disabled")


def is_first() -> bool:
    """Whether this is the first process of all, which writes what there is once."""
    return not dist.is_initialized() or dist.get_rank() == 0


def tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that training changes, by name: the parameters, or the adapters alone where these learn, and AdamW's state
    of those that it has stepped on."""
    parameters = lora.adapters(policy) or dict(policy.named_parameters())
    states = {f"{name}.{key}": value for name, parameter in parameters.items()
              for key, value in optimizer.state[parameter].items()}
    return parameters | states


def finished(output: str | Path) -> list[Path]:
    """The whole checkpoints of a run, the newest last."""
    folders = [path for path in Path(output, "checkpoints").glob("step_*")
               if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step_")))


def newest(output: str | Path) -> Path | None:
    folders = finished(output)
    return folders[-1] if folders else None


def write(folder: Path, state: dict, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, then delete all but the newest KEPT; every process calls it. Raises OSError."""
    unfinished, output = folder.with_name(folder.name + ".tmp"), folder.parent.parent
    if is_first():
        discard(*folder.parent.glob("*.tmp"), folder)
    gather([])              # none has begun to write what is deleted here
    content = tensors(policy, optimizer)
    file_of = {name: 1 + i // TENSORS_PER_FILE for i, name in enumerate(content)}
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True,
                                          fqn_to_index_mapping=file_of)
    try:
        dcp.save(content, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:        # every process gets it, whichever failed
        if is_first():
            discard(unfinished)
        raise OSError(f"{folder}: could not be written ({cause(error)}); mend that, then go on "
                      f"with --resume from {newest(output) or 'the beginning'}") from error
    state = {**state, "crc32": checksums(unfinished)}
    if is_first():
        files.write_whole(unfinished / "state.json", json.dumps(state, indent=2) + "\n")
        os.replace(unfinished, folder)
        discard(*finished(output)[:-KEPT])
    gather([])              # nobody goes on, or ends, before it has its name


def cause(error: Exception) -> Exception:
    """The first error behind one of torch's distributed checkpoints."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each safetensors file of a checkpoint, of which every process reads its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    gather([])              # all are written
    mine = []
    for path in sorted(folder.glob("*.safetensors"))[rank::world]:
        value = 0
        with open(path, "rb") as file:
            while block := file.read(2 ** 24):
                value = zlib.crc32(block, value)
        mine.append((path.name, value))
    return dict(sorted(gather(mine)))


def discard(*folders: Path) -> None:
    """Delete checkpoints; a half deleted one has no name of a whole one."""
    for folder in folders:
        if folder.exists():
            unfinished = folder.with_suffix(".tmp")
            os.replace(folder, unfinished)
            shutil.rmtree(unfinished)


def restore(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill a policy and its new optimizer from a checkpoint, each process its share. Raises ValueError when the
    checkpoint is not what was written, or not of this model."""
    written, there = json.loads((folder / "state.json").read_text())["crc32"], checksums(folder)
    changed = [name for name in sorted({**written, **there})
               if written.get(name) != there.get(name)]
    if changed:
        raise ValueError(f"{folder}: {', '.join(changed)} is not as it was written; delete the "
                         "folder to go on from the one before")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        stored = reader.read_metadata().state_dict_metadata
        for name, parameter in policy.named_parameters():
            if f"{name}.exp_avg" in stored:             # AdamW has none before its first step
                optimizer.state[parameter] = {"step": torch.zeros(()),
                                              "exp_avg": torch.zeros_like(parameter),
                                              "exp_avg_sq": torch.zeros_like(parameter)}
        dcp.load(tensors(policy, optimizer), storage_reader=reader,
                 no_dist=not dist.is_initialized())
    except (CheckpointException, SafetensorError, OSError) as error:
        raise ValueError(f"{folder}: does not fit --model or is damaged ({cause(error)}); give the "
                         "model it was made from, or delete it to go on from the one "
                         "before") from error


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint. Raises ValueError, which names it, when it is not what `write` wrote."""
    kinds = {"step": int, "bad_steps": int, "bad_in_a_row": list, "files": dict, "config": dict,
             "crc32": dict}
    try:
        state = json.loads(path.read_text())
        wrong = [name for name, kind in kinds.items() if type(state[name]) is not kind]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        wrong = [repr(error)]
    if wrong:
        raise ValueError(f"{path.parent}: its state.json cannot be used ({', '.join(wrong)}); "
                         "delete the folder to go on from the one before")
    return state


class Evaluations:
    """The evaluations of a run: when one is due, and what is kept of it. Every process makes one and calls it alike."""

    def __init__(self, output: str | Path, step: int, every: int, steps: int):
        """`step`: steps done so far; an evaluation is due before the first one, every `every` (0: not), after `steps`.
        A run that goes on keeps its best, whichever step that is from."""
        self.output, self.every, self.steps = Path(output), every, steps
        lines = []
        if is_first():
            self.restore_best()
            rewind(self.output / "evaluations.jsonl", step + 1, gaps=True)
            names = ("evaluations.jsonl", "best/evaluation.jsonl")
            lines = [[read_lines(self.output / name) for name in names]]
        (evaluations, best), = gather(lines)
        self.done = {row["step"] for row in evaluations}
        self.best = max((row["mIoU"] for row in best), default=-1.0)

    def restore_best(self) -> None:
        """Where a run was killed while best/ changed, give the whole one its name."""
        best = self.output / "best"
        for name in ("best.new", "best.old"):
            if not best.exists() and (self.output / name / "evaluation.jsonl").exists():
                os.replace(self.output / name, best)
            shutil.rmtree(self.output / name, ignore_errors=True)

    def due(self, step: int) -> bool:
        if step in self.done:
            return False
        return step in (0, self.steps) or self.every > 0 and step % self.every == 0

    def add(self, row: dict, save: Callable[[Path], None]) -> None:
        """Log a row of "step" and scores, and if its mIoU is the highest so far, save(folder) the model as best/."""
        self.done.add(row["step"])
        is_best = row["mIoU"] > self.best
        best, new, old = (self.output / name for name in ("best", "best.new", "best.old"))
        if is_best:
            self.best = row["mIoU"]
            save(new)
        if not is_first():
            return
        if is_best:
            files.write_whole(new / "evaluation.jsonl", json.dumps(row) + "\n")
            # a folder cannot replace another: whenever this is killed, one of them is whole
            if best.exists():
                os.replace(best, old)
            os.replace(new, best)
            shutil.rmtree(old, ignore_errors=True)
        files.append(self.output / "evaluations.jsonl", [row])
        scores = [f"{name} {value:.3g}" for name, value in row.items()
                  if isinstance(value, float) and not name.startswith(HIDDEN)]
        say(f"after {row['step']} steps, held out: "
            f"{'  '.join(scores)}{', the best so far' if is_best else ''}")


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSON-lines file, none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
