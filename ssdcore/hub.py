"""Models on the Hugging Face Hub: what `SSD.from_pretrained`, `save_pretrained` and `push_to_hub` do.

A repository holds the file `model.safetensors` that `save_weights` writes, `config.json` with the same description for
people and search engines to read, and a model card. The file alone is enough to build the model again.
"""

import os
from pathlib import Path
from typing import Any

import torch

from ssdcore.models import SSD
from ssdcore.weights import description, load_model, save_weights

try:
    from huggingface_hub import PyTorchModelHubMixin, constants, hf_hub_download
except ImportError as error:
    raise ImportError("the Hugging Face Hub needs huggingface_hub: pip install 'ssdcore[hub]'") from error


class HubModel(PyTorchModelHubMixin, library_name="ssdcore", pipeline_tag="object-detection"):
    """Holds a detector, and gives it the mixin's methods.

    `SSD` does not derive from the mixin, so that it needs no import of huggingface_hub and stays a plain module.
    """

    def __init__(self, detector: SSD) -> None:
        self.detector = detector

    def config(self) -> dict[str, Any]:
        return description(self.detector, self.detector.classes, self.detector.category_ids)

    def _save_pretrained(self, save_directory: Path) -> None:
        path = save_directory / constants.SAFETENSORS_SINGLE_FILE
        save_weights(self.detector, path, self.detector.classes, self.detector.category_ids)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str | torch.device = "cpu", **download: Any) -> "HubModel":
        if os.path.isdir(model_id):
            path = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
        else:
            path = Path(hf_hub_download(model_id, constants.SAFETENSORS_SINGLE_FILE, **download))
        return cls(load_model(path, device)[0])
