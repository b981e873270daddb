"""Networks, and `load_backbone`, which is all that a notebook needs."""

from models.weights.load import load_backbone

__all__ = ["load_backbone"]
