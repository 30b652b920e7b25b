"""Model folders and names on the hub: what cannot be used ends with one line before a model is built, what can is the
same model for this project and for transformers. No test reaches the hub: its cache is made here."""
import json
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import evaluate
import ground
import grpo
import model
import rewards
from engine import lora, model_folder
from engine.model_folder import ModelError
from engine.video import Clip

CLIP = Clip(torch.zeros(4, 3, 28, 28, dtype=torch.uint8), 2.0)
REVISION = "66285546d2b821cf421d4f5eb2576359d3770cd3"
ONLY_TEXT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}"
             "<|im_end|>\n{% endfor %}<|im_start|>assistant\n")
RIGHT = ONLY_TEXT.replace("{{ p.text }}", "{{ p.text or '<|video_pad|>' }}")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the tiny model's folder, to be changed."""
    return shutil.copytree(folder / "model", tmp_path / "model")


def config(value, *keys):
    """A change of a folder: the value under `keys` in its config.json."""
    def apply(folder):
        values = json.loads((folder / "config.json").read_text())
        part = values
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        (folder / "config.json").write_text(json.dumps(values))
    return apply


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def template(text):
    return write("chat_template.jinja", text)


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def remove(name):
    return lambda folder: (folder / name).unlink()


def weights(replace, pattern=""):
    """A change of the weights whose names hold `pattern`, to replace(weight); None leaves one out."""
    def apply(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        for name in [name for name in tensors if pattern in name]:
            tensors[name] = replace(tensors[name])
            if tensors[name] is None:
                del tensors[name]
        save_file(tensors, path, metadata={"format": "pt"})
    return apply


def index(name):
    return write("model.safetensors.index.json", json.dumps({"weight_map": {"a": name}}))


REFUSED = {     # before a model is built: (what is wrong with the folder, words of the line)
    "no config": (remove("config.json"), "not a model folder.*config.json.*--model"),
    "broken config": (cut("config.json", 50), "not a model folder"),
    "another architecture": (config("qwen2_vl", "model_type"), "qwen2_vl"),
    "no sizes": (config({}, "text_config"), "sizes"),
    "no sizes of the vision tower": (config(None, "vision_config"), "sizes"),
    "refused by transformers": (config("x", "text_config", "rms_norm_eps"), "not a model folder.*rms_norm_eps"),
    "quantised": (config({"quant_method": "fp8"}, "quantization_config"), "quantised"),
    "quantised text": (config({"quant_method": "awq"}, "text_config", "quantization_config"), "quantised"),
    "whole numbers": (weights(lambda weight: weight.to(torch.int8)), r"model.safetensors .*quantised weights: I8"),
    "no weights": (remove("model.safetensors"), "model.safetensors cannot be used"),
    "truncated weights": (cut("model.safetensors", 100_000), "model.safetensors cannot be used"),
    "a file of weights is missing": (index("gone.safetensors"), "gone.safetensors cannot be used"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer cannot be read.*tokenizer.json"),
    "no tokenizer config": (remove("tokenizer_config.json"), "tokenizer cannot be read.*tokenizer_config.json"),
    "broken tokenizer": (cut("tokenizer.json", 1000), "tokenizer cannot be read"),
    "no template": (remove("chat_template.jinja"), "chat template cannot be used.*copy chat_template.jinja"),
    "template without video": (template(ONLY_TEXT), "makes 0 '<|video_pad|>' of one"),
    "template with two videos": (template(RIGHT + "<|video_pad|>"), "makes 2 '<|video_pad|>' of one"),
    "template without text": (template("<|video_pad|>"), "makes 0 'When .*' of one"),
    "template that raises": (template("{{ raise_exception('not for you') }}"), "template.*not for you"),
    "template that thinks": (template(RIGHT + "<think>\n"), "template.*writes <think> itself")}


def refuses(check, folder, words):
    with pytest.raises(ModelError, match=f"{folder}: .*{words}".replace("|", r"\|")) as error:
        check(str(folder))
    line = str(error.value)
    assert "\n" not in line and re.search("copy|give", line.rpartition(";")[2])


@pytest.mark.parametrize("what", REFUSED)
def test_folders_that_cannot_be_used(copy, what):
    """The check that every script makes first says so in one line, which names the folder and the way out."""
    harm, words = REFUSED[what]
    harm(copy)
    refuses(lora.check, copy, words)


@pytest.mark.parametrize("harm, words", [
    (config(64, "text_config", "hidden_size"), "weights are missing or have another shape"),
    (config(3, "text_config", "num_attention_heads"), "cannot be built.*num_heads"),
    (config("gelulu", "text_config", "hidden_act"), "cannot be built.*gelulu"),
    (weights(lambda weight: None, "layers.1.mlp"), "3 weights are missing.*layers.1.mlp"),
    (weights(lambda weight: weight[:9].clone(), "layers.1.mlp.up"), "1 weights.*layers.1.mlp.up")])
def test_models_that_cannot_be_built(copy, harm, words):
    """Weights that are missing or of another shape, transformers would replace by random numbers."""
    harm(copy)
    refuses(model.load, copy, words)


def test_a_tokenizer_needs_the_stop_tokens(copy):
    """Without them, every completion would be as long as it may be."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = copy / name
        path.write_text(path.read_text().replace("<|im_end|>", "<|im_stop|>"))
    with pytest.raises(ModelError, match=r"tokenizer lacks <\|im_end\|>"):
        model.load(str(copy))


def link(folder):
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to("../blob")


@pytest.mark.parametrize("harmless", [
    template(RIGHT), index("model.safetensors"), config(None, "quantization_config"),
    weights(torch.Tensor.bfloat16), link])
def test_folders_that_can_be_used(copy, harmless):
    harmless(copy)
    lora.check(str(copy))
    policy, encoder = model.load(str(copy))
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    assert encoder.tokenizer.decode(encoder.encode("when?", CLIP).input_ids).count("<|video_pad|>") == 2


def test_tags_that_are_special_tokens(copy):
    """The format reward sees them, and the instruction has them as the tokenizer makes them."""
    _, plain = model.load(str(copy))
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = True
    path.write_text(json.dumps(tokenizer))
    _, encoder = model.load(str(copy))
    assert all(token.special for token in encoder.tokenizer.added_tokens_decoder.values())
    answer = "<think>a b</think> <answer>1 to 2</answer>"
    ids = torch.tensor([encoder.tokenizer(answer + "<|im_end|>").input_ids])
    assert encoder.decode(ids, torch.ones_like(ids)) == [answer]
    assert rewards.format_reward(answer, timed=True) == 1
    for text in ("Think in <think> </think>.", "a <|video_pad|> in <think> </think>"):
        assert encoder.encode(text, CLIP).input_ids.tolist() == plain.encode(text, CLIP).input_ids.tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(folder, copy, tmp_path, value):
    """evaluate.py and ground.py end with one line after the first answers; train.py counts bad steps, so sampling
    itself goes on."""
    weights(lambda weight: weight.fill_(value), "layers.3.mlp.down")(copy)
    name, video_file = str(copy), next((folder / "videos").glob("test*.mp4"))
    with pytest.raises(ModelError, match=f"{name}: the model's logits are not finite"):
        evaluate.main(evaluate.Config(model=name, annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
                                      output=str(tmp_path / "out"), max_tokens=2, workers=1))
    assert not list(tmp_path.glob("out/scores.json"))
    with pytest.raises(ModelError, match=f"{name}: the model's logits are not finite"):
        ground.main(ground.Config(video=str(video_file), queries=["a circle spins"], model=name, max_tokens=2))
    policy, encoder = model.load(name)
    grpo.sample(policy, [encoder.encode("when?", CLIP)], 2, 2, encoder.stop_ids)


def test_a_file_that_changes_does_not_change_the_model(copy):
    """Whoever overwrites model.safetensors in place does it to the next run only."""
    policy, _ = model.load(str(copy))
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(100_000)
        file.write(b"\x42" * 100_000)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name])


def test_a_folder_is_replaced_whole_or_not_at_all(tiny, copy, tmp_path, monkeypatch):
    """On a full disk, and where a run that was killed has left its own."""
    policy, encoder = tiny
    shutil.copytree(copy, tmp_path / "model.tmp")
    shutil.copytree(copy, tmp_path / "model.old")
    before = (copy / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match=f"{copy}: could not be written .*No space"):
        patch.setattr(shutil, "copy", lambda *_: open("/dev/full", "w").write("x" * 10 ** 5))
        model.save(policy, encoder, copy)
    assert (copy / "model.safetensors").read_bytes() == before and not (tmp_path / "model.tmp").exists()
    model.save(policy, encoder, copy)
    assert (copy / "model.safetensors").read_bytes() != before          # this one is in fp64
    assert list(tmp_path.iterdir()) == [copy]


def test_transformers_generates_the_same_with_these_positions(folder, tmp_path):
    """The snippet in docs/transformers.md, run as it stands there, answers as this project does."""
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "transformers.md").read_text(), re.DOTALL)[1]
    file = next((folder / "videos").glob("test*.mp4"))
    text = snippet.replace('"runs/charades/model"', f'"{folder / "model"}"').replace('"video.mp4"', f'"{file}"')
    assert str(file) in text and str(folder) in text
    names = {}
    exec(compile(text.replace("max_new_tokens=1024", "max_new_tokens=12"), "docs/transformers.md", "exec"), names)
    policy, encoder = model.load(str(folder / "model"))
    rollouts = grpo.sample(policy, [names["prompt"]], 1, 12, encoder.stop_ids)
    assert names["ids"].tolist() == rollouts.completions[0].tolist()
    assert names["answer"] == encoder.decode(rollouts.completions[:, 0], rollouts.mask[:, 0])[0]


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """What `hf download org/tiny` leaves in an empty Hugging Face cache: the folder of revision main."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    entry = tmp_path / "hub" / "models--org--tiny"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(REVISION)
    shutil.copytree(folder / "model", entry / "snapshots" / REVISION)
    model_folder.local_folder.cache_clear()
    yield entry / "snapshots" / REVISION
    model_folder.local_folder.cache_clear()


@pytest.fixture
def downloads(monkeypatch):
    """The options of all calls that would download; they are answered from the cache instead."""
    calls, download = [], model_folder.snapshot_download

    def get(repository, **options):
        if not options.get("local_files_only"):
            calls.append(options)
        return download(repository, **{**options, "local_files_only": True})

    monkeypatch.setattr(model_folder, "snapshot_download", get)
    return calls


def test_a_name_is_its_folder_in_the_cache(hub, folder, tmp_path, downloads):
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{REVISION}"):
        assert model_folder.local_folder(name) == str(hub)
    policy, encoder = model.load("org/tiny")
    assert encoder.folder == policy.qwen.name_or_path == str(hub)
    settings = evaluate.Config(model="org/tiny", annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
                               output=str(tmp_path / "out"), tasks=["TVG"], steps=1, batch_size=2, max_tokens=3)
    assert evaluate.main(settings)["queries"] == 2 and not downloads
    assert f"{REVISION}/config.json" in (tmp_path / "out" / "inputs.json").read_text()


def test_the_config_can_be_downloaded_alone(hub, downloads):
    for path in hub.iterdir():
        if path.name != "config.json":
            path.unlink()
    name = model_folder.local_folder("org/tiny", config_only=True)
    assert model_folder.read_config(name).text_config.num_hidden_layers == 4
    assert [options["allow_patterns"] for options in downloads] == [["config.json", "adapter_config.json"]]


@pytest.mark.parametrize("name", ["runs/gone", "gone", "/gone/model", "a/b/c", "./a", "org/", "org/ti ny"])
def test_a_path_is_never_looked_up_on_the_hub(hub, tmp_path, monkeypatch, name):
    monkeypatch.setattr(model_folder, "snapshot_download", pytest.fail)
    (tmp_path / "runs").mkdir()
    assert model_folder.local_folder(name) == name
    with pytest.raises(ModelError, match=f"{name}: not a model folder"):
        lora.check(name)


@pytest.mark.parametrize("lost", ["model.safetensors", "model-1.safetensors", "tokenizer.json", "config.json"])
def test_what_is_not_whole_is_downloaded(hub, downloads, lost):
    """A download that broke leaves a folder, which huggingface_hub takes for the model."""
    if lost == "model-1.safetensors":
        index(lost)(hub)
    else:
        (hub / lost).unlink()
    model_folder.local_folder("org/tiny@main")
    options, = downloads
    assert options["revision"] == "main" and "*.safetensors" in options["allow_patterns"]


@pytest.mark.parametrize("name, command", [("org/gone", "hf download org/gone"),
                                           ("org/gone@v1", "hf download org/gone --revision v1")])
def test_without_a_network_the_way_out_is_named(hub, name, command):
    with pytest.raises(ModelError, match=f"{name}: there is no such folder.*{command}$") as error:
        lora.check(name)
    assert "\n" not in str(error.value)
