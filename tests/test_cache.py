"""cache.py: an entry comes back as it was written, or not at all."""
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from engine import cache
from engine.cache import Cache

ARRAY = np.random.default_rng(0).integers(0, 256, (4, 3, 28, 56), dtype=np.uint8)   # 18,816 bytes


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_entry_comes_back(tmp_path):
    store = Cache(tmp_path / "new" / "folder")
    assert store.get({"path": "a"}) is None
    store.put({"path": "a"}, ARRAY, {"fps": 1.9919})
    array, info = Cache(tmp_path / "new" / "folder").get({"path": "a"})
    assert (array == ARRAY).all() and array.flags.writeable and info["fps"] == 1.9919
    assert store.get({"path": "b"}) is None
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("harm", [
    lambda content: content[:-1],
    lambda content: content + b"x",
    lambda content: content[:500] + bytes([content[500] ^ 1]) + content[501:],      # one bit
    lambda content: content.replace(b"2.5", b"3.5"),
    lambda content: content.replace(b"[4, 3", b"[0, 3"),
    lambda content: b"[1]\n" + content])
def test_a_damaged_entry_is_missing_and_written_again(tmp_path, harm):
    store = Cache(tmp_path)
    store.put({"path": "a"}, ARRAY, {"fps": 2.5})
    file, = files(tmp_path)
    file.write_bytes(harm(file.read_bytes()))
    assert store.get({"path": "a"}) is None
    store.put({"path": "a"}, ARRAY, {"fps": 2.5})
    assert (store.get({"path": "a"})[0] == ARRAY).all()


def test_two_processes_write_and_read_the_same_entries(tmp_path):
    script = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from engine.cache import Cache
store = Cache(sys.argv[2])
for i in range(300):
    store.put({'n': i % 3}, np.full((50, 784), i % 3, np.uint8), {})
    entry = store.get({'n': (i + 1) % 3})
    assert entry is None or (entry[0] == (i + 1) % 3).all()
"""
    root = Path(cache.__file__).parent.parent
    command = [sys.executable, "-W", "error", "-c", script, root, tmp_path]
    runs = [subprocess.Popen(command) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]
    assert len(files(tmp_path)) == 3


def test_the_folder_keeps_its_limit_and_what_was_used_last(tmp_path):
    store = Cache(tmp_path, gigabytes=10 * ARRAY.nbytes / 1e9)
    (tmp_path / "mine.txt").write_text("not an entry")
    for i in range(30):
        store.put({"n": i}, ARRAY, {})
        for n in (0, i):                        # entry 0 is used all the time
            os.utime(store.path({"n": n}), ns=(0, 10**9 * i))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 10 * (ARRAY.nbytes + 200)
    first, *others = [i for i in range(30) if store.get({"n": i})]
    assert first == 0 and others == list(range(30 - len(others), 30)) and len(others) >= 7
    assert (tmp_path / "mine.txt").exists()


def test_a_hit_counts_as_use(tmp_path):
    store = Cache(tmp_path)
    store.put({"n": 0}, ARRAY, {})
    path = store.path({"n": 0})
    os.utime(path, ns=(0, 0))
    store.get({"n": 0})
    assert path.stat().st_mtime > 1e9


@pytest.mark.parametrize("cause", ["a file in its place", "a full disk"])
def test_what_cannot_be_written_is_said_once(tmp_path, cause, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    if cause == "a full disk":
        monkeypatch.setattr(os, "replace", full)
    else:
        (tmp_path / "cache").write_text("")
    store = Cache(tmp_path / "cache")
    with pytest.warns(UserWarning, match="nothing more is cached") as caught:
        store.put({"n": 0}, ARRAY, {})
    assert len(caught) == 1 and store.get({"n": 0}) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put({"n": 1}, ARRAY, {})
    assert not list(tmp_path.rglob("*.tmp"))
