"""LPIPS on VGG-16 (Zhang et al. 2018, "The unreasonable effectiveness of deep features"), weights from a local file.

Needs neither torchvision nor the network; refuses pickled code (safetensors, or a torch file read with weights_only).
The file holds VGG-16's convolutions as torchvision names them (`features.0.weight`, ...; a `net.` prefix is fine) and
the five linear weights as the lpips package names them (`lin0.model.1.weight` or `lin0.weight`, shape (1, C, 1, 1)).

    distance_B = LPIPS.from_file("lpips_vgg.safetensors")(x_BCHW, y_BCHW)      # pixels in [-1, 1]

Shapes: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# torchvision's index of every convolution in vgg16.features, by stage; a stage ends at its last ReLU
_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_WIDTHS = (64, 128, 256, 512, 512)


class LPIPS(nn.Module):
    """Weighted squared distance of unit-normalised VGG features, averaged over positions, summed over five stages."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        width = 3
        for stage, indices in enumerate(_STAGES):
            for index in indices:
                self.features[str(index)] = nn.Conv2d(width, _WIDTHS[stage], 3, padding=1)
                width = _WIDTHS[stage]
        self.lins = nn.ParameterList([nn.Parameter(torch.full((1, c, 1, 1), 1.0 / c)) for c in _WIDTHS])
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.shift: Tensor
        self.scale: Tensor
        self.requires_grad_(False).eval()

    @classmethod
    def from_file(cls, path: str | Path) -> LPIPS:
        """Load the weights.

        Args:
            path: a file of the layout in this module's docstring.

        Returns:
            The metric, frozen and in evaluation mode.

        Raises:
            ValueError: the file is missing, unreadable, or lacks a weight.
        """
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                tensors = load_file(path)
            else:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # every loader raises its own errors
            raise ValueError(f"LPIPS weights cannot be read from {path}: {error}") from error
        renamed_tensors = {}
        for name, tensor in tensors.items():
            if match := re.search(r"(?:^|\.)features\.(\d+\.(?:weight|bias))$", name):
                renamed_tensors[f"features.{match[1]}"] = tensor
            elif match := re.search(r"(?:^|\.)lins?\.?(\d)(?:\.model\.1)?(?:\.weight)?$", name):
                renamed_tensors[f"lins.{match[1]}"] = tensor
        lpips = cls()
        missing_keys = sorted(lpips.state_dict().keys() - renamed_tensors.keys())
        if missing_keys:
            raise ValueError(
                f"LPIPS weights in {path} lack {missing_keys[:3]}: VGG-16 and the five linear weights are needed"
            )
        lpips.load_state_dict({name: renamed_tensors[name].float() for name in lpips.state_dict()})
        return lpips

    def stages(self, x_BCHW: Tensor) -> list[Tensor]:
        """The five feature maps of an image.

        Args:
            x_BCHW: pixels in [-1, 1].

        Returns:
            Features (B, C, H / 2^k, W / 2^k) of stages k = 0 .. 4, before normalisation.
        """
        hidden, maps = (x_BCHW - self.shift) / self.scale, []
        for stage, indices in enumerate(_STAGES):
            if stage:
                hidden = F.max_pool2d(hidden, 2)
            for index in indices:
                hidden = F.relu(self.features[str(index)](hidden))
            maps.append(hidden)
        return maps

    def forward(self, x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
        """The distance of each pair of images.

        Args:
            x_BCHW: pixels in [-1, 1].
            y_BCHW: pixels in [-1, 1].

        Returns:
            Distances (B,), at least 0.
        """
        total = torch.zeros(len(x_BCHW), device=x_BCHW.device)
        for lin, a, b in zip(self.lins, self.stages(x_BCHW), self.stages(y_BCHW), strict=True):
            squared_difference = (unit_normalize(a) - unit_normalize(b)).square()
            total = total + (squared_difference * lin).sum(1).mean((1, 2))
        return total


def unit_normalize(map_BCHW: Tensor) -> Tensor:
    """Scale each position's feature vector to length 1.

    Args:
        map_BCHW: features.

    Returns:
        Features of the same shape, in float32.
    """
    map_BCHW = map_BCHW.float()
    return map_BCHW / (map_BCHW.square().sum(1, keepdim=True).sqrt() + 1e-10)
