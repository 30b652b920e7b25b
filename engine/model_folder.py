"""Checks of a Hugging Face model folder that need no model: a fraction of a second, before anything large is built.

Every error is a ModelError of one line that names the file and the way out. Checked are

- that files are files (a fifo would be waited for without end) and no text among them is larger than TEXT_LIMIT;
- config.json: a Qwen2.5-VL that tells its sizes, is not quantised, and asks for nothing that transformers lacks;
- the headers of the *.safetensors files: whole, inside the folder, of floating-point numbers;
- the chat template, by rendering it once. It is a program of somebody else's, so it first runs in a process of its own
  with a limit of time and memory.
"""
import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Qwen2_5_VLConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.chat_template_utils import render_jinja_template

TEXT_LIMIT = 2 ** 27            # bytes; Qwen2.5-VL's largest, tokenizer.json, has 11 million
FLOATS = {"F64", "F32", "F16", "BF16"}                                          # as safetensors calls them
ROPES = {"default", "mrope", *ROPE_INIT_FUNCTIONS}
TEXT_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
VISION_SIZES = ("hidden_size", "intermediate_size", "depth", "num_heads", "out_hidden_size")
QUERY = "When does it happen?"
SECONDS, MEMORY, LETTERS = 10, 2 ** 30, 10 ** 6         # that rendering a template may take; it takes 0.001 s
TRIAL = f"""                    # what transformers renders with, as far as it matters for whether rendering ends
import json, sys
from datetime import datetime
template, chat, sys.path[:] = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
except (ImportError, ValueError, OSError):
    pass                        # not on this system
import jinja2.sandbox
environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                           extensions=["jinja2.ext.loopcontrols"])
def raise_exception(message):
    raise jinja2.TemplateError(message)
environment.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form))
try:
    text = environment.from_string(template).render(messages=chat, add_generation_prompt=True)
    sys.exit("it writes millions of letters" if len(text) > {LETTERS} else 0)
except (MemoryError, OverflowError):
    sys.exit("it needs more than {MEMORY // 2 ** 20} MB of memory")
except Exception:
    pass                        # transformers will say it better
"""


class ModelError(ValueError):
    """A model folder that cannot be used; the message names the folder and the way out."""


def brief(error: Exception) -> str:
    """An error's message in one line; its kind where the message alone, such as a key, says too little."""
    said = " ".join(str(error).split())
    return said if isinstance(error, (OSError, ValueError, RuntimeError)) and said else \
        f"{type(error).__name__} {said}".strip()


def check_folder(folder: str) -> None:
    """Raise ModelError unless `folder` looks like a Qwen2.5-VL folder with config.json, tokenizer, chat template and
    whole weights."""
    check_config(folder)
    for path in Path(folder).iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.exists():
            check_file(path, TEXT_LIMIT)
    check_weights(folder)
    read_json(folder, "tokenizer.json", "copy the tokenizer*.json files again")
    check_template(folder, read_json(folder, "tokenizer_config.json", "copy the tokenizer*.json files again"))


def check_file(path: Path, limit: float = float("inf")) -> None:
    """Raise ModelError where reading `path` would not end, or only at `limit` bytes; OSError where it is not there."""
    if not path.is_file():
        path.stat()                             # says what is wrong with the path
        raise ModelError(f"{path.parent}: its {path.name} is not a regular file; put the file itself there")
    if path.stat().st_size > limit:
        raise ModelError(f"{path.parent}: its {path.name} has {path.stat().st_size} bytes, which no such file has "
                         f"(at most {limit}); copy it again")


def read_json(folder: str, name: str, way_out: str) -> dict:
    """The object in a JSON file of the folder. Raises ModelError."""
    try:
        check_file(Path(folder) / name, TEXT_LIMIT)
        found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("it is not a JSON object")
    except ModelError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{folder}: its {name} cannot be read ({error}); {way_out}") from error
    return found


def check_config(folder: str) -> None:
    """Raise ModelError unless `folder` has the config.json of a Qwen2.5-VL that can be built."""
    try:
        config = read_json(folder, "config.json", "give --model a folder with config.json, *.safetensors and "
                                                  "tokenizer.json")
    except ModelError as error:
        raise ModelError(str(error).replace(f"{folder}: its", f"{folder}: not a model folder, its", 1)) from error
    wrong = lambda what: ModelError(f"{folder}: its config.json {what}")
    if (kind := config.get("model_type")) != "qwen2_5_vl":
        raise ModelError(f"{folder}: not a model folder of its kind, model_type in config.json is {kind!r}, not "
                         "'qwen2_5_vl'; give --model a Qwen2.5-VL folder")
    text = config if config.get("text_config") is None else config["text_config"]   # null: flat, as first published
    vision = config.get("vision_config")
    for part, name, sizes in ((text, "text_config", TEXT_SIZES), (vision, "vision_config", VISION_SIZES)):
        # transformers leaves out what equals its defaults, but without any it would build a model of 72 billion weights
        if not isinstance(part, dict) or not part.keys() & set(sizes):
            raise wrong(f"does not tell the model's sizes ({name} is empty or missing); copy it again")
        for size in sizes:
            if size in part and (type(part[size]) is not int or part[size] < 1):
                raise wrong(f"says {size} {part[size]!r} ({name}), which is no size; copy it again")
        if (act := part.get("hidden_act", "silu")) not in list(ACT2FN):
            raise wrong(f"asks for the activation function {act!r} ({name}), which transformers lacks; copy it again")
    for part in (config, text):
        if part.get("quantization_config") is not None:
            how = part["quantization_config"]
            how = how.get("quant_method", "?") if isinstance(how, dict) else how
            raise wrong(f"says that the weights are quantised ({how}), which cannot be trained here; give --model the "
                        "folder in bf16 or fp32 that it was made from")
        for key in ("rope_scaling", "rope_parameters"):
            rope = part.get(key) or {}
            kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
            if kind not in list(ROPES):
                raise wrong(f"asks for rotary positions of type {kind!r} ({key}), which transformers lacks; copy it "
                            "again")
    try:
        Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:          # it raises whatever its fields' types raise
        raise wrong(f"cannot be used ({brief(error)}); copy it again") from error


def check_weights(folder: str) -> None:
    """Raise ModelError unless the headers of the *.safetensors files tell of floating-point numbers."""
    index, names, kinds = Path(folder) / "model.safetensors.index.json", {"model.safetensors"}, set()
    if index.exists():
        found = read_json(folder, index.name, "copy it again").get("weight_map")
        if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
            raise ModelError(f"{folder}: its {index.name} names no files of weights (weight_map); copy it again")
        names = set(found.values())
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{folder}: its {index.name} names {name!r}, which is no *.safetensors file of this "
                             "folder; copy it again")
        try:
            check_file(Path(folder) / name)
            with safe_open(Path(folder) / name, "pt") as file:              # the header must fit the file's size
                of_file = {file.get_slice(weight).get_dtype() for weight in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{folder}: its {name} cannot be read ({error}); copy the *.safetensors files again") \
                from error
        if odd := sorted(of_file - FLOATS):
            raise ModelError(f"{folder}: its {name} has quantised weights ({', '.join(odd)}); give --model the folder "
                             "in bf16 or fp32 that it was made from")
        kinds |= of_file
    if not kinds:
        raise ModelError(f"{folder}: its *.safetensors files hold no weights; copy them again")


def check_template(folder: str, tokenizer: dict) -> None:
    """Raise ModelError unless the chat template, in a file of its own or in tokenizer_config.json, makes a prompt of a
    text and a video, with the answer left to the model."""
    path, name = Path(folder) / "chat_template.jinja", "tokenizer_config.json"
    template = tokenizer.get("chat_template")
    if isinstance(template, list):      # several by name
        template = next((each.get("template") for each in template
                         if isinstance(each, dict) and each.get("name") == "default"), None)
    if path.exists():
        name = path.name
        try:
            template = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ModelError(f"{folder}: its {name} cannot be read ({error}); copy it again") from error
    if not isinstance(template, str) or not template.strip():
        if (Path(folder) / "chat_template.json").exists():
            raise ModelError(f"{folder}: its chat template is in chat_template.json only, which no tokenizer reads; "
                             "write the text that is in it to chat_template.jinja")
        raise ModelError(f"{folder}: its {name} has no chat template; copy chat_template.jinja, too")
    text, error = render(template)
    if not error and text.count("<|video_pad|>") != 1:
        error = f"it makes {text.count('<|video_pad|>')} <|video_pad|> of one video"
    elif not error and text.count(QUERY) != 1:
        error = f"the text stands in it {text.count(QUERY)} times"
    if error:
        raise ModelError(f"{folder}: the chat template in its {name} makes no prompt of a text and a video ({error}); "
                         "copy that of a Qwen2.5-VL folder")
    if "<think>" in text.partition(QUERY)[2]:
        raise ModelError(f"{folder}: the chat template in its {name} writes <think> itself, so no answer would have it "
                         "and the format reward would be 0; delete <think> from the template's end")


@lru_cache
def render(template: str) -> tuple[str, str]:
    """(a chat of one text and one video, what went wrong): one of the two is empty."""
    chat = [{"role": "user", "content": [{"type": "text", "text": QUERY}, {"type": "video"}]}]
    try:
        tried = subprocess.run([sys.executable, "-I", "-c", TRIAL], input=json.dumps([template, chat, sys.path]),
                               capture_output=True, text=True, timeout=SECONDS)
        if tried.returncode:
            return "", (tried.stderr.splitlines() or [f"it ended with {tried.returncode}"])[-1]
        return render_jinja_template([chat], chat_template=template, add_generation_prompt=True)[0][0], ""
    except subprocess.TimeoutExpired:
        return "", f"it is not done in {SECONDS} s"
    except Exception as error:          # a template can raise anything
        return "", brief(error)
