"""Positions and patches against hand-made values; encoding, loading and saving."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForImageTextToText

import grpo
import model
from engine.attention import Packed
from engine.video import Clip

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


@pytest.mark.parametrize("seconds, rate, times", [(0.5, 2, [0, 1, 2]), (0.7, 2, [0, 1, 2]), (1.3, 2, [0, 2, 5]),
                                                  (0.99999, 2, [0, 2, 4])])
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
    model.save(policy, encoder, tmp_path / "saved")         # over the first one
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    again, _ = model.load(str(tmp_path / "saved"))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, value in policy.qwen.state_dict().items():
        assert torch.equal(value, again.qwen.state_dict()[name]) and torch.equal(value, plain.state_dict()[name])
    completions = torch.full((2, 2, 3), 20)
    with torch.no_grad():
        assert torch.equal(*(grpo.logprobs(p, prompts, completions, torch.ones_like(completions))
                             for p in (policy, again)))


SPECIAL = ("<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
           "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
           "<|video_pad|>").split()
PUBLISHED_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write_published(folder, tied):
    """A folder as Qwen2.5-VL-3B-Instruct (tied) and 7B-Instruct (not tied) were published: the flat config.json, two
    shards of bf16 weights under their first names, a tokenizer with their ids; two layers, and narrow. Returns the
    weights."""
    vocabulary, h, v = 151936 if tied else 152064, 128, 32
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": h,
        "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 128000, "max_window_layers": 2,
        "model_type": "qwen2_5_vl", "num_attention_heads": 1, "num_hidden_layers": 2, "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
        "vision_config": {"depth": 2, "hidden_act": "silu", "hidden_size": v, "intermediate_size": 48, "num_heads": 2,
                          "in_chans": 3, "out_hidden_size": h, "patch_size": 14, "spatial_merge_size": 2,
                          "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
                          "tokens_per_second": 2, "temporal_patch_size": 2},
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": vocabulary}
    shapes = {"model.embed_tokens.weight": (vocabulary, h), "model.norm.weight": (h,),
              "visual.patch_embed.proj.weight": (v, 3, 2, 14, 14), "visual.merger.ln_q.weight": (v,)}
    shapes |= {} if tied else {"lm_head.weight": (vocabulary, h)}
    linear = {"visual.merger.mlp.0": (4 * v, 4 * v), "visual.merger.mlp.2": (h, 4 * v)}     # with bias
    for i in range(2):
        layer, block = f"model.layers.{i}", f"visual.blocks.{i}"
        shapes |= {f"{layer}.{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{block}.{n}.weight": (v,) for n in ("norm1", "norm2")}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (96, h) if n != "down" else (h, 96) for n in ("gate", "up", "down")}
        shapes |= {f"{layer}.self_attn.o_proj.weight": (h, h)}
        linear |= {f"{layer}.self_attn.{n}_proj": (h, h) for n in "qkv"}
        linear |= {f"{block}.mlp.{n}_proj": (48, v) if n != "down" else (v, 48) for n in ("gate", "up", "down")}
        linear |= {f"{block}.attn.qkv": (3 * v, v), f"{block}.attn.proj": (v, v)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    scale = lambda shape: 0.5 if len(shape) == 1 else shape[-1] ** -0.5
    weights = {name: (torch.randn(shape, generator=generator) * scale(shape)).bfloat16()
               for name, shape in sorted(shapes.items())}

    folder.mkdir()
    index, half = {}, len(weights) // 2
    for number, names in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(weight.numel() * 2 for weight in weights.values())
    tokens = {token: 151643 + i for i, token in enumerate(SPECIAL)}
    added = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for token, i in tokens.items()]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(f"word{i}" for i in range(256, 151643))]
    files = {
        "config.json": config, "model.safetensors.index.json": {"metadata": {"total_size": size}, "weight_map": index},
        "generation_config.json": {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True,
                                   "eos_token_id": [151645, 151643], "repetition_penalty": 1.05, "temperature": 1e-06},
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                              "use_regex": False},
            "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                                                "use_regex": False},
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                      "end_of_word_suffix": "", "fuse_unk": False, "vocab": {w: i for i, w in enumerate(words)},
                      "merges": []}},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "add_prefix_space": False, "bos_token": None,
            "additional_special_tokens": SPECIAL[1:], "chat_template": PUBLISHED_TEMPLATE, "eos_token": "<|im_end|>",
            "clean_up_tokenization_spaces": False, "errors": "replace", "model_max_length": 131072, "unk_token": None,
            "pad_token": "<|endoftext|>", "split_special_tokens": False, "added_tokens_decoder": {
                str(item["id"]): {k: value for k, value in item.items() if k != "id"} for item in added}}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return weights


@pytest.mark.parametrize("tied", [True, False], ids=["3B tied", "7B untied"])
def test_a_folder_as_published(tied, tmp_path):
    weights = write_published(tmp_path / "qwen", tied)
    policy, encoder = model.load(str(tmp_path / "qwen"))
    first_name = lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
    loaded = {first_name(name): value for name, value in policy.qwen.state_dict().items()}
    assert loaded.keys() == weights.keys() | {"lm_head.weight"}
    assert all(torch.equal(loaded[name], weight.float()) for name, weight in weights.items())
    assert (policy.qwen.lm_head.weight is policy.qwen.get_input_embeddings().weight) == tied
    text = policy.qwen.config.text_config
    assert text.rope_parameters["rope_theta"] == 1e6 and text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert encoder.tokens_per_second == 2 and encoder.stop_ids == [151645, 151643]
    assert sorted(policy.forbidden) == [151652, 151653, 151654, 151655, 151656]

    frames = torch.randint(0, 256, (6, 3, 28, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompt = encoder.encode("When? ä", Clip(frames, 2.0))
    assert encoder.tokenizer.decode(prompt.ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhen? ä<|vision_start|>"
        + "<|video_pad|>" * 6 + "<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
    assert prompt.ids[0] == 151644 and (prompt.ids == 151656).sum() == 6
    for token in SPECIAL:       # in a query they are text
        ids = encoder.encode(f"When {token}?", Clip(frames, 2.0)).ids
        assert torch.isin(ids, torch.arange(151643, 151657)).sum() == 13 and f"When {token}?<" in \
            encoder.tokenizer.decode(ids)
    rollouts = grpo.rollout(policy, [prompt], 4, 6, encoder.stop_ids, [torch.Generator().manual_seed(0)])
    assert len(rollouts.completions.unique()) > 4
    assert not torch.isin(rollouts.completions, torch.tensor(policy.forbidden)).any()
    with torch.no_grad():
        scored = grpo.logprobs(policy, [prompt], rollouts.completions, rollouts.mask)
    torch.testing.assert_close(scored, rollouts.logprobs, rtol=0, atol=1e-4)
    # 151,665 to 151,935 have a weight, but no text
    assert encoder.decode(torch.tensor([[ord("A") - 33, 151935, 151645]]), torch.ones(1, 3).int()) == ["A"]

    model.save(policy, encoder, tmp_path / "saved")
    stored = set().union(*(load_file(file) for file in (tmp_path / "saved").glob("*.safetensors")))
    assert ("lm_head.weight" in stored) != tied
    length = len(prompt.ids)
    with torch.no_grad():
        batch = prompt.ids, prompt.positions, Packed([length]), prompt.patches, prompt.grid[None]
        ours = policy.logits(*batch)[-1]                                                                    # (V,)
        for folder in ("qwen", "saved"):
            plain = AutoModelForImageTextToText.from_pretrained(tmp_path / folder, dtype=torch.float32)
            theirs = plain(input_ids=prompt.ids[None], position_ids=prompt.positions[:, None],
                           attention_mask=torch.ones(1, length), pixel_values_videos=prompt.patches,
                           video_grid_thw=prompt.grid[None]).logits[0, -1]
            possible = ours.isfinite()
            assert (~possible).sum() == 5 and theirs.std() > 0.1
            torch.testing.assert_close(ours[possible], theirs[possible], rtol=0, atol=1e-4)


def test_special_tokens_in_a_query_are_text(tiny):
    """Whatever a query holds, the model gets one video and one turn, and reads the query."""
    policy, encoder = tiny
    clip = Clip(torch.zeros(4, 3, 28, 28, dtype=torch.uint8), 2.0)
    special = [token.content for token in encoder.tokenizer.added_tokens_decoder.values() if token.special]
    assert {"<|video_pad|>", "<|im_end|>"} <= set(special)
    plain = encoder.encode("a circle spins", clip).ids.tolist()
    for token in special:
        text = f"a {token} spins{token}"
        ids = encoder.encode(text, clip).ids.tolist()
        number = encoder.tokenizer.convert_tokens_to_ids(token)
        assert ids.count(number) == plain.count(number), token
        assert text in encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        with torch.no_grad():
            assert len(grpo.rollout(policy, [encoder.encode(text, clip)], 1, 2, encoder.stop_ids).completions) == 1


def test_a_saved_folder_has_the_files_of_its_source(tiny, folder, tmp_path):
    """config.json, tokenizer and template byte for byte, readable by everybody."""
    source = shutil.copytree(folder / "model", tmp_path / "source")
    (source / "vocab.json").write_text("{}")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "transformers_version": "4.49.0"}))
    policy, encoder = model.load(str(source))
    model.save(policy, encoder, tmp_path / "saved")
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "saved").iterdir()} == {"0o644"}
