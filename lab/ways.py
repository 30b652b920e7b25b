"""A model of any size with random weights, a video and prompts for it, and two ways to sample and score completions.

- ours: grpo.sample and grpo.logprobs.
- repeated: `repeated_rollout` and `repeated_logprobs`, in transformers' own code. Prompt and video stand there once for
  each of the G completions, in sampling (vision tower and prefill too) and in scoring, as trainers do that run on TRL's
  GRPOTrainer. Logits are of whole sequences, as in the authors' trainer (TRL 0.17); TRL 1.16 makes those of completions
  only.

TRL's newer asynchronous trainer and verl share text prefixes; no released trainer was found that shares a video prefix
under multimodal rotary positions.

In shapes: B prompts of P tokens each, G completions per prompt of C tokens each, V tokens in the vocabulary.
"""
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import grpo
import model
from engine import video
from engine.flags import flag

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@dataclass(kw_only=True)
class Sizes:
    """how large the model, its prompts and completions are"""
    grids: int = flag(50, "pairs of frames of the video, one per second")
    side: int = flag(168, "pixels, a multiple of 28, of its square frames; 168: 36 tokens per grid")
    text: int = flag(80, "tokens of the prompt beside the video's")
    prompts: int = flag(1, "B, prompts at once")
    group_size: int = flag(8, "G, completions per prompt")
    max_tokens: int = flag(128, "C, tokens of every completion; with --evaluate the most")
    hidden: int = flag(512, "width of the decoder; a head has 128, or 16 where that is no multiple")
    layers: int = flag(4, "its depth")
    vocabulary: int = flag(8192, "number of tokens")
    vision_hidden: int = flag(256, "width of the vision tower")
    vision_depth: int = flag(8, "its depth; every fourth block attends to whole frames")
    model: str = flag("", "folder whose config.json gives the model's shape instead; with "
                          "--evaluate, the model itself")
    seed: int = flag(0, "of weights, video, text and completions")


def shape(sizes: Sizes) -> Qwen2_5_VLConfig:
    """The model's configuration: that of `sizes.model`, or Qwen2.5-VL-3B's in the other sizes."""
    if sizes.model:
        return Qwen2_5_VLConfig.from_pretrained(sizes.model)
    head = 128 if sizes.hidden % 128 == 0 else 16       # 128 as in the published models
    heads = sizes.hidden // head
    sections = [head // 8, head * 3 // 16, head * 3 // 16]
    text = dict(vocab_size=sizes.vocabulary,
                hidden_size=sizes.hidden,
                intermediate_size=sizes.hidden * 43 // 8,
                num_hidden_layers=sizes.layers,
                num_attention_heads=heads,
                num_key_value_heads=min(2, heads),
                bos_token_id=None,
                eos_token_id=None,
                max_position_embeddings=32768,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sections))
    vision = dict(depth=sizes.vision_depth,
                  hidden_size=sizes.vision_hidden,
                  intermediate_size=sizes.vision_hidden * 171 // 64,
                  num_heads=4,
                  out_hidden_size=sizes.hidden,
                  tokens_per_second=2,
                  fullatt_block_indexes=list(range(3, sizes.vision_depth, 4)))
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        vision_start_token_id=sizes.vocabulary - 1, vision_end_token_id=sizes.vocabulary - 2,
        image_token_id=sizes.vocabulary - 3, video_token_id=sizes.vocabulary - 4)


def build(sizes: Sizes) -> model.Policy:
    """A policy with random weights of the usual size: with transformers' 0.02, attention in a small model is flat."""
    torch.manual_seed(sizes.seed)
    qwen = Qwen2_5_VLForConditionalGeneration(shape(sizes))
    for module in qwen.modules():
        if isinstance(module, (nn.Linear, nn.Conv3d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    embeddings = qwen.get_input_embeddings().weight                                 # (V, H)
    nn.init.normal_(embeddings, std=embeddings.shape[1] ** -0.5)
    forbidden = [qwen.config.image_token_id, qwen.config.video_token_id]
    return model.Policy(qwen.to(DEVICE, DTYPE), forbidden)


def wait() -> None:
    """Until a GPU has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@contextmanager
def timed(seconds: dict, name: object) -> Iterator[None]:
    """Put the seconds that the block takes into seconds[name]."""
    wait()
    began = time.perf_counter()
    yield
    wait()
    seconds[name] = time.perf_counter() - began


def film(sizes: Sizes, path: str) -> None:
    """Write an mp4 of drifting noise, sizes.grids seconds at 8 frames per second."""
    cells = sizes.side // 7
    noise = np.random.default_rng(sizes.seed).integers(0, 256, (cells, cells, 3), np.uint8)
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.width = stream.height = sizes.side
        stream.pix_fmt = "yuv420p"
        for i in range(8 * sizes.grids):
            frame = np.roll(noise, i, axis=1).repeat(7, 0).repeat(7, 1)     # (side, side, 3)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def make_prompts(sizes: Sizes, qwen: Qwen2_5_VLConfig,
                 seconds: dict | None = None) -> list[model.Prompt]:
    """B prompts of random text and the video, decoded and cut for each. Where `seconds` is given, it gets how long that
    took, under "data"."""
    generator = torch.Generator().manual_seed(sizes.seed)
    pad, vocabulary = qwen.video_token_id, qwen.text_config.vocab_size
    prompts = []
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/video.mp4"
        film(sizes, path)
        with timed({} if seconds is None else seconds, "data"):
            for _ in range(sizes.prompts):
                clip = video.load(path, total_pixels=2 * sizes.grids * sizes.side ** 2)
                patches, grid = model.cut_patches(clip.frames)
                text = torch.randint(vocabulary // 2, (sizes.text,), generator=generator)
                pads = torch.full((len(patches) // model.MERGE ** 2,), pad)
                input_ids = torch.cat([text[:-5], pads, text[-5:]])                 # (P,)
                position_ids = model.place(input_ids, pad, grid, 2 / clip.fps,
                                           qwen.vision_config.tokens_per_second)
                prompts.append(model.Prompt(input_ids, position_ids, patches, grid))
    return prompts


def as_published(qwen: Qwen2_5_VLForConditionalGeneration) -> None:
    """Let transformers' own code run where model.Policy put this project's."""
    qwen.set_attn_implementation("sdpa")
    del qwen.model.visual.patch_embed.forward


def repeat(prompts: list[model.Prompt], times: int) -> dict[str, Tensor]:
    """Prompts of one length and their videos, each `times` over, as transformers' forward pass takes them."""
    rows = [prompt for prompt in prompts for _ in range(times)]                     # B * G
    inputs = {"input_ids": torch.stack([row.input_ids for row in rows]),            # (B * G, P)
              "position_ids": torch.stack([row.position_ids for row in rows], 1),   # (3, B * G, P)
              "pixel_values_videos": torch.cat([row.pixel_values_videos for row in rows]).to(DTYPE),
              "video_grid_thw": torch.stack([row.video_grid_thw for row in rows])}  # (B * G, 3)
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def shared_rollout(policy: model.Policy, prompts: list[model.Prompt], group_size: int, tokens: int,
                   generators: list[torch.Generator] | None) -> Tensor:
    """Completions (B, G, tokens) that nothing stops, this project's way."""
    return grpo.sample(policy, prompts, group_size, tokens, [-1], generators).completions


@torch.no_grad()
def generate(policy: model.Policy, prompts: list[model.Prompt], group_size: int, tokens: int,
             stop_ids: list[int]) -> Tensor:
    """transformers' `generate`, greedy: prompts and completions (B * G, P + at most `tokens`)."""
    inputs = repeat(prompts, group_size)
    return policy.qwen.generate(
        **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=tokens,
        do_sample=False, eos_token_id=stop_ids, pad_token_id=0, suppress_tokens=policy.forbidden)


@torch.no_grad()
def repeated_rollout(policy: model.Policy, prompts: list[model.Prompt], group_size: int, tokens: int,
                     generators: list[torch.Generator] | None) -> Tensor:
    """Completions (B, G, tokens) by repeated prompts; they are drawn from torch's own generator."""
    inputs = repeat(prompts, group_size)
    cache = DynamicCache(config=policy.qwen.config.text_config)
    last = inputs["position_ids"].amax((0, 2))                                      # (B * G,)
    completions = []
    for c in range(tokens):
        output = policy.qwen(**inputs, cache=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()                                       # (B * G, V)
        logits[:, policy.forbidden] = -torch.inf
        token = torch.multinomial(logits.softmax(-1), 1)                            # (B * G, 1)
        completions.append(token)
        position = last + 1 + c
        inputs = {"input_ids": token, "position_ids": position.expand(3, -1)[..., None]}
    return torch.cat(completions, dim=1).view(len(prompts), group_size, tokens)


def repeated_logprobs(policy: model.Policy, prompts: list[model.Prompt], completions: Tensor,
                      mask: Tensor) -> Tensor:
    """Log-probabilities of completions (B, G, C), all of one length, by repeated prompts: logits of whole sequences,
    then log-softmax and gather one row at a time, as in the authors' trainer."""
    _, group_size, tokens = completions.shape
    inputs = repeat(prompts, group_size)
    last = inputs["position_ids"].amax((0, 2))                                      # (B * G,)
    positions = last[:, None] + 1 + torch.arange(tokens, device=DEVICE)             # (B * G, C)
    rows = completions.flatten(0, 1).to(DEVICE)                                     # (B * G, C)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], rows], dim=1)             # (B * G, P + C)
    positions = positions.expand(3, -1, -1)
    inputs["position_ids"] = torch.cat([inputs["position_ids"], positions], dim=2)
    logits = policy.qwen(**inputs, use_cache=False).logits                          # (B * G, P + C, V)
    logits[..., policy.forbidden] = -torch.inf
    scores = []
    for row, input_ids in zip(logits, inputs["input_ids"]):
        logprobs = row[:-1].log_softmax(-1).gather(1, input_ids[1:, None])          # (P + C - 1, 1)
        scores.append(logprobs[-tokens:, 0])
    return torch.stack(scores).view(completions.shape)


WAYS: dict[str, tuple[Callable, Callable]] = {"ours": (shared_rollout, grpo.logprobs),
                                              "repeated": (repeated_rollout, repeated_logprobs)}
