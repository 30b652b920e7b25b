"""LoRA (Hu et al., 2021) through peft: small adapters learn, the model's own weights stay as they are.

A linear layer of the language model, y = W x, becomes y = W x + 2 B A x with A (rank, in) and B (out, rank). A begins
with random numbers, B with 0, so training starts from the model itself. The embeddings, the head and the vision tower
have no adapters. With the adapters off the model is its own reference policy, so there is no second copy of it.

Stored is a folder as peft has it: adapter_config.json, with the path of the model that the adapters belong to, and
adapter_model.safetensors. Training that starts from such a folder goes on with its adapters, and the reference policy
has them as they were.

Merged in bf16, W + 2 B A would be W again wherever the change is less than half a step of bf16, 0.2 to 0.4 % of a
weight; so adapters are merged in fp32 only, and else they stay beside the weights.
"""
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine import model_folder
from engine.hub import local_folder
from engine.model_folder import FLOATS, ModelError, brief

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
NOT_IN = r"model\.visual\..*"               # where layers have the same names
KEPT = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")       # of another adapter's config
LEARNED, START = "default", "start"         # peft's names of the adapters that learn, and of those training began with
PREFIX = "base_model.model."                # of peft's names in a file
peft_config = partial(model_folder.read_json, name=CONFIG, way_out="copy it again")


def base(folder: str) -> str:
    """The model folder that the adapters in `folder` belong to, or `folder` itself where it holds none.

    Raises ModelError when it is not there."""
    folder = local_folder(folder)
    if not Path(folder, CONFIG).exists():
        return folder
    path = peft_config(folder).get("base_model_name_or_path")
    try:
        path = local_folder(path) if isinstance(path, str) else path
    except ModelError as error:
        raise ModelError(f"{folder}: the model of its adapters is not there; {error}") from error
    if not isinstance(path, str) or not Path(path, "config.json").is_file() or Path(path, CONFIG).exists():
        raise ModelError(f"{folder}: the model of its adapters, {path!r}, is not there; write the path of its folder "
                         f"to base_model_name_or_path in {CONFIG}")
    return path


def files(folder: str, pattern: str = "*") -> list[Path]:
    """The files of a model folder, and those of the model that its adapters belong to."""
    both = dict.fromkeys((local_folder(folder), base(folder)))
    return [path for each in both for path in sorted(Path(each).glob(pattern))]


def check_folder(folder: str) -> None:
    """As model_folder.check_folder, of adapters and their model, too."""
    folder = local_folder(folder)
    if (model := base(folder)) != folder:
        if (kind := peft_config(folder).get("peft_type")) != "LORA":
            raise ModelError(f"{folder}: its {CONFIG} is of {kind!r}, not 'LORA'; merge it into its model with peft")
        try:
            model_folder.check_file(Path(folder, WEIGHTS))
            with safe_open(Path(folder, WEIGHTS), "pt") as file:            # the header must fit the file's size
                odd = {file.get_slice(name).get_dtype() for name in file.keys()} - FLOATS
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder}: its {WEIGHTS} cannot be read ({error}); copy it again") from error
        if odd:
            raise ModelError(f"{folder}: its {WEIGHTS} has weights that are no numbers of floating point "
                             f"({', '.join(sorted(odd))}); copy it again")
    model_folder.check_folder(model)


def check_rank(rank: int) -> None:
    if rank < 0:
        raise ValueError(f"--lora_rank {rank}: give a rank, such as 16, or 0 to train all weights")


def check_flags(config: Any) -> None:
    """Raise ValueError, naming the flag, for --lora_rank and --merge that cannot work with --model."""
    check_rank(config.lora_rank)
    if config.lora_rank and base(config.model) != local_folder(config.model):
        if (rank := peft_config(local_folder(config.model)).get("r")) != config.lora_rank:
            raise ValueError(f"--lora_rank {config.lora_rank}: the adapters in {config.model} have rank {rank}, and "
                             "training goes on with them; give that rank, or 0 to merge them and train all weights")


def adapters(model: nn.Module, which: str = LEARNED) -> dict[str, nn.Parameter]:
    """The weights of a model's adapters, by their names in it; none where it has no such adapters."""
    return {name: weight for name, weight in model.named_parameters() if f".{which}." in name and ".lora_" in name}


def frozen(policy: nn.Module) -> set[nn.Parameter]:
    """The weights of a policy that adapters leave as they are; none where it has no adapters that learn."""
    return {weight for weight in policy.parameters() if not weight.requires_grad} if adapters(policy) else set()


def attach(qwen: nn.Module, folder: str, rank: int = 0, seed: int = 0) -> None:
    """Give a model on the CPU the adapters that are in `folder`, if any. With `rank` they learn, in fp32, and all else
    is frozen; where `folder` has none they begin with numbers drawn from `seed`. Without, they are merged into fp32
    weights, and beside others they stay. Raises ModelError."""
    stored = base(folder) != folder
    if not stored and not rank:
        return
    import peft  # takes most of a second, and only this needs it

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")      # peft asks transformers for it
    found, how = {}, {"r": rank, "lora_alpha": 2 * rank}
    if stored:
        found = {name.removeprefix(PREFIX): weight for name, weight in load_file(Path(folder, WEIGHTS)).items()}
        how = {key: value for key, value in peft_config(folder).items() if key in KEPT and value is not None}
    # a file's own layers by their names, so that no pattern of somebody else's has to be matched
    layers = sorted({name.rpartition(".lora_")[0] for name in found}) if stored and not rank else LINEAR
    try:
        how = peft.LoraConfig(**how, target_modules=layers, exclude_modules=NOT_IN if layers is LINEAR else None)
        tuner = peft.LoraModel(qwen, {LEARNED: how, START: how}, LEARNED if rank else START)
        if stored and rank:
            tuner.inject_adapter(qwen, START)
    except Exception as error:          # it raises whatever its fields' types raise
        raise ModelError(f"{folder}: its {CONFIG} cannot be used ({brief(error)}); copy it again") from error
    qwen.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for which in (LEARNED, START):
        weights = adapters(qwen, which)
        if stored and weights:
            fill({name.replace(f".{which}.", "."): weight for name, weight in weights.items()}, found, folder)
        for name, weight in sorted(weights.items()):
            if not stored and ".lora_A." in name:       # peft's distribution, the same numbers on every process
                nn.init.uniform_(weight, -weight.shape[1] ** -0.5, weight.shape[1] ** -0.5, generator=generator)
    if rank:
        for weight in adapters(qwen).values():
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))
            weight.requires_grad_(True)
    elif next(qwen.parameters()).dtype == torch.float32:
        tuner.merge_and_unload()
        qwen.requires_grad_(True)


@torch.no_grad()
def fill(weights: dict[str, nn.Parameter], found: dict[str, Tensor], folder: str) -> None:
    """Copy what a file has into the weights of adapters. Raises ModelError unless it has all of them and nothing
    else: with more, such as DoRA's lengths, this would be another model."""
    wrong = sorted(weights.keys() ^ found.keys()) or sorted(n for n in found if found[n].shape != weights[n].shape)
    if wrong:
        raise ModelError(f"{folder}: its {WEIGHTS} has other weights than the adapters that its {CONFIG} and the model "
                         f"ask for, or in other shapes (such as {wrong[0]}); merge it into its model with peft")
    for name, weight in weights.items():
        weight.copy_(found[name])


@contextmanager
def reference(policy: nn.Module | None) -> Iterator[None]:
    """Within it, a policy that learns adapters has instead the ones that training began with, if any, and so is its
    own reference policy. Any other model, and None, stays as it is."""
    modules = policy.modules() if policy is not None else ()
    layers = [module for module in modules if LEARNED in getattr(module, "lora_A", ())]
    try:
        for layer in layers:        # not peft's disable_adapters, which changes what FSDP2 takes for learning
            layer._active_adapter = [START]             # skipped by layers that have none
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [LEARNED]


def merge(qwen: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights by name, adapters included -> those of the model without adapters that computes the same, all
    in fp32."""
    merged = {name.replace(".base_layer.", "."): weight.float() for name, weight in weights.items()
              if ".lora_" not in name}
    for name, layer in qwen.named_modules():
        if LEARNED in getattr(layer, "lora_A", ()):
            a, b = (weights[f"{name}.lora_{which}.{LEARNED}.weight"].float() for which in "AB")     # (r, in), (out, r)
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + b @ a * layer.scaling[LEARNED]
    return merged


def write(qwen: nn.Module, weights: dict[str, Tensor], model: str, folder: Path) -> None:
    """Write what adapters learned as peft stores it, with the path of the folder of their model."""
    how = qwen.peft_config[LEARNED]
    how.base_model_name_or_path = os.path.abspath(model)
    how.target_modules = sorted(how.target_modules)     # peft's set has another order in each process
    how.save_pretrained(folder)
    save_file({PREFIX + name.replace(f".{LEARNED}.", "."): weight.contiguous() for name, weight in weights.items()
               if f".{LEARNED}." in name}, folder / WEIGHTS, {"format": "pt"})
