"""Shared by the tests: a tiny model with random weights, a few made-up videos, scripts in processes of their own."""
import fcntl
import importlib
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"       # before huggingface_hub is imported: no test asks the network

import pytest
import torch
from jaxtyping import install_import_hook

# checks shapes; an int is a float
install_import_hook(["grpo", "model", "engine.attention", "engine.sampling"],
                    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import model
import sft
import toy
from engine.flags import command_line
from engine.loader import Loader
from engine.video import Clip

torch.set_num_threads(1)        # pytest -n 2 has a process on each core; more threads than cores are very slow
FORKS = multiprocessing.get_context("forkserver")       # a new process in milliseconds: the server has imported it all
FORKS.set_forkserver_preload(["preload"])


def flags(config) -> list[str]:
    """The command line that makes a Config of its fields."""
    return [str(part) for name, value in vars(config).items() if value != ""
            for part in (f"--{name}", *(value if isinstance(value, list) else [value]))]


def start(script: str, config, log, processes: int = 1, change=None) -> list:
    """Start train.py or sft.py as torchrun would, in processes that print to the files log.0, log.1, ...; `change`
    (rank) runs first in each and may put a fault into the code. Returns the processes."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    distributed = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = [FORKS.Process(target=child, args=(script, flags(config), f"{log}.{rank}", change, rank, {
        **distributed, "RANK": str(rank)} if processes > 1 else {})) for rank in range(processes)]
    fork(started)
    return started


def fork(processes: list) -> None:
    """Start processes of FORKS. Its server does not get sys.path (in Python 3.11), and silently preloads nothing that
    it cannot find."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
        for process in processes:
            process.start()


def child(script, arguments, log, change, rank, environment):
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *arguments]
    if change:
        change(rank)
    module = importlib.import_module(script)
    command_line(module.Config, module.main, module.__doc__)


def command(script: str, config, log, processes: int = 0) -> subprocess.Popen:
    """The real thing, `python train.py ...` or `torchrun train.py ...`: every process of it imports all anew."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv_backend=c10d",
                "--rdzv_endpoint=localhost:0"] if processes else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(Path(__file__).parent.parent / script), *flags(config)],
        stdout=open(log, "a"), stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def finish(started: list, seconds: float = 180) -> list[int]:
    """The exit codes of processes, which must end within `seconds`."""
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def once(factory, name: str, make) -> Path:
    """The folder `name`, in which make(folder) writes something: once for all the processes of pytest -n."""
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    with open(base / f"{name}.lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if not lock.read():         # else it is there, and whole
            shutil.rmtree(base / name, ignore_errors=True)
            (base / name).mkdir()
            make(base / name)
            lock.write("made")
    return base / name


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A world of 12 training and 6 test videos and a model folder, as toy.py writes them, but of 10 to 16 s; in cache/
    what a Loader keeps of each video, for tests in which nothing depends on the processes that decode."""
    def make(world):
        tell = toy.tell
        with mock.patch.object(toy, "tell", lambda rng, name: tell(rng, name, int(rng.integers(10, 17)))):
            toy.write_world(world, seed=3, train_videos=12, test_videos=6)
        toy.write_model(world / "model", world, seed=3)
        loader = Loader(cache=world / "cache")
        for path in (world / "videos").iterdir():
            loader(path)
        loader.close()
    return once(tmp_path_factory, "world", make)


@pytest.fixture(scope="session")
def warm(folder, tmp_path_factory):
    """The folder of that model after a minute's schooling: it babbles, so that rewards differ within
    a group; a random model earns nothing at all."""
    make = lambda _: sft.main(sft.Config(
        model=str(folder / "model"), annotations=str(folder / "train.txt"), videos=str(folder / "videos"),
        output=str(folder / "sft"), demonstrations=str(folder / "demonstrations.jsonl"), steps=40, batch_size=8,
        learning_rate=2e-3, cache=str(folder / "cache")))
    once(tmp_path_factory, "warm", make)
    return folder / "sft" / "model"


@pytest.fixture
def tiny(folder):
    """(policy, encoder) of that model in fp64."""
    policy, encoder = model.load(str(folder / "model"))
    return policy.double(), encoder


@pytest.fixture
def prompts(tiny):
    """Two prompts of different lengths: different texts, and videos of different sizes and lengths."""
    generator = torch.Generator().manual_seed(0)
    clips = [Clip(torch.randint(0, 256, (t, 3, h, w), dtype=torch.uint8, generator=generator), 2.0)
             for t, h, w in ((4, 28, 56), (6, 56, 28))]
    return [tiny[1].encode(text, clip) for text, clip in zip(("when does it spin?", "describe"), clips)]
