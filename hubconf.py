"""Entry point of torch.hub, from any folder.

backbone = torch.hub.load("/path/to/nanoDINO", "load_backbone", "runs/quickstart", source="local")
"""

from models import load_backbone

__all__ = ["load_backbone"]

dependencies = ["torch", "timm", "numpy", "yaml"]  # which torch.hub looks for before it calls
