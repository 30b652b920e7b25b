"""Files that are written whole or not at all, and text files as other people write them."""
import dataclasses
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"PK\3\4": "zip",
         b"\x28\xb5\x2f\xfd": "zstd"}
MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16",
         b"\xfe\xff": "UTF-16"}


def check_output(path: str | Path, flag: str = "--output") -> None:
    """Raise ValueError, naming the flag, unless files can be made in the folder `path`, or in the nearest one above it
    that exists. Makes nothing that stays."""
    path = Path(path)
    try:
        folder = path.absolute()
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written to ({error.strerror}); give another "
                         "folder") from error


def not_finite(metrics: dict) -> list[str]:
    """The names of the metrics that are infinite or not a number."""
    return [name for name, value in metrics.items() if isinstance(value, float)
            and not math.isfinite(value)]


def append(path: str | Path, rows: list[dict]) -> None:
    """Add rows to a JSON-lines file; numbers that are not finite become null, which JSON has."""
    lines = [json.dumps(row | dict.fromkeys(not_finite(row)), allow_nan=False) + "\n"
             for row in rows]
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror})") from error


def write_whole(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename it, so that nobody ever reads half of it."""
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())     # else a power cut may leave the name without the text
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror})") from error


def write_config(config: Any, folder: str | Path) -> None:
    write_whole(Path(folder) / "config.json",
                json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_config(path: Path) -> dict:
    """The flags in a config.json that a script wrote. Raises ValueError, which names it, for anything else."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: is not the config of a run ({error}); give another folder, or "
                         "delete it") from error


def changed_flags(now: dict, before: dict, ignored: set[str] = frozenset()) -> list[str]:
    """The names of the flags, but for the `ignored`, that have another value or are in one of two configs only."""
    absent = object()
    return [name for name in {**before, **now}
            if name not in ignored and now.get(name, absent) != before.get(name, absent)]


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A file's text, which must be UTF-8, with or without a byte order mark; `errors` as in bytes.decode.

    Raises OSError, or ValueError, which says what else the file is, but not its name."""
    content = Path(path).read_bytes()
    for start, name in MAGIC.items():
        if content.startswith(start):
            raise ValueError(f"it is compressed with {name}: unpack it first")
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), None)
    if encoding is None and content[:1000].count(0) >= max(2, len(content[:1000]) // 4):
        encoding = "UTF-16"                     # without its mark: every second byte of ASCII is 0
    if encoding:
        raise ValueError(f"it is {encoding}: convert it first, as with iconv -f {encoding} "
                         "-t UTF-8")
    return content.decode("utf-8-sig", errors)
