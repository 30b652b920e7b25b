"""Qwen2.5-VL: load it, encode a text with its clip, run it, save it.

The whole project calls the model through `Policy`, with token ids, positions and a layout of the attention
that this project computes itself:

- positions: multimodal rotary positions as Qwen2.5-VL was trained with them. On the time axis a patch is at
  floor(t * seconds_per_grid * tokens_per_second), on the others at its row and column; text after the video
  starts at the largest position in the video + 1. transformers >= 5.3 places that text elsewhere, so its own
  positions are never used.
- layout: which tokens see which. engine/attention.py packs the G completions of one prompt into one sequence with it.

Departures from transformers: patches are cut here (20 lines) because the library's video processor needs torchvision
and guesses the frame rate; the numbers are the same. Times are rounded down after adding 0.001, so that a frame rate's
rounding does not move a patch.
"""
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MethodType
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
from engine.attention import Decoding, Packed
from engine.model_folder import ModelError, one_line
from engine.sampling import Step
from engine.video import Clip

__all__ = ["Encoder", "ModelError", "Policy", "Prompt", "cut_patches", "load", "pack", "place", "save", "see"]

PATCH, MERGE = 14, 2            # a patch is 14 x 14 pixels of 2 frames; 2 x 2 patches become one token
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)     # of CLIP's training images,
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)     # as Qwen2.5-VL's processor has them
PATCHES_AT_ONCE = 2 ** 15       # the vision tower, without gradient, starts no further video beyond
LOGITS_AT_ONCE = 2 ** 26        # scoring holds at most this many logits: 256 MB in fp32
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")     # some tokenizers have them as special tokens
TEXT_MARK = "\ue000"    # of Unicode's private use
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True)
class Prompt:
    """What the model sees of one sample: a chat with one video in it."""

    ids: Int[Tensor, " P"]                          # one <|video_pad|> per video token
    positions: Int[Tensor, "3 P"]                   # time, row and column
    patches: Float[Tensor, "N 1176"]                # normalised pixels, N = t * h * w
    grid: Int[Tensor, " 3"]                         # t, h, w in patches
    key: tuple | None = None                        # of its clip: prompts of equal keys show the same video
    video: Float[Tensor, "tokens H"] | None = None  # what a vision tower made of the patches, once it has run


def cut_patches(frames: UInt8[Tensor, "T 3 H W"]) -> tuple[Float[Tensor, "N 1176"], Int[Tensor, " 3"]]:
    """Frames, T even, H and W multiples of 28 -> normalised patches, and the grid of t, h, w patches.

    The patches of one 2 x 2 block follow each other, since the vision tower merges four in a row into a token.
    """
    t, c, height, width = frames.shape
    h, w = height // PATCH, width // PATCH
    pixels = (frames.float() / 255 - MEAN) / STD
    pixels = pixels.view(t // 2, 2, c, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    pixels = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)          # (T/2, h/2, w/2, 2, 2, C, 2, 14, 14)
    return pixels.reshape(-1, c * 2 * PATCH * PATCH), torch.tensor([t // 2, h, w])


def place(ids: Int[Tensor, " P"], video_pad: int, grid: Int[Tensor, " 3"], seconds_per_grid: float,
          tokens_per_second: float) -> Int[Tensor, "3 P"]:
    """Positions of a token sequence with one video of `grid` patches in it (Qwen2.5-VL, Section 2.1.2)."""
    t, h, w = grid[0].item(), grid[1].item() // MERGE, grid[2].item() // MERGE
    first = int((ids == video_pad).nonzero()[0])
    before, after = torch.arange(first), torch.arange(len(ids) - first - t * h * w)
    time = (torch.arange(t) * seconds_per_grid * tokens_per_second + 1e-3).long()    # 1.9999 is 2: a rate's rounding
    video = torch.stack(torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")).view(3, -1) + first
    return torch.cat([before.expand(3, -1), video, after.expand(3, -1) + video.max() + 1], dim=1)    # (3, P)


@dataclass(frozen=True)
class Encoder:
    """Turns (text, clip) into a Prompt, and completions into text, for one model folder."""

    tokenizer: PreTrainedTokenizerBase
    tokens_per_second: float
    folder: str = ""        # where it was loaded from
    # the latest prompt of each clip, by its key, while it is in use: the queries of one clip share their patches
    latest: WeakValueDictionary = field(default_factory=WeakValueDictionary, compare=False, repr=False)

    @cached_property
    def special(self) -> dict[int, str]:
        """Special tokens by id. The tags of the format are none, whatever the tokenizer says: instructions hold them,
        and an answer without them earns nothing."""
        return {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items()
                if token.special and token.content not in TAGS}

    @property
    def stop_ids(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))

    def encode(self, text: str, clip: Clip) -> Prompt:
        """A user turn of text, then video, through the folder's own chat template."""
        same = self.latest.get(clip.key)
        patches, grid = (same.patches, same.grid) if same else cut_patches(clip.frames)
        ids = torch.tensor(self.tokenize_chat(text))
        pad = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        at = (ids == pad).nonzero()
        if len(at) != 1:
            raise ModelError(f"the chat template makes {len(at)} <|video_pad|> tokens of one video; "
                             "use the tokenizer of a Qwen2.5-VL folder")
        pads = torch.full((len(patches) // MERGE ** 2,), pad)
        ids = torch.cat([ids[:at[0, 0]], pads, ids[at[0, 0] + 1:]])                               # (P,)
        positions = place(ids, pad, grid, 2 / clip.fps, self.tokens_per_second)
        prompt = Prompt(ids, positions, patches, grid, clip.key)
        if clip.key is not None:
            self.latest[clip.key] = prompt
        return prompt

    def tokenize_chat(self, text: str) -> list[int]:
        """Token ids of a user turn of text and one video. Special tokens in the text are text: a query may hold any."""
        render = lambda text, **options: self.tokenizer.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "video"}]}],
            add_generation_prompt=True, **options)
        special = sorted(self.special.values(), key=len, reverse=True)
        pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
        if len(pieces) == 1:
            return render(text, tokenize=True, return_dict=True)["input_ids"]
        before, _, after = render(TEXT_MARK, tokenize=False).partition(TEXT_MARK)
        parts = [before]
        for piece in pieces:        # a special token in two parts is none
            parts += [piece[:1], piece[1:]] if piece in special else [piece]
        parts.append(after)
        return [i for part in parts if part for i in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    def decode(self, ids: Int[Tensor, "rows C"], mask: Int[Tensor, "rows C"]) -> list[str]:
        """Texts of completions; what the mask excludes and special tokens are left out."""
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids.cpu(), mask.cpu())]
        return self.tokenizer.batch_decode([[i for i in row if i not in self.special] for row in rows],
                                           skip_special_tokens=False)


def embed_patches(embed: nn.Module, patches: Float[Tensor, "N 1176"]) -> Float[Tensor, "N H"]:
    """transformers' 3-D convolution, as the matrix product that it is for patches that do not overlap; many times
    faster on a CPU."""
    weight = embed.proj.weight.flatten(1)                                                           # (H, 1176)
    return F.linear(patches.to(weight.dtype), weight)


class Policy(nn.Module):
    """Qwen2.5-VL with the one pass over its layers, `hidden`, that sampling and scoring share. It ends in one of three
    ways, each of which FSDP has to know, since it gathers weights when one of them is called.

    Vision tokens have probability 0 in sampling and scoring: a policy that emits one breaks its next forward pass.
    With `strict`, sampling ends with a ModelError at the first logits that are not finite; training counts them itself.
    """
    FORWARDS = ("watch", "logits", "logprobs")
    strict = False

    def __init__(self, qwen: Qwen2_5_VLForConditionalGeneration, forbidden: list[int]):
        super().__init__()
        self.qwen = qwen
        self.forbidden = forbidden
        qwen.model.language_model.config._attn_implementation = attention.TEXT
        qwen.model.visual.config._attn_implementation = attention.VISION
        embed = qwen.model.visual.patch_embed
        embed.forward = MethodType(embed_patches, embed)

    def watch(self, patches: Float[Tensor, "n 1176"], grid: Int[Tensor, "videos 3"]) -> Float[Tensor, "tokens H"]:
        """What the vision tower makes of videos, one after the other."""
        visual = self.qwen.model.visual
        return visual(patches.to(visual.dtype), grid_thw=grid).pooler_output

    def hidden(self, ids: Int[Tensor, " N"], positions: Int[Tensor, "3 N"], layout: Packed | Decoding,
               patches: Tensor | None = None, grid: Tensor | None = None, video: Tensor | None = None,
               at: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n H"]:
        """The last layer's output at the tokens `at`, or at all, of tokens `ids` which see each other as `layout`
        says. Their videos come as patches (n, 1176) and grid (videos, 3), or as what `watch` made of them, video."""
        if patches is not None:
            video = Policy.watch(self, patches, grid)   # FSDP's own version would spread the root's weights again
        embeds = self.qwen.get_input_embeddings()(ids)                                              # (N, H)
        if video is not None:
            pads = (ids == self.qwen.config.video_token_id)[:, None]
            embeds = embeds.masked_scatter(pads, video.to(embeds.dtype))
        hidden = self.qwen.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None], attention_mask={"full_attention": layout},
            use_cache=False).last_hidden_state[0]                                                   # (N, H)
        return hidden if at is None else hidden.index_select(0, at)                                 # (n, H)

    def head(self, hidden: Float[Tensor, "n H"], temperature: float) -> Float[Tensor, "n V"]:
        """Logits of the distribution that is sampled from and scored, at least fp32."""
        logits = self.qwen.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:
            logits = logits / temperature
        return logits.index_fill(-1, torch.tensor(self.forbidden, device=logits.device), -torch.inf)

    def logits(self, *tokens, temperature: float = 1.0, **videos) -> Float[Tensor, "n V"]:
        """Logits of the token behind each of those that `hidden`, which gets the other arguments, returns."""
        return self.check(self.head(self.hidden(*tokens, **videos), temperature))

    def start_decoding(self, packed: Packed, rows: int, start: Int[Tensor, " BR"], most: int) -> Step:
        """What samples behind prompts that a pass kept in `packed`; the arguments are those of engine.sampling."""
        return Step(self.qwen.model.language_model, packed, rows, start, most)

    def next_logits(self, step: Callable, token: Int[Tensor, " BR"], temperature: float) -> Float[Tensor, "BR V"]:
        """Logits behind one new token a row. Weights stay gathered since the prompts' pass: see sharding.gathered."""
        return self.check(self.head(step(token), temperature))

    def check(self, logits: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """The logits, finite ones if `strict`."""
        if self.strict and not logits.amax(-1).isfinite().all():
            raise ModelError(f"{self.qwen.name_or_path}: the model's logits are not finite, so it has no answers; copy "
                             "its *.safetensors files again, or give a model from before its training went wrong")
        return logits

    def logprobs(self, *tokens, targets: Int[Tensor, " n"], temperature: float = 1.0,
                 **videos) -> Float[Tensor, " n"]:
        """Log-probabilities of the tokens `targets`, one behind each of those that `hidden` returns. The vocabulary's
        logits are made a chunk of tokens at a time, and again in the backward pass, so that n x V is never held whole.
        """
        hidden = self.hidden(*tokens, **videos)                                                     # (n, H)
        score = lambda some, wanted: -F.cross_entropy(self.head(some, temperature), wanted, reduction="none")
        size = max(1, LOGITS_AT_ONCE // self.qwen.lm_head.out_features)
        if len(targets) <= size:
            return score(hidden, targets)
        return torch.cat([checkpoint(score, some, wanted, use_reentrant=False)
                          for some, wanted in zip(hidden.split(size), targets.split(size))])


def pack(policy: Policy, prompts: list[Prompt]) -> dict[str, Tensor]:
    """Prompts of any lengths one after the other, without padding: ids (N,), positions (3, N), and their videos."""
    device = next(policy.parameters()).device
    batch = dict(ids=torch.cat([p.ids for p in prompts]), positions=torch.cat([p.positions for p in prompts], dim=1))
    if prompts[0].video is not None:
        batch["video"] = torch.cat([p.video for p in prompts])
    else:
        batch.update(patches=torch.cat([p.patches for p in prompts]), grid=torch.stack([p.grid for p in prompts]))
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def see(policy: Policy, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts with their videos run through the vision tower, without gradient, each different video once."""
    keys = [i if p.key is None else p.key for i, p in enumerate(prompts)]
    features, passes = {}, []
    for key, p in {key: p for key, p in zip(keys, prompts) if p.video is None}.items():
        if not passes or sum(len(q.patches) for q in passes[-1].values()) >= PATCHES_AT_ONCE:
            passes.append({})
        passes[-1][key] = p
    for some in passes:
        batch = pack(policy, list(some.values()))
        video = policy.watch(batch["patches"], batch["grid"])                               # (video tokens, H)
        parts = video.split([len(p.patches) // MERGE ** 2 for p in some.values()])
        features.update(zip(some, parts))
    return [replace(p, video=features[key]) if p.video is None else p for key, p in zip(keys, prompts)]


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
        raise ModelError(f"{folder}: the tokenizer lacks {', '.join(missing)}; use the folder's own "
                         "tokenizer files")
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
        if weight.device.type == "cpu":     # else it lies in the file, and changes with that
            weight.data = weight.data.clone()
    return policy, Encoder(tokenizer, qwen.config.vision_config.tokens_per_second, folder)


def save(policy: Policy, encoder: Encoder, folder: str | Path) -> None:
    """Write a Hugging Face folder, whole or not at all; every process calls it, the first one writes. Of a policy
    that learns adapters, the folder holds these alone, as peft stores them."""
    only_adapters = bool(lora.adapters(policy))
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_adapters)
    weights = get_model_state_dict(policy, options=options)                 # a collective when sharded
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
