"""Models by name, from a cache that is made here; no test reaches the hub."""
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

import evaluate
import model
from engine import hub
from engine.model_folder import ModelError
from lab import plan

REVISION = "66285546d2b821cf421d4f5eb2576359d3770cd3"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hugging Face cache, empty; there is no network (conftest)."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    hub.local_folder.cache_clear()
    yield tmp_path / "hub"
    hub.local_folder.cache_clear()


def put(cache: Path, folder: Path, branch: str = "main") -> Path:
    """What `hf download org/tiny` leaves of a model folder."""
    entry = cache / "models--org--tiny"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / branch).write_text(REVISION)
    shutil.copytree(folder, entry / "snapshots" / REVISION)
    return entry / "snapshots" / REVISION


def test_a_name_is_its_folder_in_the_cache(cache, folder):
    stored = put(cache, folder / "model")
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{REVISION}"):
        assert hub.local_folder(name) == str(stored)
    model.check_folder("org/tiny")
    policy, encoder = model.load("org/tiny")
    assert encoder.folder == str(stored) and policy.qwen.name_or_path == str(stored)


def test_evaluating_a_model_by_name(cache, folder, tmp_path):
    put(cache, folder / "model")
    config = evaluate.Config(model="org/tiny", annotations=str(folder / "test.txt"), videos=str(folder / "videos"),
                             output=str(tmp_path / "out"), tasks=["TVG"], steps=1, batch_size=2, max_tokens=3)
    assert evaluate.main(config)["queries"] == 2
    assert f"{REVISION}/config.json" in (tmp_path / "out" / "inputs.json").read_text()


def test_planning_downloads_the_config_alone(cache, folder, monkeypatch):
    stored, asked, download = put(cache, folder / "model"), [], hub.snapshot_download
    for path in stored.iterdir():
        if path.name != "config.json":
            path.unlink()

    def get(**how):
        asked.append(how["allow_patterns"])
        return download(**how | {"local_files_only": True})

    monkeypatch.setattr(hub, "snapshot_download", get)
    assert plan.config_of("org/tiny").text_config.num_hidden_layers == 4
    assert asked[1:] == [["config.json", "adapter_config.json"]]


@pytest.mark.parametrize("name", ["runs/gone", "gone", "/gone/model", "a/b/c", "./a", "org/", "org/ti ny"])
def test_a_path_is_never_looked_up_on_the_hub(cache, tmp_path, monkeypatch, name):
    monkeypatch.setattr(hub, "snapshot_download", pytest.fail)
    (tmp_path / "runs").mkdir()
    assert hub.local_folder(name) == name
    with pytest.raises(ModelError, match="config.json"):
        model.check_folder(name)


@pytest.mark.parametrize("lost", ["model.safetensors", "tokenizer.json", "config.json"])
def test_what_is_not_whole_is_downloaded(cache, folder, monkeypatch, lost):
    """A download that broke leaves a folder, which huggingface_hub takes for the model."""
    stored, asked, download = put(cache, folder / "model"), [], hub.snapshot_download
    os.rename(stored / lost, cache / lost)

    def get(**how):
        asked.append(how)
        if not how.get("local_files_only"):
            os.rename(cache / lost, stored / lost)
            return str(stored)
        return download(**how)

    monkeypatch.setattr(hub, "snapshot_download", get)
    assert hub.local_folder("org/tiny@main") == str(stored) and (stored / lost).exists()
    assert [how["revision"] for how in asked] == ["main"] * 2
    assert asked[1]["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja", "merges.txt"]


def test_weights_in_several_files_are_counted(cache, folder):
    stored = put(cache, folder / "model")
    (stored / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert not hub.is_whole(str(stored))
    shutil.copy(stored / "model.safetensors", stored / "model-1.safetensors")
    assert hub.is_whole(str(stored))
    (stored / "model.safetensors.index.json").write_text("[1]")
    assert not hub.is_whole(str(stored))


@pytest.mark.parametrize("name, words", [("org/gone", "hf download org/gone"),
                                         ("org/gone@v1", "hf download org/gone --revision v1")])
def test_without_a_network_the_way_out_is_named(cache, tmp_path, capsys, name, words):
    with pytest.raises(ModelError, match=f"{name}: there is no such folder.*{words}$") as caught:
        model.check_folder(name)
    assert "\n" not in str(caught.value)
