"""Model folders of all kinds: what cannot be used is said in one line that names the file, before a model is built;
what is trained here stays a folder that others can load."""
import json
import os
import re
import shutil
from functools import partial, reduce
from pathlib import Path

import pytest
import torch
from engine.launch import command_line
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import evaluate
import ground
import grpo
import model
import rewards
import tasks
from data import Sample
from engine import video
from engine.video import Clip

ROOT = Path(__file__).parent.parent
CLIP = Clip(torch.zeros(4, 3, 28, 28, dtype=torch.uint8), 2.0)


def change(name, **values):
    """Sets values of a JSON file; "a__b" is b in a."""
    def harm(folder):
        config = json.loads((folder / name).read_text())
        for key, value in values.items():
            *path, last = key.split("__")
            reduce(dict.__getitem__, path, config)[last] = value
        (folder / name).write_text(json.dumps(config))
    return harm


config, tokenizer = partial(change, "config.json"), partial(change, "tokenizer_config.json")


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def resave(select):
    def harm(folder):
        weights = load_file(folder / "model.safetensors")
        chosen = {k: select(k, v) for k, v in weights.items()}
        save_file({k: v for k, v in chosen.items() if v is not None}, folder / "model.safetensors",
                  metadata={"format": "pt"})
    return harm


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(name):
    return lambda folder: (folder / name).unlink()


def fifo(name):
    def harm(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    return harm


def huge(name):
    """3 GB that take no place on the disk."""
    return lambda folder: os.truncate(folder / name, 3 * 2 ** 30)


def index(names):
    return write("model.safetensors.index.json", json.dumps({"weight_map": names}))


def template(text, *others):
    def harm(folder):
        (folder / "chat_template.jinja").write_text(text)
        for other in others:
            other(folder)
    return harm


def legacy(folder):
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": text}))


CUT_SHORT = [
    (remove("config.json"), "config.json"), (cut("config.json", 50), "config.json"),
    (cut("config.json", 0), "config.json"), (write("config.json", "[" * 100_000), "config.json"),
    (write("config.json", "[]"), "config.json.*not a JSON object"), (write("config.json", b"\xff"), "config.json"),
    (remove("model.safetensors"), "model.safetensors"), (cut("model.safetensors", 0), "model.safetensors"),
    (cut("model.safetensors", 100_000), "model.safetensors"),
    (write("model.safetensors", b"\xff" * 1000), "model.safetensors"),
    (remove("tokenizer.json"), "tokenizer.json"), (cut("tokenizer.json", 1000), "tokenizer.json"),
    (remove("tokenizer_config.json"), "tokenizer_config.json"),
    (cut("tokenizer_config.json", 30), "tokenizer_config.json"),
    (fifo("config.json"), "config.json is not a regular file"), (fifo("tokenizer.json"), "tokenizer.json is not a re"),
    (fifo("model.safetensors"), "model.safetensors is not a regular file"),
    (fifo("merges.txt"), "merges.txt is not a regular file"),
    (fifo("generation_config.json"), "generation_config.json is not a regular file"),
    (huge("tokenizer_config.json"), "tokenizer_config.json has 3221225472 bytes"),
    (huge("config.json"), "config.json has 3221225472 bytes")]
CONFIGS = [
    (config(model_type="qwen2_vl"), "qwen2_vl"), (write("config.json", '{"model_type": "qwen2_5_vl"}'), "sizes"),
    (config(text_config=None), "text_config is empty"), (config(text_config={}), "text_config is empty"),
    (config(text_config=[1]), "text_config is empty"),
    (config(text_config={"model_type": "x"}), "text_config is empty"),
    (config(vision_config=None), "vision_config is empty"), (config(vision_config={}), "vision_config is empty"),
    (config(text_config__hidden_size=0), "hidden_size 0"), (config(text_config__hidden_size="x"), "hidden_size 'x'"),
    (config(vision_config__depth=True), "depth True"), (config(text_config__num_hidden_layers=-2), "layers -2"),
    (config(text_config__hidden_act="gelulu"), "'gelulu'"), (config(vision_config__hidden_act="gelulu"), "'gelulu'"),
    (config(vision_config__hidden_act=[1]), r"function \[1\]"),
    (config(text_config__rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "'spiral'"),
    (config(rope_scaling={"type": "spiral"}), "'spiral'"), (config(rope_scaling="spiral"), "'spiral'"),
    (config(text_config__rope_parameters={"rope_type": "yarn"}), "config.json cannot be used.*factor"),
    (config(text_config__rms_norm_eps="x"), "config.json cannot be used.*rms_norm_eps"),
    (config(rope_scaling={"type": ["mrope"]}), "type .'mrope'."),
    *((config(quantization_config={"quant_method": kind}), f"config.json says .* quantised .{kind}")
      for kind in ("awq", "gptq", "bitsandbytes", "fp8", "compressed-tensors")),
    (config(text_config__quantization_config={"quant_method": "awq"}), "quantised .awq"),
    (config(quantization_config="4 bit"), "quantised .4 bit")]
WEIGHTS = [
    (index({"a": "gone.safetensors"}), "gone.safetensors"), (index({}), "index.json names no files"),
    (write("model.safetensors.index.json", "{}"), "index.json names no files"),
    (write("model.safetensors.index.json", '{"weight_map": ["a"]}'), "index.json names no files"),
    (index({"a": 3}), "index.json names no files"), (index({"a": "../model.safetensors"}), "index.json names '../mod"),
    (index({"a": "/etc/passwd"}), "index.json names '/etc/passwd'"), (index({"a": ".."}), "index.json names '..'"),
    (index({"a": "config.json"}), "index.json names 'config.json'"),
    (resave(lambda name, value: value.to(torch.int8)), r"model.safetensors has quantised weights \(I8\)"),
    (resave(lambda name, value: value.to(torch.float8_e4m3fn) if "mlp" in name else value), r"quantised.*F8_E4M3\)"),
    (resave(lambda name, value: None), "hold no weights")]
ONLY_TEXT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}"
             "<|im_end|>\n{% endfor %}<|im_start|>assistant\n")
RIGHT = ONLY_TEXT.replace("{{ p.text }}", "{{ p.text or '<|video_pad|>' }}")
TEMPLATES = [
    (template(ONLY_TEXT), "chat_template.jinja makes no prompt.*0 <|video_pad|>"),
    (template("{{ messages[0].role + messages[0].content }}"), "chat_template.jinja makes no prompt.*list"),
    (template("{% for m in messages %}"), "chat_template.jinja makes no prompt.*endfor"),
    (template("{{ raise_exception('not for you') }}"), "chat_template.jinja makes no prompt.*not for you"),
    (template("{{ messages[3].role }}"), "chat_template.jinja makes no prompt"),
    (template("<|video_pad|>"), "chat_template.jinja makes no prompt.*the text stands in it 0 times"),
    (template(RIGHT + "<|video_pad|>"), "chat_template.jinja makes no prompt.*2 <|video_pad|>"),
    (template(RIGHT + "<think>\n"), "chat_template.jinja writes <think> itself"),
    (template(RIGHT + "{{ 'long' * 10 ** 9 }}"), "chat_template.jinja makes no prompt.*MB of memory"),
    (template(RIGHT + "{{ 'long' * 10 ** 6 }}"), "chat_template.jinja makes no prompt.*letters"),
    (template(RIGHT + "{% for i in range(99999) %}" * 4 + "{% endfor %}" * 4), "chat_template.jinja.*not done in"),
    (write("chat_template.jinja", b"\xff"), "chat_template.jinja cannot be read"),
    (fifo("chat_template.jinja"), "chat_template.jinja is not a regular file"),
    (huge("chat_template.jinja"), "chat_template.jinja has 3221225472 bytes"),
    (legacy, "chat_template.json only"), (remove("chat_template.jinja"), "tokenizer_config.json has no chat template"),
    (lambda folder: [harm(folder) for harm in (remove("chat_template.jinja"), tokenizer(chat_template=ONLY_TEXT))],
     "tokenizer_config.json makes no prompt")]


@pytest.mark.parametrize("harm, words", [*CUT_SHORT, *CONFIGS, *WEIGHTS, *TEMPLATES])
def test_folders_that_cannot_be_used(folder, tmp_path, monkeypatch, harm, words):
    """Found by the check that every script makes first."""
    monkeypatch.setattr(folders, "SECONDS", 1)
    shutil.copytree(folder / "model", tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(model.ModelError, match=f"model: .*(?:{words})") as error:
        model.check_folder(str(tmp_path / "model"))
    assert "\n" not in str(error.value)
    assert re.search("copy|give|put|write|delete", str(error.value).rpartition(";")[2])


@pytest.mark.parametrize("harm, words", [
    (config(text_config__hidden_size=64), "weights are missing or have another shape"),
    (config(text_config__num_attention_heads=3), "num_heads"),
    (resave(lambda name, value: None if "layers.1.mlp" in name else value), "3 weights are missing.*layers.1.mlp"),
    (resave(lambda name, value: value[:9].clone() if "layers.1.mlp.up" in name else value),
     "1 weights.*layers.1.mlp.up"),
    (change("tokenizer.json", model={"type": "BPE"}), "tokenizer cannot be read")])
def test_folders_that_cannot_be_loaded(folder, tmp_path, harm, words):
    shutil.copytree(folder / "model", tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(model.ModelError, match=f"model: .*(?:{words})") as error:
        model.load(str(tmp_path / "model"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    lambda folder: None, template(RIGHT), index({"a": "model.safetensors"}), config(quantization_config=None),
    config(rope_scaling={"type": "mrope"}), resave(lambda name, value: value.bfloat16()),
    template(RIGHT + "{{ strftime_now('%Y') }}{{ messages|tojson|length }}{% generation %}{% endgeneration %}"),
    lambda folder: [harm(folder) for harm in (remove("chat_template.jinja"), tokenizer(chat_template=RIGHT))],
    lambda folder: [harm(folder) for harm in (remove("chat_template.jinja"), tokenizer(chat_template=[
        {"name": "tool_use", "template": ""}, {"name": "default", "template": RIGHT}]))],
    lambda folder: (folder / "model.safetensors").rename(folder.parent / "blob") and
    (folder / "model.safetensors").symlink_to("../blob")])      # as Hugging Face's cache has them
def test_folders_that_can_be_used(folder, tmp_path, change):
    shutil.copytree(folder / "model", tmp_path / "model")
    change(tmp_path / "model")
    model.check_folder(str(tmp_path / "model"))
    _, encoder = model.load(str(tmp_path / "model"))
    assert encoder.tokenizer.decode(encoder.encode("when?", CLIP).ids).count("<|video_pad|>") == 2


def test_no_script_takes_a_bad_folder(folder, tmp_path, monkeypatch, capsys):
    """One line, exit code 2."""
    shutil.copytree(folder / "model", tmp_path / "model")
    config(quantization_config={"quant_method": "awq"})(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--model", str(tmp_path / "model"), "--annotations",
                                     str(folder / "test.txt"), "--videos", str(folder / "videos"), "--output",
                                     str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        command_line(evaluate.Config, evaluate.main, "")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and "awq" in said


def test_tags_that_are_special_tokens(folder, tmp_path):
    """The format reward sees them, and the instruction has them as the tokenizer makes them."""
    shutil.copytree(folder / "model", tmp_path / "model")
    plain = model.load(str(tmp_path / "model"))[1]
    path = tmp_path / "model" / "tokenizer.json"
    found = json.loads(path.read_text())
    for token in found["added_tokens"]:
        token["special"] = True
    path.write_text(json.dumps(found))
    encoder = model.load(str(tmp_path / "model"))[1]
    assert all(token.special for token in encoder.tokenizer.added_tokens_decoder.values())
    said = "<think>a b</think> <answer>1 to 2</answer>"
    ids = torch.tensor([encoder.tokenizer(said + "<|im_end|>").input_ids])
    assert encoder.decode(ids, torch.ones_like(ids)) == [said] and rewards.format_reward(said, timed=True) == 1
    for text in ("Think in <think> </think>.", "a <|video_pad|> in <think> </think>"):
        assert encoder.encode(text, CLIP).ids.tolist() == plain.encode(text, CLIP).ids.tolist()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(folder, tmp_path, value):
    """evaluate.py and ground.py end with one line at the first logits, train.py counts bad steps."""
    shutil.copytree(folder / "model", tmp_path / "model")
    resave(lambda name, tensor: tensor.fill_(value) if "layers.3.mlp.down" in name else tensor)(tmp_path / "model")
    name, video_file = str(tmp_path / "model"), next((folder / "videos").glob("test*.mp4"))
    with pytest.raises(model.ModelError, match=f"{name}: the model's logits are not finite"):
        evaluate.main(evaluate.Config(model=name, annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
                                      output=str(tmp_path / "out"), max_tokens=2, workers=1))
    assert not list(tmp_path.glob("out/scores.json"))
    with pytest.raises(model.ModelError, match=f"{name}: the model's logits are not finite"):
        ground.main(ground.Config(video=str(video_file), queries=["a circle spins"], model=name, max_tokens=2))
    policy, encoder = model.load(name)
    grpo.rollout(policy, [encoder.encode("when?", CLIP)], 2, 2, encoder.stop_ids)


def test_a_file_that_changes_does_not_change_the_model(folder, tmp_path):
    """Whoever overwrites model.safetensors in place, or cuts it short, does it to the next run only."""
    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    policy, _ = model.load(str(tmp_path / "model"))
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\x42" * (path.stat().st_size // 2))
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())
    os.truncate(path, 10_000)
    assert all(torch.equal(weight, before[name]) for name, weight in policy.named_parameters())     # no SIGBUS


def test_transformers_generates_the_same_with_these_positions(folder, tmp_path):
    """The snippet in docs/transformers.md, run as it stands there, answers as this project does."""
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "transformers.md").read_text(), re.DOTALL)[1]
    file = next((folder / "videos").glob("test*.mp4"))
    text = snippet.replace('"runs/charades/model"', f'"{folder / "model"}"').replace('"video.mp4"', f'"{file}"')
    assert str(file) in text and str(folder) in text
    found = {"model": model, "tasks": tasks, "video": video, "Sample": Sample, "torch": torch,
             "AutoTokenizer": AutoTokenizer, "AutoModelForImageTextToText": AutoModelForImageTextToText}
    exec(compile(text.replace("max_new_tokens=1024", "max_new_tokens=12"), "docs/transformers.md", "exec"), found)
    policy, encoder = model.load(str(folder / "model"))
    rollouts = grpo.rollout(policy, [found["prompt"]], 1, 12, encoder.stop_ids)
    assert found["ids"].tolist() == rollouts.completions[0].tolist()
    assert found["answer"] == encoder.decode(rollouts.completions[:, 0], rollouts.mask[:, 0])[0]
