"""Files of trained models: those of this project, and other projects' checkpoints.

`files` has the project's own format, `sources` what is known of other projects, and `convert` what it takes to load
their checkpoints.
"""

from ssdcore.weights.convert import Converted, convert, convert_file
from ssdcore.weights.files import description, fine_tuned, load_model, save_weights, write_atomically

__all__ = [
    "Converted",
    "convert",
    "convert_file",
    "description",
    "fine_tuned",
    "load_model",
    "save_weights",
    "write_atomically",
]
