"""What bench.py and its tests measure: models with random weights, made-up prompts, and two ways of a GRPO step.

"ours" is grpo.rollout and grpo.logprobs. "repeated" is how trainers built on TRL's GRPOTrainer do it: prompt and video
G times in sampling (vision tower and prefill too) and in scoring, logits of whole sequences, transformers' own forward
pass.
"""
import tempfile
from dataclasses import dataclass

import av
import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import grpo
import model
from support import video
from support.launch import flag

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass
class Shape:
    """What is measured: a model with random weights, and the prompts and completions it gets."""
    grids: int = flag(50, "pairs of frames of the video, one a second")
    side: int = flag(168, "pixels, a multiple of 28, of its square frames; 168 make 36 tokens a grid")
    text: int = flag(80, "tokens of the prompt beside the video's")
    prompts: int = flag(1, "B, prompts at once")
    group_size: int = flag(8, "G, completions a prompt")
    max_tokens: int = flag(128, "C, tokens of every completion; with --evaluate the most")
    hidden: int = flag(512, "width of the decoder, a multiple of 128, which is that of a head")
    layers: int = flag(4, "its depth")
    vocabulary: int = flag(8192, "number of tokens")
    vision_hidden: int = flag(256, "width of the vision tower")
    vision_depth: int = flag(8, "its depth; every fourth block attends to whole frames")
    model: str = flag("", "folder whose config.json gives the model's shape instead; with --evaluate, the model itself")
    seed: int = flag(0, "of weights, video, text and completions")


def shape(config: Shape) -> Qwen2_5_VLConfig:
    """The model's configuration: that of --model, or Qwen2.5-VL-3B's with the sizes that the flags give."""
    if config.model:
        return Qwen2_5_VLConfig.from_pretrained(config.model)
    ids = {f"{name}_token_id": config.vocabulary - i
           for i, name in enumerate(("vision_start", "vision_end", "image", "video"), 1)}
    text = dict(vocab_size=config.vocabulary, hidden_size=config.hidden, num_hidden_layers=config.layers,
                intermediate_size=config.hidden * 43 // 8, num_attention_heads=config.hidden // 128, bos_token_id=None,
                num_key_value_heads=min(2, config.hidden // 128), eos_token_id=None, max_position_embeddings=32768,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    vision = dict(depth=config.vision_depth, hidden_size=config.vision_hidden, num_heads=4, tokens_per_second=2,
                  intermediate_size=config.vision_hidden * 171 // 64, out_hidden_size=config.hidden,
                  fullatt_block_indexes=list(range(3, config.vision_depth, 4)))
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def build(config: Shape) -> model.Policy:
    """A policy with random weights of the usual size: with transformers' 0.02, attention in a small model is flat."""
    torch.manual_seed(config.seed)
    qwen = Qwen2_5_VLForConditionalGeneration(shape(config))
    for module in qwen.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    nn.init.normal_(qwen.get_input_embeddings().weight, std=qwen.config.text_config.hidden_size ** -0.5)
    return model.Policy(qwen.to(DEVICE, DTYPE), [qwen.config.image_token_id, qwen.config.video_token_id])


def film(config: Shape, path: str) -> None:
    """Write an mp4 of drifting noise, config.grids seconds at 8 frames a second."""
    noise = np.random.default_rng(config.seed).integers(0, 256, (config.side // 7, config.side // 7, 3), np.uint8)
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = config.side, config.side, "yuv420p"
        for i in range(8 * config.grids):
            frame = np.roll(noise, i, axis=1).repeat(7, 0).repeat(7, 1)                     # (side, side, 3)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def make_prompts(config: Shape, qwen: Qwen2_5_VLConfig, path: str | None = None) -> list[model.Prompt]:
    """B prompts of random text and the video at `path`, or one made for it, decoded and cut for each."""
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            film(config, path := f"{folder}/video.mp4")
            return make_prompts(config, qwen, path)
    found, generator, rate = [], torch.Generator().manual_seed(config.seed), qwen.vision_config.tokens_per_second
    for _ in range(config.prompts):
        clip = video.load(path, total_pixels=2 * config.grids * config.side ** 2)
        patches, grid = model.cut_patches(clip.frames)
        text = torch.randint(qwen.text_config.vocab_size // 2, (config.text,), generator=generator)
        pads = torch.full((len(patches) // model.MERGE ** 2,), qwen.video_token_id)
        ids = torch.cat([text[:-5], pads, text[-5:]])                                       # (P,)
        found.append(model.Prompt(ids, model.place(ids, pads[0].item(), grid, 2 / clip.fps, rate), patches, grid))
    return found


def as_published(qwen: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let transformers' own code run where model.Policy put this project's."""
    qwen.set_attn_implementation("sdpa")
    del qwen.model.visual.patch_embed.forward


def repeat(prompts: list[model.Prompt], times: int) -> dict[str, torch.Tensor]:
    """Prompts of one length and their videos, each `times` over, as transformers' forward pass takes them."""
    rows = [prompt for prompt in prompts for _ in range(times)]                             # B * G
    inputs = dict(input_ids=torch.stack([row.ids for row in rows]), video_grid_thw=torch.stack([r.grid for r in rows]),
                  position_ids=torch.stack([row.positions for row in rows], dim=1),         # (3, B * G, P)
                  pixel_values_videos=torch.cat([row.patches for row in rows]).to(DTYPE))
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def shared_rollout(policy, prompts, group_size, max_tokens, stop_ids, generators) -> torch.Tensor:
    """Completions (B, G, C), this project's way."""
    return grpo.rollout(policy, prompts, group_size, max_tokens, stop_ids, generators).completions


@torch.no_grad()
def repeated_rollout(policy, prompts, group_size, max_tokens, stop_ids, generators) -> torch.Tensor:
    """Completions (B, G, C), the repeated-prompt way; nothing stops it."""
    inputs, tokens = repeat(prompts, group_size), []
    cache, last = DynamicCache(config=policy.qwen.config.text_config), inputs["position_ids"].amax((0, 2))   # (B * G,)
    for c in range(max_tokens):
        logits = policy.qwen(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logits[:, policy.forbidden] = -torch.inf                                            # (B * G, V)
        tokens.append(torch.multinomial(logits.softmax(-1), 1))                             # (B * G, 1)
        inputs = dict(input_ids=tokens[-1], position_ids=(last + 1 + c).expand(3, -1)[..., None])
    return torch.cat(tokens, dim=1).view(len(prompts), group_size, max_tokens)


def repeated_logprobs(policy, prompts, completions, mask) -> torch.Tensor:
    """The repeated-prompt way of scoring completions (B, G, C), all of one length: logits of whole sequences, then
    log-softmax and gather a row at a time, as in the authors' trainer."""
    inputs, tokens = repeat(prompts, completions.shape[1]), completions.shape[2]
    after = inputs["position_ids"].amax((0, 2))[:, None] + 1 + torch.arange(tokens, device=DEVICE)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], completions.flatten(0, 1).to(DEVICE)], dim=1)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], after.expand(3, -1, -1)], dim=2)
    logits = policy.qwen(**inputs, use_cache=False).logits                                  # (B * G, P + C, V)
    logits[..., policy.forbidden] = -torch.inf
    scores = [row[:-1].log_softmax(-1).gather(1, ids[1:, None])[-tokens:, 0]
              for row, ids in zip(logits, inputs["input_ids"])]
    return torch.stack(scores).view(completions.shape)


WAYS = {"ours": (shared_rollout, grpo.logprobs), "repeated": (repeated_rollout, repeated_logprobs)}
