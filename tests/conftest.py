"""What the tests share: a tiny model with random weights, a few made-up videos, scripts and functions in processes of
their own, and the configs of short runs. tests/oracles.py has the plain forms that the model's forms have to equal.
"""
import copy
import fcntl
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the network

import pytest
import torch
import torch.distributed as dist
from jaxtyping import install_import_hook
from safetensors.torch import load_file

# checks shapes; an int is a float
install_import_hook(["grpo", "model", "engine.attention", "engine.sampling"],
                    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import model
import sft
import toy
import train
from engine.flags import command_line
from engine.loader import Loader
from engine.video import Clip

# pytest -n 2 has a process on each core; more threads than cores are very slow
torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
# a new process in milliseconds: the server has imported it all
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["preload"])
CLOCK = {"seconds", "tokens_per_second"}                # of logs, never the same twice
LIMIT = 120     # seconds, twenty times what a job of several processes takes; what hangs fails then


# Models, prompts and completions

def once(factory, name: str, make) -> Path:
    """The folder `name`, in which make(folder) writes something: once for all the processes of pytest -n."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
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
    tell = toy.tell

    def short_story(rng, name):
        return tell(rng, name, int(rng.integers(10, 17)))

    def make(world):
        with mock.patch.object(toy, "tell", short_story):
            toy.write_world(world, seed=3, train_videos=12, test_videos=6)
        toy.write_model(world / "model", world, seed=3)
        loader = Loader(cache=world / "cache")
        for path in (world / "videos").iterdir():
            loader(path)
        loader.close()

    return once(tmp_path_factory, "world", make)


@pytest.fixture(scope="session")
def warm(folder, tmp_path_factory):
    """The folder of that model after a minute's schooling: it babbles, so that rewards differ within a group; a random
    model earns nothing at all."""
    def make(_):
        sft.main(sft_config(folder, folder / "sft", steps=40, batch_size=8, seed=0))

    once(tmp_path_factory, "warm", make)
    return folder / "sft" / "model"


@pytest.fixture(scope="session")
def loaded(folder):
    policy, encoder = model.load(str(folder / "model"))
    return policy.double(), encoder


@pytest.fixture
def tiny(loaded):
    """(policy, encoder) of that model in fp64."""
    policy, encoder = loaded
    return copy.deepcopy(policy), encoder


@pytest.fixture(scope="session")
def prompts(loaded):
    """Two prompts of different lengths: different texts, and videos of different sizes and lengths."""
    _, encoder = loaded
    generator = torch.Generator().manual_seed(0)
    shapes = {"when does it spin?": (4, 3, 28, 56), "describe": (6, 3, 56, 28)}
    return [encoder.encode(text, random_clip(generator, *shape)) for text, shape in shapes.items()]


def random_clip(generator, *shape) -> Clip:
    """A clip of noise, (T, 3, H, W)."""
    return Clip(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), 2.0)


def seeded(count: int) -> list[torch.Generator]:
    """Generators for `count` prompts, the same in every call."""
    return [torch.Generator().manual_seed(i) for i in range(count)]


def random_completions(policy, lengths, seed=1):
    """Completions (B, G, C) of the given lengths (B, G) without forbidden tokens, and their mask."""
    lengths = torch.as_tensor(lengths)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = range(policy.qwen.lm_head.out_features)
    allowed = torch.tensor([token for token in vocabulary if token not in policy.forbidden])
    mask = (torch.arange(int(lengths.max())) < lengths[..., None]).long()
    return allowed[torch.randint(len(allowed), mask.shape, generator=generator)] * mask, mask


# Runs

def train_config(folder, output, **flags) -> train.Config:
    """Three steps of GRPO on the world in `folder`, from the warm model."""
    common = dict(model=str(folder / "sft" / "model"), annotations=str(folder / "train.txt"),
                  videos=str(folder / "videos"), cache=str(folder / "cache"), steps=3,
                  prompts_per_step=2, group_size=4, max_tokens=64, learning_rate=1e-4,
                  tvg_prob=0.5, seed=1)
    return train.Config(output=str(output), **(common | flags))


def sft_config(folder, output, **flags) -> sft.Config:
    """Six steps of SFT on the demonstrations in `folder`, from the random model."""
    common = dict(model=str(folder / "model"), annotations=str(folder / "train.txt"),
                  videos=str(folder / "videos"), cache=str(folder / "cache"), steps=6, batch_size=4,
                  demonstrations=str(folder / "demonstrations.jsonl"), learning_rate=2e-3, seed=1)
    return sft.Config(output=str(output), **(common | flags))


def read_rows(path) -> list[dict]:
    """The rows of a JSON-lines file."""
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def unbroken(folder, warm, tmp_path_factory) -> train.Config:
    """The config of a run of five steps that nobody disturbed, in its output folder; see `outcome`. It was scored on
    three held-out queries after 0, 3 and 5 steps."""
    def settings(place):
        return train_config(folder, place / "run", steps=5, seed=2, save_every=2, eval_every=3, eval_samples=3,
                            eval_annotations=str(folder / "test.txt"))

    return settings(once(tmp_path_factory, "unbroken", lambda place: train.main(settings(place))))


def outcome(output) -> dict:
    """What two runs that are the same to the bit share: logs without the clock, and the final weights."""
    logs = {}
    for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        path = Path(output, name)
        rows = read_rows(path) if path.exists() else []
        logs[name] = [{key: row[key] for key in row if key not in CLOCK} for row in rows]
    return logs | load_file(Path(output, "model", "model.safetensors"))


def assert_same(one: dict, other: dict) -> None:
    """Assert that two outcomes are the same to the bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name], name


def figures(output, steps=None) -> tuple[list[dict], list[dict]]:
    """The metrics of a run's first steps, without the clock, and the rows of their samples."""
    metrics = []
    for row in read_rows(Path(output, "metrics.jsonl"))[:steps]:
        metrics.append({name: row[name] for name in row if name not in CLOCK})
    rows = read_rows(Path(output, "samples.jsonl"))
    return metrics, [row for row in rows if row["step"] < len(metrics)]


def assert_close_figures(one, other, rel, steps=None) -> None:
    """Assert that two runs have sampled the same, and have about the same metrics."""
    (metrics, samples), (others, other_samples) = figures(one, steps), figures(other, steps)
    assert [row["completion"] for row in samples] == [row["completion"] for row in other_samples]
    assert sum(row["grad_norm"] > 0 for row in metrics) > 1         # else they compare the start
    for ours, theirs in zip(metrics, others, strict=True):
        assert ours.keys() == theirs.keys() and ours["task"] == theirs["task"]
        for name in ours.keys() - {"task", "part", "mismatch"}:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-5), name


def assert_same_change(before, one, other):
    """Assert that two runs changed the weights `before` alike; Adam enlarges tiny differences."""
    assert one.keys() == other.keys() == before.keys()
    changes = []
    for weights in (one, other):
        changes.append(torch.cat([(weights[name] - before[name]).flatten() for name in before]))
    assert changes[0].abs().max() > 5e-5                # else the next line would compare the start
    assert (changes[0] - changes[1]).norm() < 0.02 * changes[0].norm()


# Processes

def fork(processes: list) -> None:
    """Start processes of FORKS. Its server does not get sys.path (in Python 3.11), and silently preloads nothing that
    it cannot find."""
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(path for path in sys.path if path)):
        for process in processes:
            process.start()


def flags(config) -> list[str]:
    """The command line that makes a Config of its fields."""
    words = []
    for name, value in vars(config).items():
        if value != "":
            words += [f"--{name}", *(value if isinstance(value, list) else [value])]
    return [str(word) for word in words]


def start(script: str, config, log, processes: int = 1, change=None) -> list:
    """Start train.py or sft.py as torchrun would, in processes that print to the files log.0, log.1, ...; `change`
    (rank) runs first in each and may put a fault into the code. Returns the processes."""
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    started = []
    for rank in range(processes):
        environment = {}
        if processes > 1:
            environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": port,
                           "WORLD_SIZE": str(processes), "RANK": str(rank)}
        arguments = script, flags(config), f"{log}.{rank}", change, rank, environment
        started.append(FORKS.Process(target=run_script, args=arguments))
    fork(started)
    return started


def run_script(script, words, log, change, rank, environment):
    for number in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    sys.argv = [f"{script}.py", *words]
    if change:
        change(rank)
    module = importlib.import_module(script)
    command_line(module.Config, module.main, module.__doc__)


def finish(started: list, seconds: float = 180) -> list[int]:
    """The exit codes of processes, which must end within `seconds`."""
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def command(script: str, config, log, processes: int = 0) -> subprocess.Popen:
    """The real thing, `python train.py ...` or `torchrun train.py ...`: each of its processes imports all anew."""
    torchrun = []
    if processes:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                    "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    return subprocess.Popen([sys.executable, *torchrun, str(ROOT / script), *flags(config)],
                            stdout=open(log, "a"), stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


def together(folder, processes, per_node, job, *args) -> list:
    """What job(*args) returns in each of `processes` processes, on nodes of `per_node`, as torchrun starts them."""
    folder.mkdir()
    children = []
    for rank in range(processes):
        arguments = folder, rank, processes, per_node, job, args
        children.append(FORKS.Process(target=run_job, args=arguments))
    fork(children)
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        codes = [child.exitcode for child in children]
        if any(codes) or None not in codes:     # one has failed, or all have ended
            break
        time.sleep(0.02)
    codes = [child.exitcode for child in children]
    for child in children:      # of a job that failed or hangs
        child.kill()
        child.join()
    assert codes == [0] * processes, f"exit codes {codes}; None: it did not end"
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


def run_job(folder, rank, processes, per_node, job, args) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank % per_node),
                      LOCAL_WORLD_SIZE=str(per_node))
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank,
                            world_size=processes, timeout=timedelta(seconds=LIMIT))
    torch.save(job(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def whole(tensor):
    """A copy of a tensor that may be spread over the processes; a collective. None stays None."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return None if tensor is None else tensor.clone()


@contextmanager
def full_disk(size: int):
    """No file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
