"""torch.hub opens weights from any folder, as this field loads DINO."""

import subprocess
import sys
from pathlib import Path

import torch

from models import load_backbone

ROOT = Path(__file__).parents[3]
CODE = """
import sys, torch
backbone = torch.hub.load(sys.argv[1], "load_backbone", sys.argv[2], source="local")
torch.manual_seed(0)
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    torch.save(backbone(images).cls, "cls.pt")
    backbone.intermediate(images, 2), backbone.attention(images)
"""


def test_torch_hub_loads_a_backbone_from_another_folder(tmp_path):
    model = "random:vit_nano?depth=2&patch_size=8&image_size=32"
    command = [sys.executable, "-c", CODE, str(ROOT), model]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    with torch.no_grad():
        wanted = load_backbone(model)(torch.randn(2, 3, 32, 32)).cls
    assert torch.equal(torch.load(tmp_path / "cls.pt"), wanted)
