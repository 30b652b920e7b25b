"""Single steps of sampling: one token a row, which rows are worth going on with, and how many fit into memory."""
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from support import launch, lora
from support.video import FACTOR, MAX_FRAMES, MIN_PIXELS

USUAL, MOST = 16, 256       # queries at once in evaluation: where a GPU's memory is not known, and at most
FILLED = 0.8                # of a GPU's memory: the rest is for CUDA, the vision tower and gaps between tensors
HELD = 2.4                  # with --compile: keys and values are padded, and stay while the next prompts run
TEXT = 500                  # tokens of a prompt beside its video's, more than any query needs


def draw_token(logits: Float[Tensor, "rows V"], uniform: Float[Tensor, " rows"] | None) -> Int[Tensor, " rows"]:
    """One token a row: the inverse of the cumulated softmax at `uniform`, in [0, 1), so that a row's token depends on
    its own random number only; the likeliest token where `uniform` is None."""
    if uniform is None:
        return logits.argmax(-1)
    cumulated = logits.double().softmax(-1).cumsum(-1)                                      # (rows, V)
    token = torch.searchsorted(cumulated, uniform[:, None].double() * cumulated[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.shape[-1] - 1)            # V where logits are not numbers: train.py sees that later


def rows_to_keep(running: Bool[Tensor, "B R"]) -> tuple[Int[Tensor, " kept"], Int[Tensor, " rows"]] | None:
    """(prompts, rows of all B * R) to go on with: prompts with a running row, as many rows of each as the one with
    most. None while that leaves more than 3/4 of the rows, since dropping copies the keys and values."""
    per_prompt = running.sum(1)
    groups, most = per_prompt.nonzero()[:, 0], int(per_prompt.max())
    if len(groups) * most > 0.75 * running.numel():
        return None
    chosen = running[groups].long().argsort(dim=1, descending=True, stable=True)[:, :most]      # running ones first
    return groups, (chosen + groups[:, None] * running.shape[1]).flatten()


def cache_bytes(config: Qwen2_5_VLConfig, prompt: int, rows: int, tokens: int, size: int = 2) -> int:
    """Keys and values while sampling, in numbers of `size` bytes: the prompt's once, and each row's in room for its
    longest completion; `prompt` and `tokens` are lengths."""
    text = config.text_config
    kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return 2 * size * text.num_hidden_layers * kv * (prompt + rows * tokens)


def joined_bytes(config: Qwen2_5_VLConfig, size: int = 2) -> int:
    """The copies of each layer's query, key and value weights side by side, made for sampling (support.incremental)."""
    text = config.text_config
    kv = text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    return size * text.num_hidden_layers * text.hidden_size * (text.hidden_size + 2 * kv)


def work_bytes(config: Qwen2_5_VLConfig, prompt: int) -> int:
    """What a layer works with while a prompt runs: its widest part, four times, in bf16."""
    return 2 * 4 * prompt * config.text_config.intermediate_size


def prompts_that_fit(config: Qwen2_5_VLConfig, room: float, prompt: int, rows: int, tokens: int) -> int:
    """How many prompts of so many tokens, with `rows` completions each, can be sampled at once in `room` bytes, which
    the weights have left."""
    one = cache_bytes(config, prompt, rows, tokens) + work_bytes(config, prompt)
    return max(0, int(room - joined_bytes(config)) // one)


def queries_at_once(model: str, tokens: int, total_pixels: int, compile: bool, device: str) -> int:
    """How many queries to answer at once with the model of a folder or name, in answers of so many `tokens` at most: as
    many as fit on a GPU beside the weights, on the smallest of all processes, if all had the longest of videos. It does
    not ask what is free at the moment: a run that goes on has to find the same batches."""
    if device == "cpu":
        return USUAL
    weights = sum(path.stat().st_size for path in lora.files(model, "*.safetensors"))
    room = FILLED * torch.cuda.mem_get_info(device)[1] - weights
    room /= HELD if compile else 1
    prompt = max(total_pixels, MAX_FRAMES * MIN_PIXELS) // (2 * FACTOR ** 2) + TEXT
    config = Qwen2_5_VLConfig.from_pretrained(lora.base(model))
    return min(launch.gather([max(1, min(MOST, prompts_that_fit(config, room, prompt, 1, tokens)))]))
