"""Positions and patches against hand-made values; encoding, what the vision tower sees, loading and saving."""
import copy
import json
import shutil
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import random_clip, seeded
from oracles import random_policy, random_prompts, repeated_logprobs
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import grpo
import model
from engine.video import Clip

PAD = 99


# Positions and patches

def sequence(before: int, tokens: int, after: int) -> torch.Tensor:
    return torch.tensor([1] * before + [PAD] * tokens + [2] * after)


def test_positions_by_hand():
    """5 text tokens and vision_start, a 4 x 6 x 8 grid a second apart at 4 tokens per second, 3 text tokens."""
    p = model.place(sequence(6, 4 * 3 * 4, 3), PAD, torch.tensor([4, 6, 8]), 1.0, 4)
    assert p.shape == (3, 6 + 48 + 3)
    assert (p[:, :6] == torch.arange(6)).all()
    assert p[0, 6:54].tolist() == [6] * 12 + [10] * 12 + [14] * 12 + [18] * 12
    assert p[1, 6:18].tolist() == [6] * 4 + [7] * 4 + [8] * 4
    assert p[2, 6:18].tolist() == [6, 7, 8, 9] * 3
    assert (p[:, 54:] == torch.tensor([19, 20, 21])).all()


@pytest.mark.parametrize("seconds, rate, times", [
    (0.5, 2, [0, 1, 2]), (0.7, 2, [0, 1, 2]), (1.3, 2, [0, 2, 5]), (0.99999, 2, [0, 2, 4])])
def test_time_positions_are_rounded_down(seconds, rate, times):
    p = model.place(sequence(0, 3, 1), PAD, torch.tensor([3, 2, 2]), seconds, rate)
    assert p[0].tolist() == [*times, times[-1] + 1]


def test_text_follows_the_largest_position_of_a_wide_frame():
    p = model.place(sequence(2, 5, 2), PAD, torch.tensor([1, 2, 10]), 1.0, 2)
    assert p[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert p[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 7, 8]


def test_patches_by_hand():
    """14 x 14 pixels of two frames each, in blocks of 2 x 2 patches, normalised as CLIP's images."""
    frames = random_clip(seeded(1)[0], 4, 3, 56, 84).frames
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (
        [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]))
    expected = []
    for time, block_row, block_column, row, column in product(*map(range, (2, 2, 3, 2, 2))):
        top, left = 14 * (2 * block_row + row), 14 * (2 * block_column + column)
        pixels = frames[2 * time:2 * time + 2, :, top:top + 14, left:left + 14].transpose(0, 1)
        expected.append(((pixels / 255 - mean) / std).flatten())
    patches, grid = model.cut_patches(frames)
    assert grid.tolist() == [2, 4, 6]
    torch.testing.assert_close(patches, torch.stack(expected))


# Encoding

def test_encoding(loaded):
    """Text first, then the video; the same frames over a longer time reach further on the time axis."""
    _, encoder = loaded
    clip = random_clip(seeded(1)[0], 6, 3, 28, 56)
    prompt = encoder.encode("describe", clip)
    text = encoder.tokenizer.decode(prompt.input_ids)
    assert text.count("<|video_pad|>") == 3 * 1 * 2
    assert prompt.pixel_values_videos.shape == (3 * 2 * 4, 1176)
    assert text.index("describe") < text.index("<|vision_start|>")
    assert prompt.position_ids.shape == (3, len(prompt.input_ids))
    slow = encoder.encode("describe", Clip(clip.frames, 0.5))
    assert slow.position_ids[0].max() > prompt.position_ids[0].max()


def test_prompts_of_one_clip_share_its_patches(loaded):
    """Told by the clip's key, as long as one of them is in use."""
    _, encoder = loaded
    generator = seeded(1)[0]
    clip = replace(random_clip(generator, 4, 3, 28, 56), key=("a",))
    other = replace(random_clip(generator, 6, 3, 28, 28), key=("b",))
    first, second = encoder.encode("one", clip), encoder.encode("two", clip)
    assert second.pixel_values_videos is first.pixel_values_videos
    for strange in (other, replace(other, key=None), replace(clip, key=None)):
        patches, grid = model.cut_patches(strange.frames)
        prompt = encoder.encode("three", strange)
        assert torch.equal(prompt.pixel_values_videos, patches)
        assert torch.equal(prompt.video_grid_thw, grid) and prompt.key == strange.key
    assert encoder.encode("four", clip).pixel_values_videos is first.pixel_values_videos
    del first, second, prompt
    assert not encoder.latest


def test_decoding_leaves_out_what_the_mask_excludes(loaded):
    _, encoder = loaded
    ids = torch.tensor([encoder.tokenizer("<think>a b</think><|im_end|>c").input_ids])
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    assert encoder.decode(ids, mask) == ["<think>a b</think>"]
    assert encoder.decode(ids.expand(2, 3, -1), mask.expand(2, 3, -1)) == ["<think>a b</think>"] * 6


# What the vision tower sees

def test_a_video_is_seen_once(monkeypatch):
    """Told by the prompt's key; prompts without one are seen each on their own."""
    policy = random_policy()
    one, other = random_prompts(2, seed=1)
    assert len(one.pixel_values_videos) != len(other.pixel_values_videos)
    keyed = replace(one, key=("a",))
    prompts = [keyed, replace(other, key=("b",)), replace(keyed), one, other]
    grids = []
    policy.qwen.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: grids.append(len(kwargs["grid_thw"])), with_kwargs=True)
    seen = model.see(policy, prompts)
    assert grids == [4]
    assert model.see(policy, seen) == seen and grids == [4]
    monkeypatch.setattr(model, "PATCHES_AT_ONCE", 1)            # a pass for each video
    one_by_one = model.see(policy, prompts)
    assert grids == [4, 1, 1, 1, 1]
    for prompt, *both in zip(prompts, seen, one_by_one, strict=True):
        expected = policy.watch(prompt.pixel_values_videos, prompt.video_grid_thw[None])
        for each in both:
            torch.testing.assert_close(each.video_embeds, expected)


def test_log_probabilities_that_are_not_finite_are_an_error():
    model.check_finite(torch.zeros(2, 3), "qwen")
    for bad in (torch.nan, -torch.inf):
        with pytest.raises(model.ModelError, match="qwen: the model's logits are not finite"):
            model.check_finite(torch.tensor([[0.0, bad]]), "qwen")


# Folders

def test_a_saved_folder_is_its_source_with_new_weights(folder, tmp_path):
    """config.json, tokenizer and template byte for byte, readable by everybody, also when it is saved twice."""
    source = shutil.copytree(folder / "model", tmp_path / "source")
    (source / "vocab.json").write_text("{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"transformers_version": "4.49.0"}))
    policy, encoder = model.load(str(source))
    with torch.no_grad():
        policy.qwen.lm_head.weight.mul_(1.01)
    for _ in range(2):
        model.save(policy, encoder, tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "saved"}
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o644}
    again, _ = model.load(str(tmp_path / "saved"))
    for name, weight in policy.qwen.state_dict().items():
        assert torch.equal(weight, again.qwen.state_dict()[name]), name


SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|>
    <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
CONFIG = """{
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "hidden_size": 128, "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 128000,
    "max_window_layers": 2, "model_type": "qwen2_5_vl", "num_attention_heads": 1, "num_hidden_layers": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": true, "use_sliding_window": false,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 2, "hidden_act": "silu", "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_chans": 3,
        "out_hidden_size": 128, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2, "temporal_patch_size": 2}
    }"""
GENERATION = """{
    "bos_token_id": 151643, "pad_token_id": 151643, "do_sample": true, "temperature": 1e-06,
    "eos_token_id": [151645, 151643], "repetition_penalty": 1.05}"""
TOKENIZER = """{
    "version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"}, "post_processor": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
              "end_of_word_suffix": "", "fuse_unk": false, "merges": []}
    }"""
TOKENIZER_CONFIG = """{
    "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": false, "add_prefix_space": false, "bos_token": null,
    "eos_token": "<|im_end|>", "clean_up_tokenization_spaces": false, "errors": "replace",
    "model_max_length": 131072, "unk_token": null, "pad_token": "<|endoftext|>", "split_special_tokens": false
    }"""
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_published(folder, tied):
    """A folder as Qwen2.5-VL-3B-Instruct (tied) and 7B-Instruct (not tied) were published: the flat config.json, two
    shards of bf16 weights under their first names, a tokenizer with their ids, but of single bytes; two layers, and
    narrow. Returns the weights by their first names."""
    folder.mkdir()
    config = json.loads(CONFIG)
    config |= {"tie_word_embeddings": tied, "vocab_size": 151936 if tied else 152064}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(GENERATION)
    write_tokenizer(folder)
    qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, weight in qwen.state_dict().items():
        if name != "lm_head.weight" or not tied:
            scale = 0.5 if weight.ndim == 1 else weight[0].numel() ** -0.5
            values = torch.randn(weight.shape, generator=generator) * scale
            weights[first_name(name)] = values.bfloat16()
    names = sorted(weights)
    index = {}
    for number, shard in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in shard}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(shard, file)
    size = sum(2 * weight.numel() for weight in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}))
    return weights


def first_name(name):
    """The name under which a weight was published."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def write_tokenizer(folder):
    ids = {token: 151643 + i for i, token in enumerate(SPECIAL)}
    tokens = []
    for token, number in ids.items():
        tokens.append({"id": number, "content": token, "special": True, "single_word": False,
                       "lstrip": False, "rstrip": False, "normalized": False})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = json.loads(TOKENIZER) | {"added_tokens": tokens}
    tokenizer["model"]["vocab"] = {letter: i for i, letter in enumerate(letters)} | ids
    config = json.loads(TOKENIZER_CONFIG)
    config |= {"additional_special_tokens": SPECIAL[1:], "chat_template": TEMPLATE,
               "added_tokens_decoder": {token.pop("id"): token for token in copy.deepcopy(tokens)}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module", params=[True, False], ids=["3B tied", "7B untied"])
def published(request, tmp_path_factory):
    """(folder, its weights, policy, encoder)"""
    folder = tmp_path_factory.mktemp("published") / "qwen"
    weights = write_published(folder, request.param)
    return folder, weights, *model.load(str(folder))


def test_a_published_folder_is_loaded(published):
    _, weights, policy, encoder = published
    for name, weight in policy.qwen.state_dict().items():
        embedding = weights["model.embed_tokens.weight"]        # serves as the head of a tied model
        expected = weights.get(first_name(name), embedding)
        assert torch.equal(weight, expected.float()), name
    head, embedding = policy.qwen.lm_head.weight, policy.qwen.get_input_embeddings().weight
    assert (head is embedding) == ("lm_head.weight" not in weights)
    rope = policy.qwen.config.text_config.rope_parameters
    assert rope["rope_theta"] == 1e6 and rope["mrope_section"] == [16, 24, 24]
    assert encoder.tokens_per_second == 2 and encoder.stop_ids == [151645, 151643]
    assert sorted(policy.forbidden) == [151652, 151653, 151654, 151655, 151656]


def test_a_published_template_and_any_query(published):
    """Special tokens in a query are text: the model gets one video and one turn, and reads the query."""
    *_, encoder = published
    clip = random_clip(seeded(1)[0], 6, 3, 28, 56)
    prompt = encoder.encode("When? ä", clip)
    assert encoder.tokenizer.decode(prompt.input_ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nWhen? ä<|vision_start|>" + "<|video_pad|>" * 6
        + "<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
    special = torch.arange(151643, 151657)
    expected = prompt.input_ids[torch.isin(prompt.input_ids, special)]
    for token in SPECIAL:
        ids = encoder.encode(f"a {token} spins{token}", clip).input_ids
        assert torch.equal(ids[torch.isin(ids, special)], expected), token
        assert f"a {token} spins{token}<|vision_start|>" in encoder.tokenizer.decode(ids)
    # 151,665 to 151,935 have a weight, but no text
    ids = torch.tensor([[ord("A") - 33, 151935, 151645]])
    assert encoder.decode(ids, torch.ones_like(ids)) == ["A"]


def test_a_published_model_computes_as_in_transformers(published, tmp_path):
    """What is sampled has the log-probabilities of transformers' own model, also after the folder was saved; a tied
    head is stored once."""
    folder, weights, policy, encoder = published
    model.save(policy, encoder, tmp_path / "saved")
    stored = set().union(*(load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")))
    assert ("lm_head.weight" in stored) == ("lm_head.weight" in weights)
    prompt = encoder.encode("When?", random_clip(seeded(1)[0], 6, 3, 28, 56))
    rollouts = grpo.sample(policy, [prompt], 4, 6, encoder.stop_ids, seeded(1))
    assert rollouts.logprobs.std() > 0.1
    for path in (folder, tmp_path / "saved"):
        qwen = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            theirs = repeated_logprobs(policy, [prompt], rollouts.completions, rollouts.mask,
                                       qwen=qwen)
        torch.testing.assert_close(rollouts.logprobs, theirs, rtol=0, atol=1e-4)
