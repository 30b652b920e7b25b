"""Model folders in Hugging Face's form: found by their path or their name on the hub, checked, and written whole.

transformers reads them: safetensors only, and no code that comes with a folder. Whatever it raises becomes a ModelError
of one line that names the folder and the way out. What it would accept, though the model would then be another one
than the folder's name says, is refused here before anything large is built:

- a config.json that is not that of a Qwen2.5-VL, that leaves the sizes to transformers' defaults (72 billion weights),
  or that says that the weights are quantised;
- weights that are no floating-point numbers;
- tokenizer files that are missing, which transformers would replace by a tokenizer without a vocabulary;
- a chat template that leaves out the text or the video, or that begins the model's thought itself.
"""
import json
import os
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLConfig

FLOATS = {"F64", "F32", "F16", "BF16"}          # as safetensors calls them
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"          # of weights in several files
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
CONFIGS = ["config.json", "adapter_config.json"]
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
QUERY = "When does it happen?"
VIDEO = "<|video_pad|>"


class ModelError(ValueError):
    """A model folder that cannot be used; the message names the folder and the way out."""


def brief(error: Exception) -> str:
    """An error's message in one short line; its kind where the message alone, such as a key, says too little."""
    message = textwrap.shorten(str(error), 300, placeholder="...")
    if message and isinstance(error, (OSError, ValueError, RuntimeError)):
        return message
    return f"{type(error).__name__} {message}".strip()


@contextmanager
def one_line(folder: str | Path, problem: str, way_out: str) -> Iterator[None]:
    """Turn whatever is raised within into a ModelError of one line. transformers, torch, peft and templates raise any
    Exception for a file in another form than they expect."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: {problem} ({brief(error)}); {way_out}") from error


@lru_cache
def local_folder(name: str, config_only: bool = False) -> str:
    """The folder of the model `name`, which is a path, or a name on the Hugging Face hub: org/name or
    org/name@revision. The model of such a name is in the Hugging Face cache; what the cache lacks is downloaded, with
    `config_only` no more than the config. Raises ModelError when it cannot be downloaded."""
    hub_name = HUB_NAME.fullmatch(name)
    if hub_name is None or os.path.exists(os.path.dirname(name)):
        return name                     # a path, perhaps misspelt
    repository, revision = hub_name.groups()
    with suppress(LocalEntryNotFoundError, HFValidationError, ModelError):
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=DOWNLOADED, local_files_only=True)
        if is_whole(folder):
            return folder
    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()     # the first process shows them; the others wait for its files
    command = f"hf download {repository}"
    if revision:
        command += f" --revision {revision}"
    problem = ("there is no such folder, the Hugging Face cache has not all of its files, and they "
               "cannot be downloaded")
    with one_line(name, problem, f"where there is a network, get them: {command}"):
        return snapshot_download(
            repository, revision=revision, allow_patterns=CONFIGS if config_only else DOWNLOADED)


def is_whole(folder: str) -> bool:
    """Whether weights, config and tokenizer are all there: a download that broke leaves a folder with some of them."""
    files = [*weight_files(folder), *(Path(folder, name) for name in ("config.json", *TOKENIZER))]
    return all(path.exists() for path in files)


def weight_files(folder: str) -> list[Path]:
    """The files that hold a model's weights: those that its index names, or else model.safetensors."""
    names = [WEIGHTS]
    if Path(folder, INDEX).exists():
        names = read_json(folder, INDEX).get("weight_map", {}).values()
    return [Path(folder, name) for name in sorted(set(names))]


def read_json(folder: str | Path, name: str) -> dict:
    """The object in a JSON file of the folder. Raises ModelError."""
    with one_line(folder, f"its {name} cannot be read", "copy it again"):
        values = json.loads(Path(folder, name).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return values


def check(folder: str) -> None:
    """Raise ModelError unless `folder` has the config.json, weights, tokenizer and chat template of a Qwen2.5-VL. Takes
    a second and little memory. lora.check calls it, and checks adapters, too."""
    read_config(folder)
    for path in weight_files(folder):
        check_weights(path)
    load_tokenizer(folder)


def read_config(folder: str) -> Qwen2_5_VLConfig:
    """The config of a Qwen2.5-VL folder. Raises ModelError."""
    way_out = "give --model the folder of a Qwen2.5-VL in bf16 or fp32"
    with one_line(folder, "not a model folder that can be used", way_out):
        values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        if values.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"its config.json says model_type {values.get('model_type')!r}")
        text = values.get("text_config") or values      # absent as first published
        vision = values.get("vision_config") or {}
        if "hidden_size" not in text or "hidden_size" not in vision:
            raise ValueError("its config.json does not tell the model's sizes")
        if values.get("quantization_config") or text.get("quantization_config"):
            raise ValueError("its config.json says that the weights are quantised")
        return Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)


def check_weights(path: Path) -> None:
    """Raise ModelError unless the header of a safetensors file fits the file's size and tells of floating-point
    numbers."""
    with one_line(path.parent, f"its {path.name} cannot be used", "copy it again, in bf16 or fp32"):
        with safe_open(path, "pt") as file:
            types = {file.get_slice(name).get_dtype() for name in file.keys()}
        if types - FLOATS:
            raise ValueError(f"quantised weights: {', '.join(sorted(types - FLOATS))}")


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a chat template that makes prompts. Raises ModelError."""
    way_out = "copy the tokenizer*.json files again"
    with one_line(folder, "its tokenizer cannot be read", way_out):
        for name in TOKENIZER:
            Path(folder, name).stat()           # transformers would go on without
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True)
    check_template(folder, tokenizer)
    return tokenizer


def check_template(folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError unless the chat template makes a prompt of a text and a video, with the whole answer left to the
    model."""
    content = [{"type": "text", "text": QUERY}, {"type": "video"}]
    problem = "its chat template cannot be used"
    with one_line(folder, problem, "copy chat_template.jinja of a Qwen2.5-VL folder"):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        for text in (QUERY, VIDEO):
            if prompt.count(text) != 1:
                raise ValueError(f"it makes {prompt.count(text)} {text!r} of one")
        if "<think>" in prompt.partition(QUERY)[2]:
            raise ValueError("it writes <think> itself, so no answer would have it and the format "
                             "reward would be 0")


@contextmanager
def replaced(folder: str | Path) -> Iterator[Path]:
    """An empty folder beside `folder`, to be filled in the with statement; at its end it takes the place of `folder`.
    Whenever the process is killed, the new folder or the previous one is whole. Raises OSError, and leaves `folder` as
    it was, when the new one cannot be written."""
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    previous = folder.with_name(folder.name + ".old")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():
            path.chmod(0o644)           # safetensors writes 0600: nobody else could read it
    except (SafetensorError, OSError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{folder}: could not be written ({error})") from error
    if folder.exists():                 # os.replace does not put a folder in the place of another
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(unfinished, folder)
    shutil.rmtree(previous, ignore_errors=True)


def copy_texts(source: str | Path, folder: Path, with_config: bool) -> None:
    """Copy a model folder's own json and jinja files and merges.txt. Older versions of transformers read these, not
    those that transformers 5 writes. Beside adapters there is no config.json, or transformers would look for whole
    weights there."""
    left_out = [INDEX] if with_config else [INDEX, "config.json"]
    for path in Path(source).iterdir():
        is_text = path.suffix in (".json", ".jinja") or path.name == "merges.txt"
        if is_text and path.name not in left_out:
            shutil.copy(path, folder)
