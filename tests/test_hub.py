"""Models in folders and repositories of the Hugging Face Hub."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssdcore.models import SSD, ssd300_tiny
from ssdcore.weights import load_model, save_weights

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def model() -> SSD:
    torch.manual_seed(0)
    model = ssd300_tiny(4, image_mean=(0.1, 0.2, 0.3)).eval()
    model.classes, model.category_ids = ("cat", "dog", "çà"), (7, 8, 20)
    return model


def assert_same_model(found: SSD, expected: SSD) -> None:
    images = torch.rand(1, 3, 300, 300)
    with torch.no_grad():
        for a, b in zip(found.infer(images), expected.infer(images), strict=True):
            assert torch.equal(a, b)
    assert found.classes == expected.classes and found.category_ids == expected.category_ids
    assert found.name == expected.name and not found.training


def test_a_saved_folder_gives_the_model_back(model: SSD, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(SSD.from_pretrained(tmp_path / "saved"), model)
    # The same file as `save_weights` writes, and what it says as JSON beside it.
    path = tmp_path / "saved" / "model.safetensors"
    save_weights(model, tmp_path / "expected.safetensors", model.classes, model.category_ids)
    assert path.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()
    loaded, _ = load_model(path)
    assert_same_model(loaded, model)
    assert loaded.category_ids == (7, 8, 20)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["model"] == "ssd300_tiny" and config["classes"] == ["cat", "dog", "çà"]


def test_names_that_were_loaded_are_saved_again(model: SSD, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "model.safetensors", ["a", "b", "c"])
    load_model(tmp_path / "model.safetensors")[0].save_pretrained(tmp_path / "saved")
    assert SSD.from_pretrained(str(tmp_path / "saved")).classes == ("a", "b", "c")


def test_a_new_model_numbers_its_classes(tmp_path: Path) -> None:
    ssd300_tiny(3).save_pretrained(tmp_path)
    model = SSD.from_pretrained(tmp_path)
    assert model.classes == ("1", "2") and model.category_ids == (1, 2)


def test_a_pushed_repository_gives_the_model_back(model: SSD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssdcore import hub

    class Api:
        """The part of huggingface_hub's client that uploads, with folders for repositories."""

        def __init__(self, **_: Any) -> None:
            pass

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            (tmp_path / repo_id).mkdir(parents=True)
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
            for file in folder_path.iterdir():
                (tmp_path / repo_id / file.name).write_bytes(file.read_bytes())
            return f"https://example.org/{repo_id}"

    def download(repo_id: str, filename: str, **options: Any) -> str:
        assert options["revision"] == "v1"
        return str(tmp_path / repo_id / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    for module in (hub, huggingface_hub.hub_mixin):
        monkeypatch.setattr(module, "hf_hub_download", download)
    assert model.push_to_hub("me/detector") == "https://example.org/me/detector"
    files = {file.name for file in (tmp_path / "me/detector").iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md"}
    assert_same_model(SSD.from_pretrained("me/detector", revision="v1", device="cpu"), model)


def test_wrong_names_and_folders_raise_an_error(model: SSD, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights at"):
        SSD.from_pretrained(tmp_path)
    model.classes = ("cat",)
    with pytest.raises(ValueError, match="classes must name the 3 classes of the model, got 1"):
        model.save_pretrained(tmp_path)


def test_without_huggingface_hub_the_error_says_what_is_missing(
    model: SSD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "ssdcore.hub", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (model.save_pretrained, model.push_to_hub, SSD.from_pretrained):
        with pytest.raises(ImportError, match=r"needs huggingface_hub: pip install 'ssdcore\[hub\]'"):
            call(str(tmp_path))
