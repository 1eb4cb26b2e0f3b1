"""Mean average precision of found boxes as COCO has it (Lin et al. 2014), by its own code, pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from configs.errors import UsageError

MOST_FOUND = 100  # a picture; COCO looks at no more


def mean_average_precision(
    truth: Sequence[Sequence[Sequence[float]]], found: Sequence[Sequence[Sequence[float]]]
) -> dict[str, float]:
    """map_50: where an IoU of 0.5 with a true box is a hit; map_50_95: mean over 0.5, 0.55, ... 0.95.

    Both are means over the classes that occur in truth; nothing where none does. For each picture, truth has [left,
    top, right, bottom, label] of each true box, and found [left, top, right, bottom, label, score] of each found one.

    Raises:
        UsageError: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO  # type: ignore[import-untyped]
        from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]
    except ImportError as error:
        raise UsageError(
            'Mean average precision needs pycocotools, which is not installed. Run pip install "shardyard[metrics]".'
        ) from error
    annotations, results = _flat(truth), _flat(found)
    if not annotations:
        return {}
    if not results:
        return {"map_50": 0.0, "map_50_95": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):  # it narrates
        coco = COCO()
        coco.dataset = {
            "images": [{"id": number} for number in range(len(truth))],
            "categories": [{"id": label} for label in sorted({each["category_id"] for each in annotations})],
            # Numbered from 1: a match with annotation 0 would be taken for none.
            "annotations": [each | {"id": number, "iscrowd": 0} for number, each in enumerate(annotations, start=1)],
            "info": {},
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0.0, 1e10]], ["all"]
        evaluation.params.maxDets = [MOST_FOUND]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoU, recall, class, 1, 1)
    return {"map_50": float(precision[0].mean()), "map_50_95": float(precision.mean())}


def _flat(pictures: Sequence[Sequence[Sequence[float]]]) -> list[dict[str, Any]]:
    """All boxes as COCO writes them."""
    boxes = []
    for number, picture in enumerate(pictures):
        for left, top, right, bottom, label, *score in picture:
            width, height = right - left, bottom - top
            boxes.append(
                {
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    **({"score": score[0]} if score else {}),
                }
            )
    return boxes
