"""From a command line to `main(config)`: flags, errors of one line, processes, logs. Every script starts through here."""
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import HfArgumentParser
from transformers.utils import logging

logging.disable_progress_bar()      # transformers' own, for every file it reads


def flag(default, help: str):
    """A field of a Config: its default value, MISSING where the user has to give one, and its reason."""
    return dataclasses.field(default=default, metadata={"help": help}) if not isinstance(default, list) else \
        dataclasses.field(default_factory=default.copy, metadata={"help": help})


def command_line(Config, main, doc: str) -> None:
    """Parse the flags of a Config dataclass and run main(config). A wrong input (any ValueError that a person can
    mend) ends with one line and exit code 2."""
    parser = HfArgumentParser(Config, description=doc.split("\n\n")[0], allow_abbrev=False,
                              usage="%(prog)s --flag value ...   (--help lists the flags)")
    try:
        config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            raise ValueError(f"unknown: {' '.join(unknown)}; --help lists the flags")
        main(config)
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}  (TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def check_numbers(config, *positive: str) -> None:
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
        dist.init_process_group(backend)
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


def whole(norm: torch.Tensor) -> float:
    """A gradient norm that may be spread over the processes, as a number."""
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def write_whole(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename it, so that nobody ever reads half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_config(config, folder: str | Path) -> None:
    write_whole(Path(folder) / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
