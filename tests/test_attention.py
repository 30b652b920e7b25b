"""Attention of packed groups and of the vision tower's windows against the plain form with a mask."""
from functools import partial

import pytest
import torch

from engine import attention
from engine.attention import Packed


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def plain(query, key, value, sees, scale):
    """Attention under a mask (N, N), with the key heads repeated: (1, N, heads, d)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scale).masked_fill(~sees, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def who_sees_whom(prompts, completions):
    """The mask of a packed sequence. Row -1 of a group is its prompt, the others are its completions."""
    tokens = []                                                             # (group, row, place)
    for b, length in enumerate(prompts):
        tokens += [(b, -1, place) for place in range(length)]
    for b, lengths in enumerate(completions):
        for g, length in enumerate(lengths):
            tokens += [(b, g, place) for place in range(length)]
    b, row, place = torch.tensor(tokens).T
    is_before = (row == row[:, None]) & (place <= place[:, None])
    is_prompt = (row == -1) & (row[:, None] != -1)
    return (b == b[:, None]) & (is_before | is_prompt)                      # (N, N), who sees, whom


@pytest.mark.parametrize("prompts, completions", [
    ([5], [[3, 3]]), ([7, 4], [[2, 5, 1], [3, 3, 3]]), ([1, 9, 2], [[1, 1], [4, 2], [2, 6]]),
    ([6, 3], [])])
def test_packed_equals_one_mask_for_all(prompts, completions):
    """Values and gradients."""
    sees = who_sees_whom(prompts, completions)
    inputs = [random(1, heads, len(sees), 8, seed=heads).requires_grad_() for heads in (4, 2)]
    inputs.append(random(1, 2, len(sees), 8, seed=1).requires_grad_())
    outputs = [Packed(prompts, completions).attend(*inputs, 0.3, 0), plain(*inputs, sees, 0.3)]
    torch.testing.assert_close(*outputs)
    weight = random(1, len(sees), 4, 8, seed=9)
    gradients = [torch.autograd.grad((output * weight).sum(), inputs) for output in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 2, 4, 1, 2]])
def test_windows_see_themselves(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    sees = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    inputs = [random(1, 2, sum(lengths), 8, seed=i) for i in range(3)]
    output, _ = attention.windows(torch.nn.Identity(), *inputs, None, scaling=0.3,
                                  cu_seq_lens_q=ends)
    torch.testing.assert_close(output, plain(*inputs, sees, 0.3))


def test_vision_tower_equals_transformers(tiny, monkeypatch):
    """Windows of one length at once against transformers' own one by one, on frames with whole and cut windows; and the
    patches' embedding as a matrix product against its convolution."""
    visual = tiny[0].qwen.model.visual
    grid = torch.tensor([[2, 12, 20], [1, 4, 2]])                   # 8 x 8 patches are a window
    patches = random(int(grid.prod(1).sum()), 1176)
    ours = visual(patches, grid_thw=grid).pooler_output
    monkeypatch.setattr(visual.config, "_attn_implementation", "sdpa")
    convolution = partial(type(visual.patch_embed).forward, visual.patch_embed)
    monkeypatch.setattr(visual.patch_embed, "forward", convolution)
    theirs = visual(patches, grid_thw=grid).pooler_output
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
