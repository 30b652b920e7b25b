"""Positions and patches against hand-made values; encoding, loading and saving."""
import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

import grpo
import model
from video import Clip

PAD = 99


def sequence(before: int, tokens: int, after: int) -> torch.Tensor:
    return torch.tensor([1] * before + [PAD] * tokens + [2] * after)


def test_positions_by_hand():
    """5 text tokens and vision_start, a 4 x 6 x 8 grid a second apart at 4 tokens a second, 3 text tokens."""
    p = model.place(sequence(6, 4 * 3 * 4, 3), PAD, torch.tensor([4, 6, 8]), 1.0, 4)
    assert p.shape == (3, 6 + 48 + 3)
    assert (p[:, :6] == torch.arange(6)).all()
    assert p[0, 6:54].tolist() == [6] * 12 + [10] * 12 + [14] * 12 + [18] * 12
    assert p[1, 6:18].tolist() == [6] * 4 + [7] * 4 + [8] * 4
    assert p[2, 6:18].tolist() == [6, 7, 8, 9] * 3
    assert (p[:, 54:] == torch.tensor([19, 20, 21])).all()


@pytest.mark.parametrize("seconds, rate, times", [(0.5, 2, [0, 1, 2]), (0.7, 2, [0, 1, 2]), (1.3, 2, [0, 2, 5])])
def test_time_positions_are_rounded_down(seconds, rate, times):
    p = model.place(sequence(0, 3, 1), PAD, torch.tensor([3, 2, 2]), seconds, rate)
    assert p[0].tolist() == times + [times[-1] + 1]


def test_text_follows_the_largest_position_of_a_wide_frame():
    p = model.place(sequence(2, 5, 2), PAD, torch.tensor([1, 2, 10]), 1.0, 2)
    assert p[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8] and p[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 7, 8]


def test_patches_by_hand():
    """Every pixel of the frames says where it is; a patch's values must come from its place, in the order merged."""
    t, h, w = 4, 56, 84
    frames = torch.zeros(t, 3, h, w, dtype=torch.uint8)
    for time in range(t):
        for row in range(h // 14):
            for column in range(w // 14):
                for colour in range(3):
                    frames[time, colour, row * 14:row * 14 + 14, column * 14:column * 14 + 14] = \
                        time * 40 + row * 7 + column + colour * 30
    frames[:, :, 3, 5] = 255                                                # one bright pixel of the first patch
    patches, grid = model.cut_patches(frames)
    assert grid.tolist() == [2, 4, 6] and patches.shape == (48, 1176)
    places = [(r, c) for r0 in (0, 2) for c0 in (0, 2, 4) for r in (r0, r0 + 1) for c in (c0, c0 + 1)]
    for i, (row, column) in enumerate(places * 2):
        values = patches[i].view(3, 2, 14, 14)
        for colour in range(3):
            for half in range(2):
                raw = (i // 24 * 2 + half) * 40 + row * 7 + column + colour * 30
                expected = (raw / 255 - model.MEAN[colour, 0, 0].item()) / model.STD[colour, 0, 0].item()
                assert values[colour, half, 13, 13].item() == pytest.approx(expected, abs=1e-5)
    assert (patches[0].view(3, 2, 14, 14)[:, :, 3, 5] > 1.9).all()


def test_encoding(tiny):
    _, encoder = tiny
    clip = Clip(torch.zeros(6, 3, 28, 56, dtype=torch.uint8), 2.0)
    prompt = encoder.encode("describe", clip)
    text = encoder.tokenizer.decode(prompt.ids)
    assert text.count("<|video_pad|>") == 3 * 1 * 2 and prompt.patches.shape == (3 * 2 * 4, 1176)
    assert text.index("describe") < text.index("<|vision_start|>")          # text first, then the video
    assert prompt.positions.shape == (3, len(prompt.ids))
    slow = encoder.encode("describe", Clip(clip.frames, 0.5))               # the same frames over a longer time
    assert slow.positions[0].max() > prompt.positions[0].max()


def test_decoding_leaves_out_what_the_mask_excludes(tiny):
    _, encoder = tiny
    ids = torch.tensor([encoder.tokenizer("<think>a b</think><|im_end|>c").input_ids])
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    assert encoder.decode(ids, mask) == ["<think>a b</think>"]


def test_saved_model_is_the_same(tiny, prompts, tmp_path):
    policy, encoder = tiny
    policy.float()
    with torch.no_grad():
        policy.qwen.lm_head.weight.mul_(1.01)
    model.save(policy, encoder, tmp_path / "saved")
    assert not list(tmp_path.glob("*.tmp"))
    again, _ = model.load(str(tmp_path / "saved"))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, value in policy.qwen.state_dict().items():
        assert torch.equal(value, again.qwen.state_dict()[name]) and torch.equal(value, plain.state_dict()[name])
    completions = torch.full((2, 2, 3), 20)
    with torch.no_grad():
        assert torch.equal(*(grpo.logprobs(p, prompts, completions, torch.ones_like(completions))
                             for p in (policy, again)))


def test_unusable_folders(folder, tmp_path):
    with pytest.raises(model.ModelError, match="nowhere.*--model"):
        model.load(str(tmp_path / "nowhere"))
    shutil.copytree(folder / "model", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(model.ModelError, match="llama.*Qwen2.5-VL"):
        model.load(str(tmp_path / "other"))
