"""Checkpoints of a training run, from which `--resume` continues it wherever it was killed.

    OUTPUT/checkpoints/step_000100/     after 100 steps: the policy's weights and AdamW's averages in safetensors
                                        files, some for each process, and state.json: next step, counters, config,
                                        and a CRC-32 of each of these files
    OUTPUT/checkpoints/step_000100.tmp  is being written, or was when the run was killed; the next one deletes it

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
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from engine import distributed, files, lora
from engine.run import occupied

MAY_CHANGE = {"output", "videos", "cache", "cache_gb", "video_timeout", "steps", "save_every", "keep", "resume",
              "micro_batch_size", "max_bad_steps", "learning_rate", "max_grad_norm", "workers",
              "gradient_checkpointing", "eval_every", "eval_videos",
              "tensorboard"}    # of a resumed run
TENSORS_A_FILE = 64     # a file is put together in memory
warnings.filterwarnings("ignore", "torch.distributed is disabled")      # it says so whenever one process works alone


def tensors(policy: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that training changes, by name: the parameters, or the adapters alone where these learn, and AdamW's state
    of those that it has stepped on."""
    named = lora.adapters(policy) or dict(policy.named_parameters())
    return named | {f"{name}.{key}": value for name, p in named.items() for key, value in optimizer.state[p].items()}


def finished(output: str | Path) -> list[Path]:
    """The whole checkpoints of a run, the newest last."""
    folders = [f for f in Path(output, "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", f.name)]
    return sorted(folders, key=lambda folder: int(folder.name[5:]))


def newest(output: str | Path) -> Path | None:
    return (finished(output) or [None])[-1]


def write(folder: Path, state: dict, policy: nn.Module, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Write a checkpoint, then delete all but the newest `keep`; every process calls it. Raises OSError."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    unfinished = folder.with_name(folder.name + ".tmp")
    if first:
        discard(*folder.parent.glob("*.tmp"), folder)
    distributed.gather([])       # none has begun to write what is deleted here
    content = tensors(policy, optimizer)
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True, fqn_to_index_mapping={
        name: 1 + i // TENSORS_A_FILE for i, name in enumerate(content)})
    try:
        dcp.save(content, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as error:        # every process gets it, whichever failed
        if first:
            discard(unfinished)
        cause = next(iter(error.failures.values()))[0]
        raise OSError(f"{folder}: could not be written ({cause}); mend that, then go on with --resume from "
                      f"{newest(folder.parent.parent) or 'the beginning'}") from error
    state = {**state, "crc32": checksums(unfinished)}
    if first:
        files.write_whole(unfinished / "state.json", json.dumps(state, indent=2) + "\n")
        os.replace(unfinished, folder)
        discard(*finished(folder.parent.parent)[:-keep])
    distributed.gather([])       # nobody goes on, or ends, before it has its name


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each safetensors file of a checkpoint, of which every process reads its share."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    distributed.gather([])       # all are written
    mine = []
    for path in sorted(folder.glob("*.safetensors"))[rank::world]:
        value = 0
        with open(path, "rb") as file:
            while part := file.read(2 ** 24):
                value = zlib.crc32(part, value)
        mine.append((path.name, value))
    return dict(sorted(distributed.gather(mine)))


def discard(*folders: Path) -> None:
    """Delete checkpoints; a half deleted one has no name of a whole one."""
    for folder in folders:
        if folder.exists():
            rest = folder.with_suffix(".tmp")
            os.replace(folder, rest)
            shutil.rmtree(rest)


def restore(folder: Path, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill a policy and its new optimizer from a checkpoint, each process its part. Raises ValueError when it is not
    what was written, or not of this model."""
    crc32, found = json.loads((folder / "state.json").read_text())["crc32"], checksums(folder)
    if changed := [name for name in sorted({**crc32, **found}) if crc32.get(name) != found.get(name)]:
        raise ValueError(f"{folder}: {', '.join(changed)} is not as it was written; delete the folder to go on from "
                         "the one before")
    reader = dcp.HuggingFaceStorageReader(str(folder))
    try:
        stored = reader.read_metadata().state_dict_metadata
        for name, p in policy.named_parameters():
            if f"{name}.exp_avg" in stored:             # AdamW has none before its first step
                optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p),
                                      "exp_avg_sq": torch.zeros_like(p)}
        dcp.load(tensors(policy, optimizer), storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, SafetensorError, OSError) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise ValueError(f"{folder}: does not fit --model or is damaged ({cause}); give the model it was made from, or "
                         "delete it to go on from the one before") from error


def compare_configs(now: dict, before: dict, may_change: set[str]) -> list[str]:
    """The names of the flags that have another value, or are in one of the two only."""
    absent = object()
    return [name for name in {**before, **now}
            if name not in may_change and now.get(name, absent) != before.get(name, absent)]


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint. Raises ValueError, which names it, when it is not what `write` wrote."""
    kinds = {"step": int, "bad_steps": int, "bad_in_a_row": list, "files": dict, "config": dict, "crc32": dict}
    try:
        state = json.loads(path.read_text())
        wrong = [name for name, kind in kinds.items() if type(state[name]) is not kind]
        wrong += [name for name in ("step", "bad_steps") if name not in wrong and state[name] < 0]
        wrong += ["bad_in_a_row"] * any(type(item) is not str for item in state["bad_in_a_row"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        wrong = [repr(error)]
    if wrong:
        raise ValueError(f"{path.parent}: its state.json cannot be used ({', '.join(wrong)}); delete the folder to go "
                         "on from the one before")
    return state


def read_config(path: Path) -> dict:
    """The flags in a config.json that a script wrote. Raises ValueError, which names it, for anything else."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: is not the config of a run ({error}); give another folder, or delete it") from error


class Run:
    """A training run in its output folder: where it starts, which steps were bad, when a checkpoint is due.

    Uses the fields model, annotations, output, steps, save_every, keep, resume and max_bad_steps of `config`.
    """

    def __init__(self, config: Any):
        """Look at the output folder before anything is loaded. Raises ValueError when it is in use, or when the
        checkpoint in it was made with other flags."""
        self.config, self.output, self.notes = config, Path(config.output), []
        for name, least in (("save_every", 0), ("keep", 1), ("max_bad_steps", 1)):
            if getattr(config, name) < least:
                raise ValueError(f"--{name} {getattr(config, name)} must be at least {least}")
        in_use, self.start = distributed.gather([(occupied(self.output), newest(self.output))])[0]
        if in_use and not config.resume:
            raise ValueError(f"--output {self.output} is not empty; give --resume to continue the run in it, or "
                             "another folder")
        self.step, self.bad_steps, self.bad_in_a_row = 0, 0, []                 # the next step; what was skipped
        files = [Path(config.annotations), *lora.files(config.model, "*.safetensors")]
        self.files = {f.name: [f.stat().st_size, int(f.stat().st_mtime)] for f in files if f.exists()}
        if self.start:
            saved = read_state(self.start / "state.json")
            self.step, self.bad_steps, self.bad_in_a_row = (saved[k] for k in ("step", "bad_steps", "bad_in_a_row"))
            self.compare(self.start, saved["config"])
            self.notes += [f"{name} has another size or date than when {self.start} was made: is it the same?"
                           for name in self.files if saved["files"].get(name) != self.files[name]]
            if self.step >= config.steps:
                self.notes.append(f"{self.start} has done --steps {config.steps}: only model/ is written")
        elif (self.output / "model").exists():
            raise ValueError(f"--output {self.output} holds a finished run without a checkpoint to go on from; give "
                             "another folder, or delete it to begin anew")
        elif (self.output / "config.json").is_file():       # killed before its first checkpoint
            self.compare(self.output, read_config(self.output / "config.json"))

    def compare(self, place: Path, before: dict) -> None:
        """Raise ValueError unless the run in `place`, with the config `before`, is this one."""
        now = asdict(self.config)
        if other := sorted(now.keys() ^ before.keys()):
            raise ValueError(f"{place} was made by another script, or another version of it (--{' --'.join(other)}); "
                             "give another --output")
        for name in compare_configs(now, before, MAY_CHANGE):
            raise ValueError(f"--{name} {now[name]}: {place} was made with {before[name]}; give the same flag to "
                             "--resume, or start in another --output")
        self.notes += [f"--{name} was {before[name]}, is {now[name]} from step {self.step} on"
                       for name in compare_configs(now, before, {"resume"})]

    def restore(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.start:
            restore(self.start, policy, optimizer)

    def count(self, step: int, numbers: dict) -> dict:
        """The numbers of a step, and how many steps so far were skipped because such numbers were not finite."""
        bad = files.not_finite(numbers)
        if bad:
            self.bad_steps += 1
            self.bad_in_a_row.append(f"{' and '.join(bad)} in step {step}")
        elif numbers["loss"] is not None:       # a step that is left out because its groups are flat proves nothing
            self.bad_in_a_row = []
        return {**numbers, "bad_steps": self.bad_steps}

    def finish(self, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer, stop: Event) -> bool:
        """After each step, by every process: write a checkpoint when one is due. True when the run is to stop, because
        a signal has set the event `stop` in any process. Raises ValueError after too many bad steps in a row."""
        self.step = step + 1
        if len(self.bad_in_a_row) >= self.config.max_bad_steps:
            back = newest(self.output)
            raise ValueError(f"not finite: {', '.join(self.bad_in_a_row)}; that is --max_bad_steps "
                             f"{self.config.max_bad_steps} in a row. " + (
                                 f"Go back to {back} with --resume and a lower --learning_rate, or further by deleting "
                                 "it" if back else "There is no checkpoint yet; try a lower --learning_rate"))
        stopping = any(distributed.gather([stop.is_set()]))
        every = self.config.save_every
        last = stopping or self.step == self.config.steps
        # none on the way through bad steps, so that the newest one is from before the trouble
        if last or every and self.step % every == 0 and not self.bad_in_a_row:
            state = {"step": self.step, "bad_steps": self.bad_steps, "bad_in_a_row": self.bad_in_a_row,
                     "files": self.files, "config": asdict(self.config)}
            write(self.output / "checkpoints" / f"step_{self.step:06d}", state, policy, optimizer, self.config.keep)
        return stopping
