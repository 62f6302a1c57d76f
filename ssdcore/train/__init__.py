"""Training: `fit`, its configuration `TrainConfig`, and published configurations by name.

`loop` holds the run, `step` one optimiser step, `state` the files from which a run is resumed, `stream` the order of
the images, `distributed` the processes. `config` and `recipes` say what is done.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssdcore.train.config import TrainConfig, load_config
    from ssdcore.train.loop import fit
    from ssdcore.train.recipes import RECIPES, own_recipe, recipe
    from ssdcore.train.signals import Terminated

# Public name -> module. Modules are imported on first use, because the command line shows the values of `TrainConfig`
# without importing torch.
_LAZY = {
    "RECIPES": "recipes",
    "Terminated": "signals",
    "TrainConfig": "config",
    "fit": "loop",
    "load_config": "config",
    "own_recipe": "recipes",
    "recipe": "recipes",
}

__all__ = ["RECIPES", "Terminated", "TrainConfig", "fit", "load_config", "own_recipe", "recipe"]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'ssdcore.train' has no attribute {name!r}")
    return getattr(import_module(f"ssdcore.train.{_LAZY[name]}"), name)
