"""Which of some classes an image shows: Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747; MIT), or a folder of images by class.

Margin, stated beforehand: 70 points of accuracy above the largest class. The model: three 3x3 convolutions with batch norm and
ReLU, each but the last followed by a 2x2 maximum, means over the 3x3 parts of the image, one linear layer; memory is channels
last.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.tasks.convolutions import as_input, convolutions
from thinwire.tasks.examples import ExampleTask, Rows, Tensors, of_arrays
from thinwire.tasks.fashion import CLASSES, Parts, load_fashion
from thinwire.tasks.own import held_out_rows, image_of, images_by_class
from thinwire.tasks.pictures import svg, uri
from thinwire.tasks.task import Score

WIDTH = 16


class ImageClassification(ExampleTask):
    """Images are uint8 [count, height, width, channels]."""

    item, unit = "image", "nats per image"
    score_is = Score(name="accuracy", unit="%", margin=70.0)

    def load(self) -> dict[str, Any]:
        if self.config.task.source:
            images, labels, self.classes, about = images_by_class(Path(self.config.task.source).expanduser())
            held = held_out_rows(labels)
            self._images: Parts = {"train": images[~held], "held_out": images[held]}
            self._labels: Parts = {"train": labels[~held], "held_out": labels[held]}
        else:
            self._images, self._labels, about = load_fashion()
            self.classes = CLASSES
        self.num_train, self.num_held_out = (len(self._images[part]) for part in ("train", "held_out"))
        sha256 = of_arrays(*self._images.values(), *self._labels.values())
        return {**about, "documents": self.num_train + self.num_held_out, "sha256": sha256}

    def build(self) -> nn.Module:
        width, channels = self.config.task.width or WIDTH, self._images["train"].shape[3]
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(((channels, width), (width, 2 * width), (2 * width, 4 * width))):
            layers += convolutions(inputs, outputs, pool=index < 2)
        layers += [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * 4 * width, len(self.classes))]
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def examples(self, part: str, rows: Rows) -> Tensors:
        return as_input(self._images[part][rows]), torch.from_numpy(self._labels[part][rows].astype(np.int64))

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        images, labels = batch
        return float((model(images).argmax(1) == labels).sum()), float(len(labels))

    def baseline(self) -> tuple[str, float]:
        largest = int(np.bincount(self._labels["train"]).argmax())
        return f"constant {self.classes[largest]!r}", 100.0 * float((self._labels["held_out"] == largest).mean())

    def predict(self, model: nn.Module, given: str) -> str:
        image = image_of(Path(given).expanduser(), self._images["train"].shape[1:])
        likely = model(as_input(image[None]).to(next(model.parameters()))).softmax(1)[0]
        best = likely.topk(min(3, len(self.classes)))
        return ", ".join(f"{self.classes[i]} {p:.1%}" for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True))

    def shown(self, model: nn.Module, count: int) -> list[str]:
        images, labels = self.examples("held_out", np.arange(min(count, self.num_held_out), dtype=np.int64))
        found = model(images.to(next(model.parameters()))).argmax(1).tolist()
        lines = []
        for image, label, taken in zip(self._images["held_out"], labels.tolist(), found, strict=False):
            lines += [uri(svg(image)), f"{self.classes[label]}: taken for {self.classes[taken]}", ""]
        return lines
