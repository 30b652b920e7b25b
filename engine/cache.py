"""Arrays of bytes on disk, shared by all processes: what was decoded once is read the next time.

An entry is one file: a line of json (the key, the shape, and what else the caller adds), the array's bytes, and a
CRC-32 of both. It is written under a temporary name and renamed, so whoever reads it reads all of it, and of two
processes that write the same entry the later one wins. An entry that is cut short or altered counts as missing. An
entry's modification time is when it was last used; when the folder is larger than its limit, those used longest ago are
deleted.
"""
import hashlib
import json
import math
import os
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np


class Cache:
    """get(key) and put(key, array, info) of uint8 arrays; a key is a dict that json can hold.

    Nothing here raises for a disk that is full or read-only: it warns once and stops writing.
    """

    def __init__(self, folder: str | Path, gigabytes: float = 50.0):
        self.folder, self.limit = Path(folder).absolute(), int(gigabytes * 1e9)
        self.writing, self.unseen = True, math.inf   # bytes written since the folder's size was last looked at

    def path(self, key: dict) -> Path:
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:]}.frames"

    def get(self, key: dict) -> tuple[np.ndarray, dict] | None:
        """(array, info), or None if there is no such entry."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                line = file.readline()
                info = json.loads(line)
                if not all(type(size) is int and size > 0 for size in info["shape"]):
                    return None
                if len(line) + math.prod(info["shape"]) + 4 != os.fstat(file.fileno()).st_size:
                    return None
                array = np.empty(info["shape"], np.uint8)
                file.readinto(array)
                if zlib.crc32(array, zlib.crc32(line)).to_bytes(4, "big") != file.read():
                    return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        try:
            os.utime(path)
        except OSError:   # another process deleted it, or the disk is read-only
            pass
        return array, info

    def put(self, key: dict, array: np.ndarray, info: dict) -> None:
        """Write an entry; `info` is a dict that get returns with the array."""
        if not self.writing:
            return
        path, temporary, array = self.path(key), None, np.ascontiguousarray(array)
        line = json.dumps({**info, "shape": array.shape, "key": key}).encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                temporary = file.name
                for part in (line, array, zlib.crc32(array, zlib.crc32(line)).to_bytes(4, "big")):
                    file.write(part)
            os.chmod(temporary, 0o644)   # readable for other users of the folder
            os.replace(temporary, path)
            self.unseen += len(line) + array.nbytes + 4
            if self.unseen > self.limit / 50:   # listing is slow, so n processes may exceed the limit by n * 2 %
                self.shrink()
                self.unseen = 0
        except OSError as error:
            self.writing = False
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            warnings.warn(f"cache {self.folder}: {error.strerror or error}; nothing more is cached in this run. Free "
                          "some space or give another folder")

    def shrink(self) -> None:
        """If the folder is over its limit, delete what was used longest ago, down to nine tenths of it."""
        entries = []   # (last used, bytes, path), unfinished files of killed processes included
        for folder in os.scandir(self.folder):
            for file in os.scandir(folder) if folder.is_dir() and len(folder.name) == 2 else ():
                if file.name.endswith((".frames", ".tmp")):   # nothing that is not ours
                    try:
                        entries.append((file.stat().st_mtime_ns, file.stat().st_size, file.path))
                    except FileNotFoundError:   # another process was faster
                        pass
        total = sum(size for _, size, _ in entries)
        target = 0.9 * self.limit if total > self.limit else self.limit
        for _, size, path in sorted(entries):
            if total <= target:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
