"""A tiny model with random weights and a few made-up videos, shared by the tests."""
import pytest
import torch

import model
import sft
import toy
from video import Clip

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A world of 12 training and 6 test videos and a model folder, as `python toy.py` writes them."""
    world = tmp_path_factory.mktemp("world")
    toy.write_world(world, seed=3, train_videos=12, test_videos=6)
    toy.write_model(world / "model", world, seed=3)
    return world


@pytest.fixture(scope="session")
def warm(folder):
    """The folder of that model after a minute's schooling: it babbles, so that rewards differ within
    a group; a random model earns nothing at all."""
    sft.main(sft.Config(model=str(folder / "model"), annotations=str(folder / "train.txt"), videos=str(folder / "videos"),
                        output=str(folder / "sft"), demonstrations=str(folder / "demonstrations.jsonl"), steps=40,
                        batch_size=8, learning_rate=2e-3))
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
