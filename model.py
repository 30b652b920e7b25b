"""Qwen2.5-VL: load it, encode a text with its clip, run it, save it.

The whole project calls the model through `Policy`, with token ids, positions and a layout of the attention that this
project computes itself:

- position_ids: multimodal rotary positions as Qwen2.5-VL was trained with them. On the time axis a patch is at
  floor(t * seconds_per_grid * tokens_per_second), on the others at its row and column; text after the video starts at
  the largest position in the video + 1. transformers >= 5.3 places that text elsewhere, so transformers' own positions
  are never used.
- layout: which tokens see which. With it, engine/attention.py packs prompts and their G completions into one
  sequence.

Departures from transformers: patches are cut here, in 20 lines, because the library's video processor needs torchvision
and guesses the frame rate; the numbers are the same. Times are rounded down after adding 0.001, so that a frame rate's
rounding does not move a patch.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from engine import attention, lora, model_folder
from engine.attention import Packed
from engine.model_folder import ModelError, one_line
from engine.sampling import Decoding
from engine.video import Clip

__all__ = ["Encoder", "ModelError", "Policy", "Prompt", "cut_patches", "load", "pack", "place",
           "save", "see"]

PATCH, MERGE = 14, 2        # a patch is 14 x 14 pixels of 2 frames; 2 x 2 patches become one token
# of CLIP's training images, as Qwen2.5-VL's processor has them
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
# a pass of the vision tower without gradient takes no further video beyond
PATCHES_AT_ONCE = 2 ** 15
LOGITS_AT_ONCE = 2 ** 26        # scoring holds at most this many logits: 256 MB in fp32
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
# some tokenizers have them as special tokens
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TEXT_MARK = "\ue000"    # of Unicode's private use
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
                 "<|video_pad|>")


@dataclass(frozen=True)
class Prompt:
    """What the model sees of one sample: a chat with one video in it."""

    input_ids: Int[Tensor, " P"]                    # one <|video_pad|> per video token
    position_ids: Int[Tensor, "3 P"]                # time, row and column
    pixel_values_videos: Float[Tensor, "N 1176"]    # normalised patches, N = t * h * w
    video_grid_thw: Int[Tensor, " 3"]               # t, h, w in patches
    key: tuple | None = None                # of its clip: prompts of equal keys show the same video
    # what a vision tower made of the patches, once it has run
    video_embeds: Float[Tensor, "tokens H"] | None = None


def cut_patches(frames: UInt8[Tensor, "T 3 H W"],
                ) -> tuple[Float[Tensor, "N 1176"], Int[Tensor, " 3"]]:
    """Frames, T even, H and W multiples of 28 -> normalised patches, and the grid of t, h, w patches.

    The patches of one 2 x 2 block follow each other, since the vision tower merges four in a row into a token.
    """
    t, c, height, width = frames.shape
    h, w = height // PATCH, width // PATCH
    pixels = (frames.float() / 255 - MEAN) / STD
    pixels = pixels.view(t // 2, 2, c, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    pixels = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # (T/2, h/2, w/2, 2, 2, C, 2, 14, 14)
    return pixels.reshape(-1, c * 2 * PATCH * PATCH), torch.tensor([t // 2, h, w])


def place(input_ids: Int[Tensor, " P"], video_pad: int, video_grid_thw: Int[Tensor, " 3"],
          seconds_per_grid: float, tokens_per_second: float) -> Int[Tensor, "3 P"]:
    """Positions of a token sequence with one video in it (Qwen2.5-VL, Section 2.1.2)."""
    t, h, w = video_grid_thw.tolist()
    h, w = h // MERGE, w // MERGE                                                   # in tokens
    first = int((input_ids == video_pad).nonzero()[0])
    before = torch.arange(first)
    after = torch.arange(len(input_ids) - first - t * h * w)
    time = torch.arange(t) * seconds_per_grid * tokens_per_second
    time = (time + 1e-3).long()                     # 1.9999 is 2: a frame rate's rounding
    axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
    video = torch.stack(axes).view(3, -1) + first                   # (3, t * h * w)
    behind = video.max() + 1
    return torch.cat([before.expand(3, -1), video, after.expand(3, -1) + behind], dim=1)  # (3, P)


@dataclass(frozen=True)
class Encoder:
    """Turns (text, clip) into a Prompt, and completions into text, for one model folder."""

    tokenizer: PreTrainedTokenizerBase
    tokens_per_second: float
    folder: str = ""        # where it was loaded from
    # the latest prompt of each clip, by its key, while it is in use: a clip's queries share patches
    latest: WeakValueDictionary = field(default_factory=WeakValueDictionary, compare=False,
                                        repr=False)

    @cached_property
    def special(self) -> dict[int, str]:
        """Special tokens by id. <think> and <answer> do not count as special, whatever the tokenizer says: prompts
        contain them, and an answer without them earns nothing."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items()
                if token.special and token.content not in TAGS}

    @property
    def stop_ids(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))

    def encode(self, text: str, clip: Clip) -> Prompt:
        """A user turn of text, then video, through the folder's own chat template."""
        same = self.latest.get(clip.key)
        if same is None:
            patches, grid = cut_patches(clip.frames)
        else:
            patches, grid = same.pixel_values_videos, same.video_grid_thw
        ids = torch.tensor(self.tokenize_chat(text))
        pad = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        places = (ids == pad).nonzero()
        if len(places) != 1:
            raise ModelError(f"the chat template makes {len(places)} <|video_pad|> tokens of one "
                             "video; use the tokenizer of a Qwen2.5-VL folder")
        first = int(places[0, 0])
        pads = torch.full((len(patches) // MERGE ** 2,), pad)
        ids = torch.cat([ids[:first], pads, ids[first + 1:]])       # (P,)
        positions = place(ids, pad, grid, 2 / clip.fps, self.tokens_per_second)
        prompt = Prompt(ids, positions, patches, grid, clip.key)
        if clip.key is not None:
            self.latest[clip.key] = prompt
        return prompt

    def tokenize_chat(self, text: str) -> list[int]:
        """Token ids of a user turn of text and one video. Special tokens in the text are text: a query may hold any."""
        special = sorted(self.special.values(), key=len, reverse=True)
        pattern = "|".join(map(re.escape, special))
        pieces = re.split(f"({pattern})", text) if special else [text]
        if len(pieces) == 1:
            return self.apply_template(text, tokenize=True, return_dict=True)["input_ids"]
        before, _, after = self.apply_template(TEXT_MARK, tokenize=False).partition(TEXT_MARK)
        strings = [before]
        for piece in pieces:
            if piece in special:        # cut in two, it is ordinary text
                strings += [piece[:1], piece[1:]]
            else:
                strings.append(piece)
        strings.append(after)
        ids = [self.tokenizer(string, add_special_tokens=False)["input_ids"] for string in strings
               if string]
        return sum(ids, [])

    def apply_template(self, text: str, **options):
        """The folder's chat template, applied to a user turn of text and one video."""
        content = [{"type": "text", "text": text}, {"type": "video"}]
        return self.tokenizer.apply_chat_template([{"role": "user", "content": content}],
                                                  add_generation_prompt=True, **options)

    def decode(self, completions: Int[Tensor, "*batch C"],
               mask: Int[Tensor, "*batch C"]) -> list[str]:
        """Texts of completions, one after the other; what the mask excludes and special tokens are left out."""
        rows = zip(completions.flatten(0, -2).tolist(), mask.flatten(0, -2).tolist())
        kept = [[i for i, is_token in zip(*row) if is_token and i not in self.special]
                for row in rows]
        return self.tokenizer.batch_decode(kept, skip_special_tokens=False)


def embed_patches(embed: nn.Module, patches: Float[Tensor, "N 1176"]) -> Float[Tensor, "N H"]:
    """transformers' 3-D convolution, as the matrix product that it is for patches that do not overlap; many times
    faster on a CPU."""
    weight = embed.proj.weight.flatten(1)                           # (H, 1176)
    return F.linear(patches.to(weight.dtype), weight)


class Policy(nn.Module):
    """Qwen2.5-VL. `hidden` is the one pass over its layers that sampling and scoring share. FORWARDS names the methods
    that compute with its weights; FSDP has to know them, since it gathers weights when one of them is called.

    Vision tokens have probability 0 in sampling and scoring: a policy that emits one breaks its next forward pass.
    """
    FORWARDS = ("watch", "logits", "logprobs")

    def __init__(self, qwen: Qwen2_5_VLForConditionalGeneration, forbidden: list[int]):
        super().__init__()
        self.qwen = qwen
        self.forbidden = forbidden
        qwen.model.language_model.config._attn_implementation = attention.TEXT
        qwen.model.visual.config._attn_implementation = attention.VISION
        embed = qwen.model.visual.patch_embed
        embed.forward = MethodType(embed_patches, embed)

    @property
    def vision_is_frozen(self) -> bool:
        """Whether the vision tower learns nothing, so that its output serves for sampling and for scoring."""
        return not any(weight.requires_grad for weight in self.qwen.model.visual.parameters())

    def watch(self, pixel_values_videos: Float[Tensor, "n 1176"],
              video_grid_thw: Int[Tensor, "videos 3"]) -> Float[Tensor, "tokens H"]:
        """What the vision tower makes of videos, one after the other."""
        visual = self.qwen.model.visual
        return visual(pixel_values_videos.to(visual.dtype), grid_thw=video_grid_thw).pooler_output

    def hidden(self, input_ids: Int[Tensor, " N"], position_ids: Int[Tensor, "3 N"], layout: Packed,
               pixel_values_videos: Tensor | None = None, video_grid_thw: Tensor | None = None,
               video_embeds: Tensor | None = None,
               at: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n H"]:
        """The last layer's output at the tokens `at` (n, H), or at all tokens (N, H). `layout` says which tokens see
        which. Videos come as patches (n, 1176) with their grids (videos, 3), or as the embeddings that `watch` made of
        them."""
        if pixel_values_videos is not None:
            # FSDP's own version of `watch` would spread the root's weights again
            video_embeds = Policy.watch(self, pixel_values_videos, video_grid_thw)
        embeds = self.qwen.get_input_embeddings()(input_ids)        # (N, H)
        if video_embeds is not None:
            is_video = (input_ids == self.qwen.config.video_token_id)[:, None]
            embeds = embeds.masked_scatter(is_video, video_embeds.to(embeds.dtype))
        hidden = self.qwen.model.language_model(
            inputs_embeds=embeds[None], position_ids=position_ids[:, None],
            attention_mask={"full_attention": layout},
            use_cache=False).last_hidden_state[0]                   # (N, H)
        return hidden if at is None else hidden.index_select(0, at)  # (n, H)

    def head(self, hidden: Float[Tensor, "n H"], temperature: float) -> Float[Tensor, "n V"]:
        """Logits of the distribution that is sampled from and scored, at least fp32."""
        logits = self.qwen.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:
            logits = logits / temperature
        forbidden = torch.tensor(self.forbidden, device=logits.device)
        return logits.index_fill(-1, forbidden, -torch.inf)

    def logits(self, *tokens, temperature: float = 1.0, **videos) -> Float[Tensor, "n V"]:
        """Logits (n, V) of the token that follows each token whose output `hidden` returns. The other arguments are
        those of `hidden`."""
        return self.head(self.hidden(*tokens, **videos), temperature)

    def start_decoding(self, packed: Packed, rows: int, start: Int[Tensor, " BR"],
                       max_tokens: int) -> Decoding:
        """A sampling.Decoding, which continues prompts whose keys and values a pass has kept in `packed`."""
        return Decoding(self.qwen.model.language_model, packed, rows, start, max_tokens)

    def next_logits(self, decoding: Callable, token: Int[Tensor, " BR"],
                    temperature: float) -> Float[Tensor, "BR V"]:
        """Logits behind one new token per row. Weights stay gathered since the prompts' pass: see
        distributed.gathered."""
        return self.head(decoding(token), temperature)

    def logprobs(self, *tokens, targets: Int[Tensor, " n"], temperature: float = 1.0,
                 **videos) -> Float[Tensor, " n"]:
        """Log-probabilities of the tokens `targets`, each of which follows a token whose output `hidden` returns.
        Logits are computed for one chunk of tokens at a time, and again in the backward pass, so that the logits
        (n, V) are never held whole."""
        hidden = self.hidden(*tokens, **videos)                     # (n, H)

        def score(hidden: Float[Tensor, "chunk H"],
                  targets: Int[Tensor, " chunk"]) -> Float[Tensor, " chunk"]:
            return -F.cross_entropy(self.head(hidden, temperature), targets, reduction="none")

        size = max(1, LOGITS_AT_ONCE // self.qwen.lm_head.out_features)
        if len(targets) <= size:
            return score(hidden, targets)
        chunks = zip(hidden.split(size), targets.split(size))
        return torch.cat([checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks])


def check_finite(logprobs: Float[Tensor, "*batch C"], folder: str) -> None:
    """Raise ModelError unless the log-probabilities of sampled tokens are finite: else the model has no answers."""
    if not logprobs.isfinite().all():
        raise ModelError(f"{folder}: the model's logits are not finite, so it has no answers; copy "
                         "its *.safetensors files again, or give a model from before its training "
                         "went wrong")


def pack(policy: Policy, prompts: list[Prompt]) -> dict[str, Tensor]:
    """Prompts of any lengths one after the other, without padding, and their videos, as the arguments of
    Policy.hidden."""
    device = next(policy.parameters()).device
    def column(name: str) -> list[Tensor]:
        return [getattr(prompt, name) for prompt in prompts]

    batch = {"input_ids": torch.cat(column("input_ids")),                   # (N,)
             "position_ids": torch.cat(column("position_ids"), dim=1)}      # (3, N)
    if prompts[0].video_embeds is not None:
        batch["video_embeds"] = torch.cat(column("video_embeds"))           # (tokens, H)
    else:
        batch["pixel_values_videos"] = torch.cat(column("pixel_values_videos"))     # (n, 1176)
        batch["video_grid_thw"] = torch.stack(column("video_grid_thw"))     # (B, 3)
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def see(policy: Policy, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts with their videos run through the vision tower, without gradient, each different video once."""
    keys = [i if prompt.key is None else prompt.key for i, prompt in enumerate(prompts)]
    unseen = {key: prompt for key, prompt in zip(keys, prompts) if prompt.video_embeds is None}
    video_embeds = {}
    for group in groups_of_patches(unseen):
        batch = pack(policy, list(group.values()))
        embeds = policy.watch(batch["pixel_values_videos"], batch["video_grid_thw"])
        lengths = [len(prompt.pixel_values_videos) // MERGE ** 2 for prompt in group.values()]
        video_embeds.update(zip(group, embeds.split(lengths)))
    return [replace(prompt, video_embeds=video_embeds[key]) if key in video_embeds else prompt
            for key, prompt in zip(keys, prompts)]


def groups_of_patches(prompts: dict[Any, Prompt]) -> list[dict[Any, Prompt]]:
    """Prompts by key in groups, one for each pass of the vision tower. A group is full once it has PATCHES_AT_ONCE."""
    groups, patches = [], PATCHES_AT_ONCE
    for key, prompt in prompts.items():
        if patches >= PATCHES_AT_ONCE:
            groups.append({})
            patches = 0
        groups[-1][key] = prompt
        patches += len(prompt.pixel_values_videos)
    return groups


def load(folder: str, device: str = "cpu", dtype: torch.dtype = torch.float32, lora_rank: int = 0,
         seed: int = 0) -> tuple[Policy, Encoder]:
    """Policy and Encoder of a Hugging Face folder of safetensors, or of a folder of adapters with the model that they
    belong to; `folder` may be a name on the hub. With `lora_rank`, adapters of that rank learn and all else is frozen:
    see engine/lora.py.

    Raises ModelError when there is no such folder, it holds another architecture, or weights are missing.
    """
    lora.check(folder)
    adapters, folder = model_folder.local_folder(folder), lora.base(folder)
    tokenizer = model_folder.load_tokenizer(folder)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (*STOP_TOKENS, "<|video_pad|>") if token not in vocabulary]
    if missing:
        raise ModelError(f"{folder}: the tokenizer lacks {', '.join(missing)}; use the folder's "
                         "own tokenizer files")
    way_out = "copy config.json and the *.safetensors files again"
    with one_line(folder, "the model cannot be built", way_out):
        qwen, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True,
            attn_implementation="sdpa", output_loading_info=True, ignore_mismatched_sizes=True)
        wrong = sorted(report["missing_keys"])
        wrong += sorted(name for name, *_ in report["mismatched_keys"])
        if wrong:       # transformers only warns, and leaves random numbers in them
            raise ValueError(f"{len(wrong)} weights are missing or have another shape than "
                             f"config.json says, such as {wrong[0]}")
    lora.attach(qwen, adapters, lora_rank, seed)
    forbidden = [vocabulary[token] for token in VISION_TOKENS if token in vocabulary]
    policy = Policy(qwen.to(device), forbidden)
    for weight in policy.parameters():
        if weight.device.type == "cpu":     # otherwise it stays mapped to the file
            weight.data = weight.data.clone()
    return policy, Encoder(tokenizer, qwen.config.vision_config.tokens_per_second, folder)


def save(policy: Policy, encoder: Encoder, folder: str | Path) -> None:
    """Write a Hugging Face folder, whole or not at all; every process calls it, the first one writes. Of a policy
    that learns adapters, the folder holds only these, as peft stores them."""
    only_adapters = bool(lora.adapters(policy))
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_adapters)
    weights = get_model_state_dict(policy, options=options)             # a collective when sharded
    if policy.qwen.lm_head.weight is policy.qwen.get_input_embeddings().weight:
        weights.pop("qwen.lm_head.weight", None)        # tied: stored once, as in the 3B folder
    weights = {name.removeprefix("qwen."): weight for name, weight in weights.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        with model_folder.replaced(folder) as unfinished:
            if only_adapters:
                lora.write(policy.qwen, weights, encoder.folder, unfinished)
            else:
                policy.qwen.save_pretrained(unfinished, state_dict=weights)
            encoder.tokenizer.save_pretrained(unfinished)
            if encoder.folder:
                model_folder.copy_texts(encoder.folder, unfinished, with_config=not only_adapters)
    if dist.is_initialized():
        dist.barrier()
