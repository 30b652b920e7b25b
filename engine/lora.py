"""LoRA (Hu et al., 2021) through peft: small adapters learn, the model's own weights stay as they are.

A linear layer of the language model, y = W x, becomes y = W x + 2 B A x with A (rank, in) and B (out, rank). A begins
with random numbers, B with 0, so training starts from the model itself. The embeddings, the head and the vision tower
have no adapters. With the adapters off the model is its own reference policy, so there is no second copy of it.

They are stored in a folder as peft has it: adapter_config.json, with the path of the model that the adapters belong to,
and adapter_model.safetensors. Training that starts from such a folder goes on with its adapters, and the reference
policy has them as they were.

Merged in bf16, W + 2 B A would be W again wherever the change is less than half a step of bf16, 0.2 to 0.4 % of a
weight. So adapters that do not learn are merged into weights in fp32, and stay beside weights in bf16. For a folder of
whole weights, docs/transformers.md shows three lines of peft.
"""
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import model_folder
from engine.model_folder import ModelError, local_folder, one_line, read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_IN = r"model\.visual\..*"               # where layers have the same names
KEPT = ["r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"]   # of a stored config
LEARNED = "default"                         # peft's name of the adapters that learn,
START = "start"                             # and of those that training began with
PREFIX = "base_model.model."                # of peft's names in a file


def holds_adapters(folder: str) -> bool:
    return Path(folder, CONFIG).exists()


def base(folder: str) -> str:
    """The model folder that the adapters in `folder` belong to, or `folder` itself where it holds none.

    Raises ModelError when it is not there."""
    folder = local_folder(folder)
    if not holds_adapters(folder):
        return folder
    model = read_json(folder, CONFIG).get("base_model_name_or_path")
    way_out = f"write the path of its folder to base_model_name_or_path in {CONFIG}"
    with one_line(folder, f"the model of its adapters, {model!r}, is not there", way_out):
        path = local_folder(model)
        if holds_adapters(path):
            raise ValueError("that folder holds adapters, too")
        Path(path, "config.json").stat()
    return path


def files(folder: str, pattern: str = "*") -> list[Path]:
    """The files of a model folder, and those of the model that its adapters belong to."""
    folders = dict.fromkeys([local_folder(folder), base(folder)])
    return [path for each in folders for path in sorted(Path(each).glob(pattern))]


def check(folder: str) -> None:
    """Raise ModelError unless `folder`, a path or a name on the hub, holds a Qwen2.5-VL or adapters of one that can be
    used. Takes a second: it comes before anything large is built."""
    folder = local_folder(folder)
    if holds_adapters(folder):
        kind = read_json(folder, CONFIG).get("peft_type")
        if kind != "LORA":
            raise ModelError(f"{folder}: its {CONFIG} is of {kind!r}, not 'LORA'; merge it into "
                             "its model with peft")
        model_folder.check_weights(Path(folder, WEIGHTS))
    model_folder.check(base(folder))


def check_rank(rank: int) -> None:
    if rank < 0:
        raise ValueError(f"--lora_rank {rank}: give a rank, such as 16, or 0 to train all weights")


def check_flags(config: Any) -> None:
    """Raise ValueError, naming the flag, for a --lora_rank that cannot work with --model."""
    check_rank(config.lora_rank)
    folder = local_folder(config.model)
    if config.lora_rank and holds_adapters(folder):
        rank = read_json(folder, CONFIG).get("r")
        if rank != config.lora_rank:
            raise ValueError(f"--lora_rank {config.lora_rank}: the adapters in {config.model} have "
                             f"rank {rank}, and training goes on with them; give that rank, or 0 "
                             "to merge them and train all weights")


def adapters(model: nn.Module, which: str = LEARNED) -> dict[str, nn.Parameter]:
    """The weights of a model's adapters, by their names in it; none where it has no such adapters."""
    return {name: weight for name, weight in model.named_parameters()
            if f".{which}." in name and ".lora_" in name}


def frozen(policy: nn.Module) -> set[nn.Parameter]:
    """The weights of a policy that adapters leave as they are; none where it has no adapters that learn."""
    if not adapters(policy):
        return set()
    return {weight for weight in policy.parameters() if not weight.requires_grad}


def attach(qwen: nn.Module, folder: str, rank: int = 0, seed: int = 0) -> None:
    """Give a model on the CPU the adapters that are in `folder`, if any. With `rank` they learn, in fp32, and all else
    is frozen; where `folder` has none they begin with numbers drawn from `seed`. Without `rank`, they are merged into
    fp32 weights, and stay beside others. Raises ModelError."""
    if holds_adapters(folder):
        stored = load_file(Path(folder, WEIGHTS))
        stored = {name.removeprefix(PREFIX): weight for name, weight in stored.items()}
        tuner = add_layers(qwen, folder, stored, rank)
        for which in (LEARNED, START):
            fill(qwen, which, stored, folder)
    elif rank:
        tuner = add_layers(qwen, folder, {}, rank)
        draw(qwen, seed)
    else:
        return
    qwen.requires_grad_(False)
    if rank:
        for weight in adapters(qwen).values():
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
            weight.requires_grad_(True)
    elif next(qwen.parameters()).dtype == torch.float32:
        tuner.merge_and_unload()
        qwen.requires_grad_(True)


def add_layers(qwen: nn.Module, folder: str, stored: dict[str, Tensor], rank: int) -> nn.Module:
    """Put peft's layers around a model's linear layers; returns peft's object, which can merge them. With `rank` they
    have the adapters LEARNED, and for stored ones START, too; without, START alone."""
    import peft  # takes most of a second, and only this needs it

    # peft asks transformers for it
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
    options = {"r": rank, "lora_alpha": 2 * rank}
    if stored:
        config = read_json(folder, CONFIG)
        options = {key: config[key] for key in KEPT if config.get(key) is not None}
    if rank:
        options |= {"target_modules": LINEAR, "exclude_modules": NOT_IN}
    else:       # the file's own layers by their names: no pattern of another program is matched
        options["target_modules"] = sorted({name.rpartition(".lora_")[0] for name in stored})
    with one_line(folder, f"its {CONFIG} cannot be used", "copy it again"):
        config = peft.LoraConfig(**options)
        tuner = peft.LoraModel(qwen, {LEARNED: config, START: config}, LEARNED if rank else START)
        if stored and rank:
            tuner.inject_adapter(qwen, START)
    return tuner


@torch.no_grad()
def fill(qwen: nn.Module, which: str, stored: dict[str, Tensor], folder: str) -> None:
    """Copy what a file has into the adapters `which`. Raises ModelError unless it has all of their weights and nothing
    else: with more, such as DoRA's lengths, this would be another model."""
    weights = {name.replace(f".{which}.", "."): weight
               for name, weight in adapters(qwen, which).items()}
    if not weights:
        return
    wrong = weights.keys() ^ stored.keys()
    wrong |= {name for name in weights.keys() & stored.keys()
              if weights[name].shape != stored[name].shape}
    if wrong:
        raise ModelError(f"{folder}: its {WEIGHTS} has other weights than the adapters that its "
                         f"{CONFIG} and the model ask for, or in other shapes (such as "
                         f"{min(wrong)}); merge it into its model with peft")
    for name, weight in weights.items():
        weight.copy_(stored[name])


@torch.no_grad()
def draw(qwen: nn.Module, seed: int) -> None:
    """Draw A from peft's distribution, the same numbers on every process; B is 0 already."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(adapters(qwen).items()):
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5
            weight.uniform_(-bound, bound, generator=generator)


@contextmanager
def reference(policy: nn.Module | None) -> Iterator[None]:
    """Within it, a policy that learns adapters has instead the ones that training began with, if any, and so is its
    own reference policy. Any other model, and None, stays as it is."""
    modules = policy.modules() if policy is not None else ()
    layers = [module for module in modules if LEARNED in getattr(module, "lora_A", ())]
    try:
        for layer in layers:    # peft's disable_adapters would change what FSDP2 takes for learning
            layer._active_adapter = [START]             # skipped by layers that have none
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [LEARNED]


def write(qwen: nn.Module, weights: dict[str, Tensor], model: str, folder: Path) -> None:
    """Write what adapters learned as peft stores it, with the path of the folder of their model."""
    config = qwen.peft_config[LEARNED]
    config.base_model_name_or_path = os.path.abspath(model)
    config.target_modules = sorted(config.target_modules)   # the order of a set differs by process
    config.save_pretrained(folder)
    learned = {PREFIX + name.replace(f".{LEARNED}.", "."): weight.contiguous()
               for name, weight in weights.items() if f".{LEARNED}." in name}
    save_file(learned, folder / WEIGHTS, {"format": "pt"})
