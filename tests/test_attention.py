"""Attention of packed groups and of the vision tower's windows against the plain form with a mask; dropped rows."""
from dataclasses import replace
from functools import partial

import pytest
import torch

import grpo
import model
from engine import attention
from engine.attention import Decoding, Packed
from engine.sampling import Step, rows_to_keep


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(query, key, value, looks, scale):
    """Attention under a mask (N, N), with the key heads repeated: (1, N, heads, d)."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scale).masked_fill(~looks, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2)


def who_sees_whom(prompts, completions):
    """The mask of a packed sequence, from a list of (group, completion, place) of every token."""
    tokens = [(b, -1, i) for b, length in enumerate(prompts) for i in range(length)]
    tokens += [(b, g, i) for b, group in enumerate(completions) for g, length in enumerate(group)
               for i in range(length)]
    sees = lambda a, b: a[0] == b[0] and (b[1] == -1 != a[1] or a[1] == b[1] and b[2] <= a[2])
    return torch.tensor([[sees(a, b) for b in tokens] for a in tokens])


@pytest.mark.parametrize("prompts, completions", [
    ([5], [[3, 3]]), ([7, 4], [[2, 5, 1], [3, 3, 3]]), ([1, 9, 2], [[1, 1], [4, 2], [2, 6]]), ([6, 3], [])])
def test_packed_equals_one_mask_for_all(prompts, completions):
    looks = who_sees_whom(prompts, completions)
    inputs = [random(1, heads, len(looks), 8, seed=i).requires_grad_() for i, heads in enumerate((4, 2, 2))]
    weight = random(1, len(looks), 4, 8, seed=9)
    out = [Packed(prompts, completions).attend(*inputs, 0.3, 0), plain(*inputs, looks, 0.3)]
    torch.testing.assert_close(*out)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in out)):
        torch.testing.assert_close(a, b)


def test_decoding_equals_one_mask_for_all_with_rows_dropped_on_the_way():
    """Tokens one by one give what the packed sequence gives; prompt 1 and a row of each other prompt stop early."""
    prompts, full = [5, 3, 4], 70                                   # beyond the 64 tokens that are allotted at first
    completions = [[full, full, 2]] * 3
    packed = Packed(prompts, completions)
    looks = who_sees_whom(prompts, completions)
    query, key, value = inputs = [random(1, heads, len(looks), 8, seed=i) for i, heads in enumerate((4, 2, 2))]
    expected = packed.attend(*inputs, 0.3, 0)[0]                                                # (N, heads, d)
    first = Packed(prompts, keep=True)
    first.attend(*(x[:, :, :sum(prompts)] for x in inputs), 0.3, 0)
    decoding = Decoding(first, 3)
    column = [torch.arange(n) + sum(prompts) + sum(map(sum, completions[:b])) + sum(completions[b][:g])
              for b in range(3) for g, n in enumerate(completions[b])]
    rows = list(range(9))
    for c in range(full):
        if c == 2:
            sampling.keep(torch.tensor([0, 2]), torch.tensor([0, 1, 6, 7]))
            rows = [0, 1, 6, 7]
        now = torch.stack([column[row][c] for row in rows])
        out = sampling.attend(*(x[:, :, now] for x in inputs), 0.3, 0)[0]
        torch.testing.assert_close(out, expected[now])
        decoding.tokens += 1


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 2, 4, 1, 2]])
def test_windows_see_themselves(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    looks = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    inputs = [random(1, 2, sum(lengths), 8, seed=i) for i in range(3)]
    out, _ = attention.windows(torch.nn.Identity(), *inputs, None, scaling=0.3, cu_seq_lens_q=ends)
    torch.testing.assert_close(out, plain(*inputs, looks, 0.3))


def test_vision_tower_equals_transformers(tiny, monkeypatch):
    """Windows in one batch against transformers' own one by one, on frames with whole and cut windows; and the patches'
    embedding as a matrix product against its convolution."""
    visual = tiny[0].qwen.model.visual
    grid = torch.tensor([[2, 12, 20], [1, 4, 2]])                   # 8 x 8 patches are a window
    patches = random(int(grid.prod(1).sum()), 1176)
    ours = visual(patches, grid_thw=grid).pooler_output
    monkeypatch.setattr(visual.config, "_attn_implementation", "sdpa")
    monkeypatch.setattr(visual.patch_embed, "forward", partial(type(visual.patch_embed).forward, visual.patch_embed))
    torch.testing.assert_close(ours, visual(patches, grid_thw=grid).pooler_output, rtol=1e-5, atol=1e-6)


def test_rows_worth_keeping():
    running = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]]).bool()
    groups, rows = rows_to_keep(running)
    assert groups.tolist() == [0, 2] and rows.tolist() == [0, 2, 3, 10, 8, 9]
    assert rows_to_keep(torch.tensor([[True, True, True, True], [True, False, False, False]])) is None


def test_stopped_rows_are_not_computed(tiny, prompts, monkeypatch):
    """Completions are the same whether rows are dropped or not, and every pass has no more rows than needed."""
    policy, _ = tiny
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(2)]
    free = grpo.rollout(policy, prompts, 4, 12, [], generators())
    stops = free.completions[0, :, 1].tolist() + free.completions[1, :2, 3].tolist()
    seen = []
    go_on = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, token: seen.append(len(token)) or go_on(self, token))
    dropped = grpo.rollout(policy, prompts, 4, 12, stops, generators())
    assert seen[0] == 8 and seen[-1] < 8
    monkeypatch.setattr(grpo, "rows_to_keep", lambda running: None)
    whole = grpo.rollout(policy, prompts, 4, 12, stops, generators())
    assert torch.equal(dropped.completions, whole.completions) and torch.equal(dropped.mask, whole.mask)
    torch.testing.assert_close(dropped.logprobs, whole.logprobs)


def test_a_video_is_seen_once(tiny, prompts, monkeypatch):
    policy, encoder = tiny
    calls = []
    policy.qwen.model.visual.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    prompts = [replace(prompt, key=(i,)) for i, prompt in enumerate(prompts)]
    same = [prompts[0], prompts[1], replace(prompts[0])]        # told by the key, not by the object
    seen = model.see(policy, same)
    assert calls == [len(prompts[0].patches) + len(prompts[1].patches)]
    with monkeypatch.context() as patch:
        patch.setattr(model, "PATCHES_AT_ONCE", 1)                   # a pass for each video
        for one, other in zip(seen, model.see(policy, same)):
            torch.testing.assert_close(one.video, other.video)
    assert calls[1:] == [len(prompts[0].patches), len(prompts[1].patches)]
    del calls[1:]
    rollouts = [grpo.rollout(policy, some, 1, 5, encoder.stop_ids) for some in (same, seen)]
    assert len(calls) == 2 and torch.equal(rollouts[0].completions, rollouts[1].completions)
    scores = [grpo.logprobs(policy, some, rollouts[0].completions, rollouts[0].mask) for some in (same, seen)]
    torch.testing.assert_close(*scores)
