"""Models by their name on the Hugging Face hub, Qwen/Qwen2.5-VL-3B-Instruct, or with @ and a revision behind it."""
import json
import os
import re
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import disable_progress_bars

from engine.model_folder import ModelError, brief

FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]        # weights, configs, tokenizer, template
CONFIGS = ["config.json", "adapter_config.json"]
NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


@lru_cache
def local_folder(model: str, config_only: bool = False) -> str:
    """The folder of a model: for a name on the hub that in the Hugging Face cache, downloaded where it is not there as
    a whole, with `config_only` of that its configs alone; anything else is `model` itself. Raises ModelError when it
    cannot be downloaded."""
    name = NAME.fullmatch(model)
    if name is None or os.path.exists(os.path.dirname(model)):      # in that case, a folder that is misspelt
        return model
    asked = {"repo_id": name[1], "revision": name[2], "allow_patterns": FILES}
    try:
        folder = snapshot_download(**asked, local_files_only=True)
        if is_whole(folder):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()         # the first process shows them; the others wait for its files
    try:
        return snapshot_download(**asked | ({"allow_patterns": CONFIGS} if config_only else {}))
    except (HfHubHTTPError, OfflineModeIsEnabled, HFValidationError, OSError, ValueError) as error:
        revision = f" --revision {name[2]}" if name[2] else ""
        raise ModelError(f"{model}: there is no such folder, the Hugging Face cache has not all of its files, and they "
                         f"cannot be downloaded ({brief(error)[:150]}...); where there is a network, get them: hf "
                         f"download {name[1]}{revision}") from error


def is_whole(folder: str) -> bool:
    """Whether all weights, the config and the tokenizer are there: a broken download leaves some."""
    index, names = Path(folder) / "model.safetensors.index.json", ["model.safetensors"]
    try:
        if index.exists():
            names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return all((Path(folder) / name).exists() for name in (*names, "config.json", "tokenizer.json",
                                                           "tokenizer_config.json"))
