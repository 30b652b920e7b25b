"""Qwen2.5-VL: load it, encode a text with its clip, run it, shard it, save it.

The whole project calls the model through `Policy.forward`, with token ids, positions and a layout of the attention
that this project computes itself:

- positions: multimodal rotary positions as Qwen2.5-VL was trained with them. On the time axis a patch is at
  floor(t * seconds_per_grid * tokens_per_second), on the others at its row and column; text after the video
  starts at the largest position in the video + 1. transformers >= 5.3 places that text elsewhere, so its own
  positions are never used.
- layout: which tokens see which. attention.py packs the G completions of one prompt into one sequence with it.

Departures from transformers: patches are cut here (20 lines) because the library's video processor needs torchvision
and guesses the frame rate; the numbers are the same. Times are rounded down after adding 0.001, so that a frame rate's
rounding does not move a patch.
"""
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from support import attention, launch
from support.attention import Decoding, Packed
from support.video import Clip

PATCH, MERGE = 14, 2            # a patch is 14 x 14 pixels of 2 frames; 2 x 2 patches become one token
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)     # of CLIP's training images,
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)     # as Qwen2.5-VL's processor has them
LOGITS_AT_ONCE = 2 ** 26        # scoring holds at most this many logits: 256 MB in fp32
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class ModelError(ValueError):
    """A model folder that cannot be used; the message names the folder and the way out."""


@dataclass(frozen=True)
class Prompt:
    """What the model sees of one sample: a chat with one video in it."""

    ids: Tensor         # (P,) token ids, one <|video_pad|> per video token
    positions: Tensor   # (3, P) time, row and column
    patches: Tensor     # (N, 1176) normalised pixels, N = t * h * w
    grid: Tensor        # (3,) t, h, w in patches
    video: Tensor | None = None     # (video tokens, H) what a vision tower made of the patches, once it has run


@lru_cache(maxsize=8)
def cut_patches(frames: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 frames (T, 3, H, W), T even, H and W multiples of 28 -> patches (N, 1176) and grid (3,).

    The patches of one 2 x 2 block follow each other, since the vision tower merges four in a row into a token. The
    queries of one clip share one tensor, by which grpo.see knows them.
    """
    t, c, height, width = frames.shape
    h, w = height // PATCH, width // PATCH
    pixels = (frames.float() / 255 - MEAN) / STD
    pixels = pixels.view(t // 2, 2, c, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    pixels = pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)          # (T/2, h/2, w/2, 2, 2, C, 2, 14, 14)
    return pixels.reshape(-1, c * 2 * PATCH * PATCH), torch.tensor([t // 2, h, w])


def place(ids: Tensor, video_pad: int, grid: Tensor, seconds_per_grid: float, tokens_per_second: float) -> Tensor:
    """Positions (3, P) of a token sequence (P,) with one video of `grid` patches in it (Qwen2.5-VL, Section 2.1.2)."""
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

    @property
    def stop_ids(self) -> list[int]:
        return self.tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))

    def encode(self, text: str, clip: Clip) -> Prompt:
        """A user turn of text, then video, through the folder's own chat template."""
        patches, grid = cut_patches(clip.frames)
        chat = [{"role": "user", "content": [{"type": "text", "text": text}, {"type": "video"}]}]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = torch.tensor(ids["input_ids"])
        pad = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        at = (ids == pad).nonzero()
        if len(at) != 1:
            raise ModelError(f"the chat template makes {len(at)} <|video_pad|> tokens of one video; "
                             "use the tokenizer of a Qwen2.5-VL folder")
        pads = torch.full((len(patches) // MERGE ** 2,), pad)
        ids = torch.cat([ids[:at[0, 0]], pads, ids[at[0, 0] + 1:]])                               # (P,)
        return Prompt(ids, place(ids, pad, grid, 2 / clip.fps, self.tokens_per_second), patches, grid)

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Texts of completions (rows, C); what the mask excludes and special tokens are left out."""
        return self.tokenizer.batch_decode([row[keep.bool()] for row, keep in zip(ids.cpu(), mask.cpu())],
                                           skip_special_tokens=True)


def embed_patches(embed: nn.Module, patches: Tensor) -> Tensor:
    """(N, 1176) -> (N, hidden size): transformers' 3-D convolution, as the matrix product that it is for patches that do
    not overlap; many times faster on a CPU."""
    weight = embed.proj.weight.flatten(1)                                                           # (hidden size, 1176)
    return F.linear(patches.to(weight.dtype), weight)


class Policy(nn.Module):
    """Qwen2.5-VL with the one forward pass that sampling and scoring share.

    Vision tokens have probability 0 in both: a policy that emits one breaks its own next forward pass.
    """

    def __init__(self, qwen: Qwen2_5_VLForConditionalGeneration, forbidden: list[int]):
        super().__init__()
        self.qwen = qwen
        self.forbidden = forbidden
        qwen.model.language_model.config._attn_implementation = attention.TEXT
        qwen.model.visual.config._attn_implementation = attention.VISION
        embed = qwen.model.visual.patch_embed
        embed.forward = MethodType(embed_patches, embed)

    def logits(self, hidden: Tensor, temperature: float) -> Tensor:
        """(n, hidden size) -> logits (n, V) of the distribution that is sampled from and scored, at least fp32."""
        logits = self.qwen.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature != 1:
            logits = logits / temperature
        return logits.index_fill(-1, torch.tensor(self.forbidden, device=logits.device), -torch.inf)

    def token_logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return -F.cross_entropy(self.logits(hidden, temperature), targets, reduction="none")        # (n,)

    def forward(self, ids: Tensor | None = None, positions: Tensor | None = None, layout: Packed | Decoding | None = None,
                patches: Tensor | None = None, grid: Tensor | None = None, video: Tensor | None = None,
                at: Tensor | None = None, targets: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """One pass over the tokens ids (N,) with positions (3, N), which see each other as `layout` says. Their
        videos come as patches (n, 1176) and grid (videos, 3), or as what the vision tower made of them, video
        (video tokens, H); without ids only that is returned.

        Without `targets`: logits (n, V) behind the tokens `at` (n,). With them: log-probabilities (n,) of the tokens
        `targets` (n,), each predicted behind token `at`. The vocabulary's logits are made a chunk of tokens at a time,
        and again in the backward pass, so that n x V is never held whole.
        """
        if patches is not None:
            visual = self.qwen.model.visual
            video = visual(patches.to(visual.dtype), grid_thw=grid).pooler_output                   # (tokens, H)
            if ids is None:
                return video
        embeds = self.qwen.get_input_embeddings()(ids)                                              # (N, H)
        if video is not None:
            pads = (ids == self.qwen.config.video_token_id)[:, None]
            embeds = embeds.masked_scatter(pads, video.to(embeds.dtype))
        hidden = self.qwen.model.language_model(
            inputs_embeds=embeds[None], position_ids=positions[:, None], attention_mask={"full_attention": layout},
            use_cache=False).last_hidden_state[0]                                                   # (N, H)
        hidden = hidden if at is None else hidden.index_select(0, at)                               # (n, H)
        if targets is None:
            return self.logits(hidden, temperature)
        size = max(1, LOGITS_AT_ONCE // self.qwen.lm_head.out_features)
        if len(targets) <= size:
            return self.token_logprobs(hidden, targets, temperature)
        return torch.cat([checkpoint(self.token_logprobs, h, y, temperature, use_reentrant=False)
                          for h, y in zip(hidden.split(size), targets.split(size))])


def check_config(folder: str) -> None:
    """Raise ModelError unless `folder` has the config.json of a Qwen2.5-VL."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder}: not a model folder, its config.json cannot be read ({error}); "
                         "give --model a folder with config.json, *.safetensors and tokenizer.json") from error
    if kind != "qwen2_5_vl":
        raise ModelError(f"{folder}: model_type is {kind!r}, not 'qwen2_5_vl'; give --model a Qwen2.5-VL folder")
    if not config.keys() & {"text_config", "hidden_size"}:      # else it would be built in the size of a 7B model
        raise ModelError(f"{folder}: config.json does not tell the model's sizes; copy it again")


def check(folder: str) -> None:
    """Raise ModelError unless `folder` looks like a Qwen2.5-VL folder, with config.json, tokenizer and whole weights. It
    takes milliseconds, so that a script can call it before anything slow."""
    check_config(folder)
    try:
        index = Path(folder) / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else ["model.safetensors"]
        for name in names:
            safe_open(Path(folder) / name, "pt").keys()             # reads the header, which must fit the file's size
        for name in ("tokenizer.json", "tokenizer_config.json"):
            json.loads((Path(folder) / name).read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{folder}: its weights or its tokenizer cannot be read ({error}); copy the *.safetensors and "
                         "tokenizer*.json files again") from error


def load(folder: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Policy, Encoder]:
    """Policy, in fp32 for training, and Encoder from a Hugging Face folder of safetensors.

    Raises ModelError when there is no such folder, it holds another architecture, or weights are missing.
    """
    check(folder)
    try:        # what a tokenizer.json of another form raises is an Exception, no less
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder}: its tokenizer cannot be read ({error}); copy the tokenizer*.json files again") \
            from error
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (*STOP_TOKENS, "<|video_pad|>") if token not in vocabulary]
    if missing:
        raise ModelError(f"{folder}: the tokenizer lacks {', '.join(missing)}; use the folder's own tokenizer files")
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: the tokenizer has no chat template; copy chat_template.jinja, too")
    try:
        qwen, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, attn_implementation="sdpa", local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True)     # of a weight that is missing it only warns
    except (SafetensorError, OSError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ModelError(f"{folder}: the model cannot be built ({error}); copy config.json and the *.safetensors files "
                         "again") from error
    lost = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lost:
        raise ModelError(f"{folder}: {len(lost)} weights are missing or have another shape than config.json says, such as "
                         f"{lost[0]}; copy config.json and the *.safetensors files again")
    forbidden = [vocabulary[token] for token in VISION_TOKENS if token in vocabulary]
    return Policy(qwen.to(device), forbidden), Encoder(tokenizer, qwen.config.vision_config.tokens_per_second, str(folder))


@cache      # the policy and the reference share its groups of processes
def mesh() -> DeviceMesh:
    """Which processes share a model: all of them, or on several nodes of several processes each (replicate, shard):
    those of a node share one, so that weights travel over its fast links and only gradients between nodes.

    Raises ValueError when the nodes differ in size."""
    world, device = dist.get_world_size(), "cuda" if torch.cuda.is_available() else "cpu"
    sizes = launch.gather([int(os.environ.get("LOCAL_WORLD_SIZE", world))])     # torchrun's
    if len(set(sizes)) > 1:
        raise ValueError(f"--nproc_per_node differs between nodes ({sorted(set(sizes))}); "
                         "give every node's torchrun the same number")
    if 1 < sizes[0] < world:
        return init_device_mesh(device, (world // sizes[0], sizes[0]), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (world,))


def shard(policy: Policy, compute: torch.dtype | None = None) -> Policy:
    """Spread a policy's weights, gradients and optimizer states over the processes of `mesh` (FSDP2): each decoder
    layer, the vision tower and the root is a unit of its own, gathered only while it computes. Gradients are averaged
    over all processes. Computes in `compute`, by default bf16 on GPUs and fp32 on CPUs; weights and gradients keep the
    precision that the policy was loaded in. One CPU process stays as it is.

    The policy comes on the CPU and reaches the GPU a unit at a time, so that none holds it whole in fp32."""
    if not dist.is_initialized():
        return policy
    compute = compute or (torch.bfloat16 if torch.cuda.is_available() else None)
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=compute and torch.float32)
    for unit in (*policy.qwen.model.language_model.layers, policy.qwen.model.visual, policy):
        fully_shard(unit, mesh=mesh(), mp_policy=precision, reshard_after_forward=True)
    return policy


def checkpoint_activations(policy: Policy) -> Policy:
    """Keep only the input of each decoder layer and vision block, and compute the rest again in the backward pass: less
    memory, and up to a third more time. Sampling, which has no backward pass, is as it was."""
    for block in (*policy.qwen.model.language_model.layers, *policy.qwen.model.visual.blocks):
        block.forward = partial(recomputed, block.forward)      # inside the hooks of FSDP2
    return policy


def recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)      # there is no dropout


def gathered(policy: Policy, keep: bool) -> None:
    """While sampling, keep the weights gathered (`keep`): ranks then sample different lengths without waiting for
    each other, and no layer is fetched again for every token. Afterwards free them."""
    if hasattr(policy, "set_reshard_after_forward"):
        policy.set_reshard_after_forward(not keep, recurse=True)
        if not keep:
            for unit in policy.modules():
                if hasattr(unit, "reshard"):
                    unit.reshard()


def save(policy: Policy, encoder: Encoder, folder: str | Path) -> None:
    """Write a Hugging Face folder, whole or not at all; every process calls it, the first one writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(policy, options=options)                     # a collective when sharded
    if policy.qwen.lm_head.weight is policy.qwen.get_input_embeddings().weight:
        weights.pop("qwen.lm_head.weight", None)                                # tied: stored once, as in the 3B folder
    if not dist.is_initialized() or dist.get_rank() == 0:
        folder = Path(folder)
        unfinished, previous = (folder.with_name(folder.name + end) for end in (".tmp", ".old"))
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            weights = {name.removeprefix("qwen."): weight for name, weight in weights.items()}
            policy.qwen.save_pretrained(unfinished, state_dict=weights)
            encoder.tokenizer.save_pretrained(unfinished)
            for path in Path(encoder.folder).glob("*processor*.json") if encoder.folder else ():
                shutil.copy(path, unfinished)                                   # for AutoProcessor; not used here
        except (SafetensorError, OSError) as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(f"{folder}: could not be written ({error})") from error
        if folder.exists():         # a folder cannot replace another: whenever this is killed, one of them is whole
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(folder, previous)
        os.replace(unfinished, folder)
        shutil.rmtree(previous, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
