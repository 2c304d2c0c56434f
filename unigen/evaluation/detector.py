"""The scene detector: a small convolutional network that reads a picture back into objects, colours, boxes,
background.

It does not depend on the generative models: it is trained on rendered scenes only (`recipes/scene_detector.py`) and its
thresholds are calibrated on rendered scenes only. Its weights ship with the package, so reading needs no font.

    detector = load_detector()                       # the shipped one, or load_detector(folder)
    reading = detector.detect(x_BCHW)[0]             # SceneDetections(objects=[Detection(...)], background="sky", ...)

Centre-point detection as in CenterNet (Zhou et al. 2019, arXiv 1904.07850): per-class heat maps of object centres at
stride 4 with the penalty-reduced focal loss (eq. 1), box sides and sub-cell offset at the centres; beside them a
colour per centre and one background per picture. Shapes: B batch, C channels, H W pixels in [-1, 1], h w the grid (H
/ 4, W / 4), K object classes, N objects a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unigen.hub.folders import replacing_folder
from unigen.hub.resolve import read_json
from unigen.hub.weights import load_strict, read_tensors, write_tensors
from unigen.nn.conv import to_channels_last
from unigen.utils.files import save_json

STRIDE = 4
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "scene-detector"


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    name: str
    """Class name."""
    color: str
    """Colour name."""
    score: float
    """Confidence in [0, 1]."""
    box: tuple[float, float, float, float]
    """(x0, y0, x1, y1) in pixels, y downwards."""


@dataclass(frozen=True)
class SceneDetections:
    """All that the detector finds in one image."""

    objects: list[Detection] = field(default_factory=list)
    """By falling score."""
    background: str = ""
    """Name of the most likely background."""
    background_score: float = 0.0
    """Its probability."""


@dataclass
class DetectorConfig:
    """What the detector can name, its widths, and the calibrated thresholds."""

    objects: tuple[str, ...]
    """Names of the object classes, in the order of the heat maps."""
    colors: tuple[str, ...]
    """Names of the colours, in the order of the colour head."""
    backgrounds: tuple[str, ...]
    """Names of the backgrounds, in the order of the background head."""
    image_size: int = 64
    """Pixels along a side of the images."""
    widths: tuple[int, int, int] = (48, 80, 128)
    """Channels at strides 4, 8 and 16."""
    threshold: float = 0.3
    """Score in [0, 1] above which an object counts."""
    count_threshold: float = 0.5
    """The same for the task `counting`, which is stricter."""

    def __post_init__(self) -> None:
        for name in ("objects", "colors", "backgrounds", "widths"):
            setattr(self, name, tuple(getattr(self, name)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norm around a residual sum: (B, C, h, w) -> the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x_BChw: Tensor) -> Tensor:
        """Apply the block to a map (B, C, h, w); the shape stays."""
        y_BChw = self.conv1(F.silu(self.norm1(x_BChw)))
        return x_BChw + self.conv2(F.silu(self.norm2(y_BChw)))


class SceneDetector(nn.Module):
    """The detector's network: stages at strides 4, 8, 16, one way up again to stride 4, four heads on the cells and
    one on the image.

    Args:
        config: names, widths and thresholds.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        self.config = config
        a, b, c = config.widths
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2), nn.SiLU(), nn.Conv2d(16, a, 4, 2, padding=1)
        )
        self.stage4 = ResidualBlock(a)
        self.stage8 = nn.Sequential(nn.Conv2d(a, b, 2, stride=2), ResidualBlock(b))
        self.stage16 = nn.Sequential(nn.Conv2d(b, c, 2, stride=2), ResidualBlock(c))
        self.up16, self.up8 = nn.Conv2d(c, b, 1), nn.Conv2d(b, a, 1)
        self.merge8, self.merge4 = ResidualBlock(b), ResidualBlock(a)
        self.norm = nn.GroupNorm(8, a)
        k = len(config.objects)
        self.mix = nn.Conv2d(a, a * 2, 3, padding=1)
        self.heat = nn.Conv2d(a * 2, k, 1)
        self.shape = nn.Conv2d(a * 2, 4, 1)
        self.color = nn.Conv2d(a * 2, len(config.colors), 1)
        self.background = nn.Sequential(nn.Linear(2 * a + 2 * c, 96), nn.SiLU(), nn.Linear(96, len(config.backgrounds)))
        assert self.heat.bias is not None
        # every cell starts at 1% (RetinaNet's prior), which keeps the first losses small
        nn.init.constant_(self.heat.bias, -4.6)
        to_channels_last(self)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Maps before the way up: a frozen feature network for a perceptual loss or an FID.

        Args:
            x_BCHW: images in [-1, 1].

        Returns:
            Three maps (B, widths[i], H / s, W / s), s = 4, 8, 16.
        """
        x4 = self.stage4(self.stem(x_BCHW.contiguous(memory_format=torch.channels_last)))
        x8 = self.stage8(x4)
        return [x4, x8, self.stage16(x8)]

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        """Logits of all heads.

        Args:
            x_BCHW: images in [-1, 1].

        Returns:
            "heat" (B, K, h, w); "shape" (B, 4, h, w), which is (log width, log height, dx, dy): sides in units of 16
            px, the centre's offset in cells from the cell's middle; "color" (B, colors, h, w); "background" (B,
            backgrounds).
        """
        x4, x8, x16 = self.features(x_BCHW)
        up8 = self.merge8(x8 + F.interpolate(self.up16(x16), size=x8.shape[-2:], mode="nearest"))
        up4 = self.merge4(x4 + F.interpolate(self.up8(up8), size=x4.shape[-2:], mode="nearest"))
        y_BChw = F.silu(self.mix(F.silu(self.norm(up4))))
        pooled = torch.cat([m for x in (x4, x16) for m in (x.mean((2, 3)), x.amax((2, 3)))], 1)
        return {
            "heat": self.heat(y_BChw),
            "shape": self.shape(y_BChw),
            "color": self.color(y_BChw),
            "background": self.background(pooled),
        }

    @torch.no_grad()
    def detect(self, x_BCHW: Tensor, threshold: float | None = None) -> list[SceneDetections]:
        """Detect the objects and the background of each image.

        Args:
            x_BCHW: images in [-1, 1].
            threshold: score in [0, 1] above which objects are kept; None is the calibrated one.

        Returns:
            One reading an image.
        """
        threshold = self.config.threshold if threshold is None else threshold
        out = {name: value.float() for name, value in self(x_BCHW).items()}
        return decode_detections(out, self.config, threshold)


def decode_detections(
    out: dict[str, Tensor], config: DetectorConfig, threshold: float, limit: int = 16
) -> list[SceneDetections]:
    """Decode the peaks of the heat maps. Of two peaks whose centres are nearer than a fifth of the smaller box's side
    only the stronger one stays, whatever their classes: one thing is one object.

    Args:
        out: logits, as of `SceneDetector.forward`.
        config: names of the classes.
        threshold: score in [0, 1] above which a peak counts.
        limit: objects an image, at most.

    Returns:
        One reading an image.
    """
    heat = out["heat"].sigmoid()
    # an object's score: the chance that it is in at least one cell of the best 2x2 window at the peak (a centre near a
    # cell's edge splits its confidence between the cells)
    miss = F.avg_pool2d(F.pad(torch.log1p(-heat.clamp(max=0.9999)), (1, 1, 1, 1)), 2, 1) * 4
    score_BKhw = 1 - torch.exp(-F.max_pool2d(-miss, 2, 1))
    peak = (F.max_pool2d(heat, 3, 1, 1) == heat) & (score_BKhw > threshold)
    background = out["background"].softmax(-1)
    readings = []
    for i in range(heat.shape[0]):
        k, r, c = peak[i].nonzero(as_tuple=True)
        score = score_BKhw[i, k, r, c]
        order = score.argsort(descending=True)[: 4 * limit]
        k, r, c, score = k[order], r[order], c[order], score[order]
        log_w, log_h, dx, dy = out["shape"][i, :, r, c]
        w, h = 16 * log_w.clamp(-3, 3).exp(), 16 * log_h.clamp(-3, 3).exp()
        x, y = (c + 0.5 + dx) * STRIDE, (r + 0.5 + dy) * STRIDE
        color = out["color"][i, :, r, c].argmax(0)
        detections: list[Detection] = []
        for j in range(len(score)):
            xj, yj, wj, hj = (float(v[j]) for v in (x, y, w, h))
            if any(_is_same_object(xj, yj, min(wj, hj), kept_detection.box) for kept_detection in detections):
                continue
            box = (xj - wj / 2, yj - hj / 2, xj + wj / 2, yj + hj / 2)
            detections.append(Detection(config.objects[int(k[j])], config.colors[int(color[j])], float(score[j]), box))
        best = int(background[i].argmax())
        readings.append(SceneDetections(detections[:limit], config.backgrounds[best], float(background[i, best])))
    return readings


def _is_same_object(x: float, y: float, side: float, box: tuple[float, float, float, float]) -> bool:
    side = min(side, box[2] - box[0], box[3] - box[1])
    return max(abs(x - (box[0] + box[2]) / 2), abs(y - (box[1] + box[3]) / 2)) < 0.2 * side


@dataclass
class DetectorTargets:
    """Ground truth of B rendered images, each with up to N objects."""

    classes: Tensor
    """(B, N) int64; -1 pads."""
    colors: Tensor
    """(B, N) int64."""
    boxes: Tensor
    """(B, N, 4) float: x0, y0, x1, y1 in pixels."""
    background: Tensor
    """(B,) int64; -1 is not scored."""


def detector_losses(out: dict[str, Tensor], target: DetectorTargets) -> dict[str, tuple[Tensor, Tensor]]:
    """The losses of the heads: CenterNet eq. 1-3 with alpha 2, beta 4, and cross-entropies.

    Args:
        out: logits, as of `SceneDetector.forward`.
        target: the ground truth.

    Returns:
        (sum, count) of "heat", "shape", "color" and "background".
    """
    heat = out["heat"].float()
    b, k, h, w = heat.shape
    valid = target.classes >= 0
    side = (target.boxes[..., 2:] - target.boxes[..., :2]).clamp(min=1)
    center = (target.boxes[..., :2] + target.boxes[..., 2:]) / 2 / STRIDE
    cell = torch.stack([center[..., 0].floor().clamp(0, w - 1), center[..., 1].floor().clamp(0, h - 1)], -1)
    # Gaussians of sigma = side / 12 (in cells at least 0.55) around each true cell; classes keep their own maps
    sigma = (side / STRIDE / 12).clamp(min=0.55)
    xs, ys = torch.arange(w, device=heat.device), torch.arange(h, device=heat.device)
    gx = torch.exp(-((xs - cell[..., :1]) ** 2) / (2 * sigma[..., :1] ** 2))
    gy = torch.exp(-((ys - cell[..., 1:]) ** 2) / (2 * sigma[..., 1:] ** 2))
    bump = gy[..., :, None] * gx[..., None, :] * valid[..., None, None]
    index = target.classes.clamp(min=0)
    goal = torch.zeros_like(heat).scatter_reduce_(1, index[..., None, None].expand(-1, -1, h, w), bump, "amax")
    p_log, n_log = F.logsigmoid(heat), F.logsigmoid(-heat)
    p = heat.sigmoid()
    loss = torch.where(goal > 0.999, -((1 - p) ** 2) * p_log, -((1 - goal) ** 4) * p**2 * n_log)
    count = valid.sum()

    rows = torch.arange(b, device=heat.device)[:, None].expand_as(index)[valid]
    cx, cy = cell[..., 0][valid].long(), cell[..., 1][valid].long()
    expected = torch.cat([(side / 16).log(), center - cell - 0.5], -1)[valid]
    predicted = out["shape"].float()[rows, :, cy, cx]
    color = F.cross_entropy(out["color"].float()[rows, :, cy, cx], target.colors[valid], reduction="sum")
    has_background = target.background >= 0
    ground = F.cross_entropy(out["background"].float(), target.background, ignore_index=-1, reduction="sum")
    return {
        "heat": (loss.sum(), torch.maximum(count, torch.ones_like(count))),
        "shape": ((predicted - expected).abs().sum(), count),
        "color": (color, count),
        "background": (ground, has_background.sum()),
    }


def save_detector(model: SceneDetector, folder: str | Path) -> None:
    """Write config.json and safetensors in bf16. The folder is replaced only when both are written.

    Args:
        model: the detector.
        folder: where to.
    """
    with replacing_folder(folder) as scratch:
        write_tensors(scratch / "model.safetensors", model.state_dict(), torch.bfloat16)
        save_json(scratch / "config.json", asdict(model.config))


@lru_cache(maxsize=4)
def load_detector(folder: str | Path = DEFAULT_FOLDER) -> SceneDetector:
    """Load a detector: frozen, in eval mode, fp32, on the CPU.

    Args:
        folder: written by `save_detector`; by default the shipped one.

    Returns:
        The detector.

    Raises:
        ValueError: in one line, for a folder that is not there, damaged, or does not fit its own config.json.
    """
    config = read_json(Path(folder) / "config.json")
    try:
        model = SceneDetector(DetectorConfig(**config))
    except TypeError as error:
        raise ValueError(f"{Path(folder) / 'config.json'} does not describe a scene detector: {error}") from error
    load_strict(model, read_tensors(Path(folder) / "model.safetensors"), folder)
    return model.requires_grad_(False).eval()
