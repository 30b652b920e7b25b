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
        self.folder = Path(folder).absolute()
        self.limit = int(gigabytes * 1e9)   # bytes
        self.writing = True
        self.written = math.inf             # bytes since the folder's size was last looked at

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
                size = len(line) + math.prod(info["shape"]) + 4
                if size != os.fstat(file.fileno()).st_size:     # a wrong shape takes no memory
                    return None
                array = np.empty(info["shape"], np.uint8)
                file.readinto(array)
                if checksum(line, array) != file.read():
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
        path = self.path(key)
        temporary = None
        array = np.ascontiguousarray(array)
        line = json.dumps({**info, "shape": array.shape, "key": key}).encode() + b"\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
                temporary = file.name
                file.write(line)
                file.write(array)
                file.write(checksum(line, array))
            os.chmod(temporary, 0o644)   # readable for other users of the folder
            os.replace(temporary, path)
            self.written += len(line) + array.nbytes + 4
            # listing is slow, so n processes may exceed the limit by n * 2 %
            if self.written > self.limit / 50:
                self.shrink()
                self.written = 0
        except OSError as error:
            self.writing = False
            if temporary:
                Path(temporary).unlink(missing_ok=True)
            warnings.warn(f"cache {self.folder}: {error.strerror or error}; nothing more is cached "
                          "in this run. Free some space or give another folder")

    def shrink(self) -> None:
        """If the folder is over its limit, delete what was used longest ago, down to nine tenths of it."""
        entries = []    # (last used, bytes, path), unfinished files of killed processes included
        for path in self.folder.glob("??/*"):
            if path.suffix in (".frames", ".tmp"):      # nothing that is not ours
                try:
                    status = path.stat()
                except FileNotFoundError:               # another process was faster
                    continue
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return
        for _, size, path in sorted(entries):
            if total <= 0.9 * self.limit:
                break
            path.unlink(missing_ok=True)
            total -= size


def checksum(line: bytes, array: np.ndarray) -> bytes:
    return zlib.crc32(array, zlib.crc32(line)).to_bytes(4, "big")
