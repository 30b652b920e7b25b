"""From a command line to `main(config)`: flags, their groups, and errors of one line. Every script starts here."""
import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import HfArgumentParser
from transformers.utils import logging

from engine.logs import printable, surviving_output

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


def check_numbers(config: Any, *positive: str) -> None:
    """Raise ValueError, naming the flag, unless every number of a Config is finite and not negative, those named here
    above 0, and a probability, ..._prob, at most 1."""
    for name, value in vars(config).items():
        if type(value) in (int, float):
            below, high = name not in positive, 1 if name.endswith("_prob") else 1e12
            if not (0 < value <= high or below and value == 0):     # not so for NaN, either
                raise ValueError(f"--{name} {value}: give a number {'from' if below else 'above'} 0" +
                                 (" to 1" if high == 1 else " on" if below else ""))
