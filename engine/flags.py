"""From a command line to `main(config)`: flags, groups of them that scripts share, and errors of one line.

A script is a dataclass `Config`, one field per flag, and `main(config)`:

    @dataclass(kw_only=True)
    class Config(VideoFlags):
        '''what the group is called in --help'''
        model: str = flag(MISSING, "Hugging Face folder of a Qwen2.5-VL")

    if __name__ == "__main__":
        command_line(Config, main, __doc__)
"""
import argparse
import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging

from engine.logs import printable, surviving_output
from engine.video import TOTAL_PIXELS

logging.disable_progress_bar()          # transformers' own, for every file that it reads
# tokens of a completion with thoughts, the authors' value, and without
LONGEST = {True: 1024, False: 64}


def flag(default: Any, help: str, positional: bool = False) -> Any:
    """A field of a Config: its default value, MISSING where the user has to give one, and its reason. A `positional`
    one is given by its place among the words of the command line, without --name."""
    metadata = {"help": help, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class VideoFlags:
    """videos"""
    total_pixels: int = flag(TOTAL_PIXELS,
                             "pixels of all frames of a video, about the paper's 2.8 M")
    video_timeout: float = flag(60.0,
                                "seconds without progress after which a video counts as unreadable")
    workers: int = flag(2, "decoding processes of each process; results do not depend on it")
    cache: str = flag("", "folder that keeps decoded frames for later queries, epochs and runs; "
                          "empty: none")
    cache_gb: float = flag(50.0, "size of that folder in GB; beyond it, what was used longest ago "
                                 "is deleted")


@dataclass(kw_only=True)
class AnswerFlags:
    """answers"""
    think: bool = flag(True, "thoughts before the answer; false: prompts ask for, and the format "
                             "reward pays, the answer alone")
    max_tokens: int = flag(None, "longest completion; by default 1024, the authors' value, without "
                                 "thoughts 64")

    def __post_init__(self) -> None:
        if self.max_tokens is None:
            self.max_tokens = LONGEST[self.think]


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def make_parser(config_class: type, doc: str = "",
                script: str | None = None) -> argparse.ArgumentParser:
    """A parser of a Config's flags: the required ones first, the others in groups, one per class that declares them."""
    places = [field.name.upper() for field in dataclasses.fields(config_class)
              if field.metadata.get("positional")]
    parser = argparse.ArgumentParser(
        script, description=doc.split("\n\n")[0], allow_abbrev=False,
        usage=" ".join(["%(prog)s", *places, "--flag value ...   (--help lists the flags)"]),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {}
    for field in dataclasses.fields(config_class):
        required = field.default is MISSING and field.default_factory is MISSING
        owner = next(each for each in config_class.__mro__
                     if field.name in vars(each).get("__annotations__", ()))
        title = "required" if required else owner.__doc__
        options = {"default": field.default}
        if required:
            options = {"default": argparse.SUPPRESS, "required": True}
        if field.default_factory is not MISSING:
            options["default"] = field.default_factory()
        if field.type == list[str]:
            options |= {"type": str, "nargs": "*"}
        elif field.type is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true/false"}
        else:
            options["type"] = field.type
        groups.setdefault(title, []).append((field, options))
    for title in sorted(groups, key=lambda title: title != "required"):
        group = parser.add_argument_group(title)
        for field, options in groups[title]:
            options.setdefault("metavar", field.name.upper())
            name = f"--{field.name}"
            if field.metadata.get("positional"):        # argparse requires it, unless nargs is "*"
                name = field.name
                del options["required"]
                if "nargs" in options:
                    options["nargs"] = "+"
            group.add_argument(name, help=field.metadata["help"].replace("%", "%%"), **options)
    return parser


def parse(config_class: type, words: list[str], doc: str = "", script: str | None = None) -> Any:
    """The Config of a command line's words. Raises ValueError for flags that the script does not have, SystemExit for
    values that are none of their type."""
    values, unknown = make_parser(config_class, doc, script).parse_known_intermixed_args(words)
    if unknown:
        raise ValueError(f"unknown: {' '.join(unknown)}; --help lists the flags")
    return config_class(**vars(values))


def command_line(config_class: type, main: Callable, doc: str) -> None:
    """Parse the command line and run main(config).

    A wrong input (any ValueError that a person can mend) or a full disk ends with one line and exit code 2, the loss
    of another process with one line and 1, Ctrl-C with one line and 130. TRACEBACK=1 shows where in the code. A reader
    of the output that goes away ends nothing.
    """
    script = Path(sys.argv[0]).name
    with surviving_output():
        try:
            main(parse(config_class, sys.argv[1:], doc))
        except (ValueError, OSError, RuntimeError) as error:
            lost = isinstance(error,
                              RuntimeError) and "onnection " in str(error) and dist.is_initialized()
            bug = isinstance(error, RuntimeError) and not lost
            if os.environ.get("TRACEBACK") or bug:
                raise
            message = str(error)
            if lost:
                message = "another process of the run ended; its message or torchrun's says why"
            message = printable(" ".join(message.split()))
            print(f"{script}: {message}  (TRACEBACK=1 shows where)", file=sys.stderr)
            sys.exit(1 if lost else 2)
        except KeyboardInterrupt:
            print(f"\n{script}: stopped; the same command, with --resume where the script has it, "
                  "goes on", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)       # threads that decode are not waited for
        except SystemExit as stopped:
            if stopped.code:
                raise
    if dist.is_initialized():
        dist.destroy_process_group()


def check_numbers(config: Any, *positive: str) -> None:
    """Raise ValueError, naming the flag, unless every number of a Config is finite and not negative, those of the
    shared groups and those in `positive` are above 0, and a probability, ..._prob, is at most 1."""
    shared = {field.name for group in (VideoFlags, AnswerFlags) for field in dataclasses.fields(group)}
    for name, value in vars(config).items():
        if type(value) not in (int, float):
            continue
        is_positive = name in positive or name in shared
        low = "above 0" if is_positive else "from 0 on"
        high = 1 if name.endswith("_prob") else 1e12
        large_enough = value > 0 if is_positive else value >= 0
        if not (large_enough and value <= high):            # NaN is neither
            allowed = "from 0 to 1" if high == 1 else low
            raise ValueError(f"--{name} {value}: give a number {allowed}")
