"""Files of trained models."""

from ssdcore.weights.files import category_ids, description, fine_tuned, load_model, save_weights, write_atomically

__all__ = ["category_ids", "description", "fine_tuned", "load_model", "save_weights", "write_atomically"]
