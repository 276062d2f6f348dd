"""Which objects are where in a picture: scenes (`scenes`), or a COCO file of one's own.

A detector of one stage without anchors (after CenterNet, Zhou et al. 2019, and FCOS, Tian et al. 2019). Of 64 x 64 pixels it sees
8 x 8 cells; of each it says how likely an object of each class has its centre there, and that object's box:

    class  sigmoid(z_c);  centre  (cell + sigmoid(x), row + sigmoid(y)) * 8;  width, height  8 exp(w), 8 exp(h)
    loss   of a picture = sum over cells and classes of the binary cross-entropy + 2 sum over objects of
           the smooth L1 distance of centre (in cells), w and h

Found is what is likelier than 5 %, of boxes of one class that overlap by half the likeliest. The model: 3x3 convolutions with
batch norm and ReLU, channels last, the first three followed by a 2x2 maximum.

Score: the mean over classes of the average precision at an IoU of 0.5, in % (Everingham et al. 2010: what is found is matched to
objects from the likeliest on, and precision p is taken at its best for each recall r or more, AP = sum of dr p). So that ranks
can add up what they have found, likelihoods are sorted into 64 bins of their logits. Baseline: each class where objects of it are
on average. Margin, stated beforehand: 40 points.
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

WIDTH, CELL = 16, 8
LEAST, MOST_FOUND, IOU = 0.05, 30, 0.5
BINS, BINS_EACH = 64, 4.0
"""Of logits from -8 on, so many to each unit."""

Found = tuple[int, float, NDArray[np.float64]]
"""Class, logit, box in pixels."""


class Detection(ExampleTask):
    """The model: images [B, channels, SIDE, SIDE] -> [B, classes + 4, 8, 8]."""

    item, unit = "picture", "per picture"
    score_is = Score(name="mAP at IoU 0.5", unit="%", margin=40.0)

    def load(self) -> dict[str, Any]:
        self._scenes, self.classes, about = load_scenes(self.config.task.source, with_masks=False)
        self.num_train, self.num_held_out = (len(one) for one in self._scenes.values())
        self.num_measured = len(self.classes) * (2 * BINS + 1)
        return about

    def build(self) -> nn.Module:
        width, channels = self.config.task.width or WIDTH, self._scenes["train"].images.shape[3]
        layers = convolutions(channels, width, True) + convolutions(width, 2 * width, True)
        layers += convolutions(2 * width, 4 * width, True) + convolutions(4 * width, 4 * width)
        layers += convolutions(4 * width, 4 * width)
        head = nn.Conv2d(4 * width, len(self.classes) + 4, 1)
        with torch.no_grad():
            head.bias[: len(self.classes)] = -5.0  # type: ignore[index]  # most cells are empty
        return nn.Sequential(*layers, head).to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def examples(self, part: str, rows: Rows) -> Tensors:
        chosen = self._scenes[part].rows(rows)
        return as_input(chosen.images), torch.from_numpy(chosen.labels), torch.from_numpy(chosen.boxes)

    def losses(self, model: nn.Module, batch: Tensors) -> Tensor:
        images, labels, boxes = batch
        found = model(images)
        row, place = torch.nonzero(labels >= 0, as_tuple=True)
        box, label = boxes[row, place], labels[row, place]
        centre, size = (box[:, 2:] + box[:, :2]) / 2 / CELL, (box[:, 2:] - box[:, :2]) / CELL
        cell = centre.long().clamp(0, SIDE // CELL - 1)
        wanted = torch.zeros_like(found[:, :-4])
        wanted[row, label, cell[:, 1], cell[:, 0]] = 1.0
        likely = F.binary_cross_entropy_with_logits(found[:, :-4], wanted, reduction="sum")
        there = found[row, -4:, cell[:, 1], cell[:, 0]]
        given = torch.cat([there[:, :2].sigmoid(), there[:, 2:]], 1)
        placed = F.smooth_l1_loss(given, torch.cat([centre - cell, size.log()], 1), reduction="sum")
        return (likely + 2.0 * placed) / len(images)

    def measure(self, model: nn.Module, batch: Tensors) -> Sequence[float]:
        _, labels, boxes = (one.cpu().double().numpy() for one in batch)
        return self._counted(self.found(model, batch[0]), labels, boxes)

    def measured_score(self, sums: Sequence[float]) -> float:
        return average_precision(np.array(sums).reshape(len(self.classes), -1))

    def _counted(self, found: Sequence[list[Found]], labels: NDArray[Any], boxes: NDArray[Any]) -> list[float]:
        """By class: how many objects there are; by bin, how many found ones are objects, and how many are not."""
        counts = np.zeros((len(self.classes), 1 + 2 * BINS))
        for mine, kinds, places in zip(found, labels.astype(int), boxes, strict=True):
            np.add.at(counts[:, 0], kinds[kinds >= 0], 1)
            open_ = kinds.copy()
            for label, logit, box in mine:
                overlaps = np.where(open_ == label, iou(box, places), 0.0)
                right = overlaps.max(initial=0.0) >= IOU
                if right:
                    open_[overlaps.argmax()] = -1
                at = min(max(int((logit + 8.0) * BINS_EACH), 0), BINS - 1)
                counts[label, 1 + at + (0 if right else BINS)] += 1
        return counts.ravel().tolist()  # type: ignore[no-any-return]

    def baseline(self) -> tuple[str, float]:
        train, held_out = self._scenes["train"], self._scenes["held_out"]
        known = [(label, train.labels == label) for label in range(len(self.classes))]
        mine: list[Found] = [(label, 0.0, train.boxes[where].mean(0).astype(float)) for label, where in known if where.any()]
        counts = self._counted([mine] * len(held_out), held_out.labels, held_out.boxes.astype(float))
        return "each class where it is on average", self.measured_score(counts)

    @torch.no_grad()
    def found(self, model: nn.Module, images: Tensor) -> list[list[Found]]:
        """In each image, from the likeliest on."""
        given = model(images).double()
        row, column = torch.meshgrid(*2 * [torch.arange(SIDE // CELL, device=given.device)], indexing="ij")
        centre = (given[:, -4:-2].sigmoid() + torch.stack([column, row])) * CELL
        half = given[:, -2:].clamp(max=4.0).exp() * CELL / 2
        boxes = torch.cat([centre - half, centre + half], 1).flatten(2).transpose(1, 2).clamp(0, SIDE).cpu().numpy()
        logits, places = given[:, :-4].flatten(1).topk(min(MOST_FOUND, given[:, :-4][0].numel()))
        cells, least = (SIDE // CELL) ** 2, float(np.log(LEAST / (1 - LEAST)))
        listed = zip(logits.cpu().tolist(), places.cpu().tolist(), boxes, strict=True)
        return [
            _apart([(at // cells, logit, box[at % cells]) for logit, at in zip(some, where, strict=True) if logit > least])
            for some, where, box in listed
        ]

    def _seen(self, model: nn.Module, given: str | int) -> tuple[NDArray[np.uint8], list[Found]]:
        """The picture as it is, and what is found, in its pixels."""
        picture, image = looked_at(given, self._scenes["held_out"])
        scale = np.array(2 * [picture.shape[1], picture.shape[0]]) / SIDE
        found = self.found(model, image.to(next(model.parameters())))[0]
        return picture, [(label, logit, box * scale) for label, logit, box in found]

    def predict(self, model: nn.Module, given: str) -> str:
        return self._said(self._seen(model, given)[1])

    def picture(self, model: nn.Module, given: str) -> str:
        return self._on_picture(*self._seen(model, given))

    def shown(self, model: nn.Module, count: int) -> list[str]:
        there = (
            ", ".join(self.classes[label] for label in row if label >= 0)
            for row in self._scenes["held_out"].labels[:count].tolist()
        )
        lines = []
        for row, mine in enumerate(there):
            picture, found = self._seen(model, row)
            lines += [uri(self._on_picture(picture, found)), f"there: {mine or 'nothing'}; found: {self._said(found)}", ""]
        return lines

    def _on_picture(self, picture: NDArray[np.uint8], found: list[Found]) -> str:
        return svg(picture, [(tuple(box.tolist()), label, self._named(label, logit)) for label, logit, box in found])

    def _named(self, label: int, logit: float) -> str:
        return f"{self.classes[label]} {1 / (1 + np.exp(-logit)):.0%}"

    def _said(self, found: list[Found]) -> str:
        boxes = (f"{self._named(label, logit)} at {' '.join(f'{one:.0f}' for one in box)}" for label, logit, box in found)
        return ", ".join(boxes) or "nothing"


def iou(box: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """Intersection over union of a box with each of [count, 4]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    common = sides.clip(0).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - common
    return common / np.maximum(area, 1e-9)


def _apart(found: list[Found]) -> list[Found]:
    """Without those that overlap a likelier one of their class by half. From the likeliest on."""
    kept: list[Found] = []
    for label, logit, box in found:
        alike = [other for kind, _, other in kept if kind == label]
        if not alike or iou(box, np.array(alike)).max() < IOU:
            kept.append((label, logit, box))
    return kept


def average_precision(counts: NDArray[np.float64]) -> float:
    """In %, of the classes that there are. counts: [classes, 1 + 2 BINS], objects, then found by bin: right ones, wrong ones."""
    scores = []
    for objects, *found in counts.tolist():
        right, wrong = np.cumsum(np.array(found).reshape(2, -1)[:, ::-1], axis=1)
        if objects:
            best = np.maximum.accumulate((right / np.maximum(right + wrong, 1.0))[::-1])[::-1]
            scores.append(float((np.diff(right, prepend=0.0) / objects * best).sum()))
    return 100.0 * float(np.mean(scores)) if scores else float("nan")
