"""Which class each pixel of a picture has: scenes (`scenes`), or a COCO file of one's own with polygons or run lengths.

The model: a U-Net (Ronneberger et al. 2015, arXiv 1505.04597) of four levels. At each two 3x3 convolutions with batch norm and
ReLU; down a 2x2 maximum and twice the channels; up a transposed 2x2 convolution, and beside it what came down. Channels last.

    loss   mean over pixels of the cross-entropy over the classes and the background, that of the background, which most are,
           times `BACKGROUND`
    score  mean over these of the IoU = pixels both of the class and taken for it / pixels that are either, in %

Baseline: all is background. Margin, stated beforehand: 35 points.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from thinwire.tasks.convolutions import as_input, convolutions
from thinwire.tasks.examples import ExampleTask, Rows, Tensors
from thinwire.tasks.pictures import svg, uri
from thinwire.tasks.scenes import SIDE, load_scenes, looked_at
from thinwire.tasks.task import Score

WIDTH, LEVELS, BACKGROUND = 8, 4, 0.2
NAMED = 0.002
"""Of the pixels: what is less is not named."""


class UNet(nn.Module):
    """forward(images [B, channels, SIDE, SIDE]) -> logits [B, classes, SIDE, SIDE]."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        widths = [width << level for level in range(LEVELS)]
        inputs = [channels, *widths]
        self.down = nn.ModuleList(_level(a, b) for a, b in zip(inputs, widths, strict=False))
        self.wider = nn.ModuleList(nn.ConvTranspose2d(2 * one, one, 2, stride=2) for one in widths[:-1])
        self.up = nn.ModuleList(_level(2 * one, one) for one in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        kept = []
        for level, module in enumerate(self.down):
            images = module(F.max_pool2d(images, 2) if level else images)
            kept.append(images)
        for level in reversed(range(LEVELS - 1)):
            images = self.up[level](torch.cat([self.wider[level](images), kept[level]], 1))
        found: Tensor = self.head(images)
        return found


class Segmentation(ExampleTask):
    """See the top of the file. Class 0 is the background."""

    item, unit = "picture", "nats per pixel"
    score_is = Score(name="mean IoU", unit="%", margin=35.0)

    def load(self) -> dict[str, Any]:
        self._scenes, names, about = load_scenes(self.config.task.source, with_masks=True)
        self.classes = ("background", *names)
        self.num_train, self.num_held_out = (len(one) for one in self._scenes.values())
        self.num_measured = 2 * len(self.classes)
        return about

    def build(self) -> nn.Module:
        model = UNet(self._scenes["train"].images.shape[3], len(self.classes), self.config.task.width or WIDTH)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def examples(self, part: str, rows: Rows) -> Tensors:
        chosen = self._scenes[part].rows(rows)
        return as_input(chosen.images), torch.from_numpy(chosen.masks)

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        images, masks = batch
        each = F.cross_entropy(model(images), masks, reduction="none")
        return torch.where(masks == 0, BACKGROUND * each, each).mean()

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        return self._counted(model(batch[0]).argmax(1), batch[1])

    def _counted(self, found: Tensor, masks: Tensor) -> list[float]:
        """Pixels that are both, by class, then those that are either."""
        count = len(self.classes)
        pairs = torch.bincount((masks * count + found).flatten(), minlength=count * count).reshape(count, count)
        both = pairs.diagonal()
        return torch.cat([both, pairs.sum(0) + pairs.sum(1) - both]).tolist()  # type: ignore[no-any-return]

    def measured_score(self, sums: Sequence[float]) -> float:
        both, either = np.array(sums).reshape(2, -1)
        return 100.0 * float((both[either > 0] / either[either > 0]).mean()) if either.any() else float("nan")

    def baseline(self) -> tuple[str, float]:
        masks = torch.from_numpy(self._scenes["held_out"].masks)
        return "all is background", self.measured_score(self._counted(torch.zeros_like(masks), masks))

    def predict(self, model: nn.Module, given: str) -> str:
        return self._said(self._seen(model, given)[1])

    def picture(self, model: nn.Module, given: str) -> str:
        return self._on_picture(*self._seen(model, given))

    def _on_picture(self, picture: NDArray[np.uint8], found: NDArray[np.int64]) -> str:
        grid = (np.arange(one) * SIDE // one for one in picture.shape[:2])
        whole = found[np.ix_(*grid)]
        return svg(picture, areas=[(whole == label, label, f"{self.classes[label]} {part:.1%}") for label, part in _parts(found)])

    @torch.no_grad()
    def _seen(self, model: nn.Module, given: str | int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """The picture as it is, and the class of each of SIDE x SIDE pixels."""
        picture, image = looked_at(given, self._scenes["held_out"])
        return picture, model(image.to(next(model.parameters())))[0].argmax(0).cpu().numpy()

    def shown(self, model: nn.Module, count: int) -> list[str]:
        masks = self._scenes["held_out"].masks[:count]
        lines = []
        for row, mask in enumerate(masks):
            picture, found = self._seen(model, row)
            lines += [uri(self._on_picture(picture, found)), f"there: {self._said(mask)}; found: {self._said(found)}", ""]
        return lines

    def _said(self, found: NDArray[np.int64]) -> str:
        return ", ".join(f"{self.classes[label]} {part:.1%}" for label, part in _parts(found)) or "background alone"


def _level(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*convolutions(inputs, outputs), *convolutions(outputs, outputs))


def _parts(found: NDArray[np.int64]) -> list[tuple[int, float]]:
    """Classes other than the background, and which part of the pixels each has, the largest first."""
    counts = np.bincount(found.ravel()) / found.size
    return [(int(label), float(counts[label])) for label in np.argsort(-counts) if label and counts[label] >= NAMED]
