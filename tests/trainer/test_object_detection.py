from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.errors import UsageError
from data_pipelines.columns import Column
from tests.contract.examples import bound_task, built, fitting_model
from trainer.bound import BoundTask
from trainer.example_batch import batch_of, example_rows
from trainer.shapes import Boxes, Image
from trainer.tasks import object_detection
from trainer.tasks.object_detection import FOUND_COLOUR, TRUE_COLOUR, assign, centrality, finds, focal_loss

SIZE = 16
COLUMNS = [
    Column("image", "uint8", (SIZE, SIZE, 1)),
    Column("boxes", "float32", (None, 4)),
    Column("labels", "int64", (None,)),
]


def config(**settings: Any) -> object_detection.Config:
    return object_detection.Config(**{"num_classes": 2, "image_size": SIZE, "channels": 1} | settings)


def task(**settings: Any) -> BoundTask:
    return BoundTask(object_detection, config(**settings))


def centres(rows: int = 4) -> Tensor:
    places = (torch.arange(rows) + 0.5) * SIZE / rows
    return torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1).flatten(0, 1)


# --- which cell finds which box: 4 x 4 cells of 4 pixels, with centres at 2, 6, 10 and 14


def assigned(boxes: list[list[float]], lengths: list[int] | None = None) -> list[list[int]]:
    stacked = torch.tensor([boxes], dtype=torch.float32).reshape(1, -1, 4)
    return assign(centres(), stacked, torch.tensor(lengths or [len(boxes)])).reshape(4, 4).tolist()


def test_cells_inside_and_near_the_middle_find_a_box() -> None:
    assert assigned([[4, 0, 12, 4]]) == [[-1, 0, 0, -1], [-1] * 4, [-1] * 4, [-1] * 4]
    # Its middle is (8, 8): the centres at 2 and 14 are inside, and 1.5 cells away, which is near enough.
    assert assigned([[0, 0, 16, 16]]) == [[0] * 4] * 4
    # Its middle is (9, 8): the column at 2 is 1.75 cells away.
    assert assigned([[1, 0, 17, 16]]) == [[-1, 0, 0, 0]] * 4


def test_a_box_between_the_centres_is_found_by_the_cell_of_its_middle() -> None:
    assert assigned([[3, 7, 5, 9]]) == [[-1] * 4, [-1] * 4, [-1, 0, -1, -1], [-1] * 4]


def test_the_smaller_box_wins_and_padding_is_none() -> None:
    boxes = [[0.0, 0, 16, 16], [4, 4, 8, 8], [0, 0, 4, 4]]
    assert assigned(boxes, [2]) == [[0] * 4, [0, 1, 0, 0], [0] * 4, [0] * 4]
    assert assigned(boxes, [0]) == [[-1] * 4] * 4
    assert assigned([]) == [[-1] * 4] * 4


def test_centrality() -> None:
    box = torch.tensor([[0.0, 0.0, 8.0, 4.0]]).expand(3, 4)
    found = centrality(torch.tensor([[4.0, 2.0], [2.0, 2.0], [9.0, 2.0]]), box)
    torch.testing.assert_close(found, torch.tensor([1.0, (1 / 3) ** 0.5, 0.0]))


# --- the loss


def test_the_focal_loss_is_that_of_the_paper() -> None:
    logits, truth = torch.tensor([0.3, -2.0, 1.5]), torch.tensor([1.0, 0.0, 0.0])
    expected = 0.0
    for p, t in zip(logits.sigmoid().tolist(), truth.tolist(), strict=True):
        at, alpha = (p, 0.25) if t else (1 - p, 0.75)
        expected -= alpha * (1 - at) ** 2 * np.log(at)
    assert focal_loss(logits, truth).item() == pytest.approx(expected, rel=1e-5)


class Says(nn.Module):
    """A fixed grid of finds, whatever it is shown."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, image: Tensor) -> Tensor:
        return self.output.expand(len(image), *self.output.shape)


def perfect(boxes: list[list[float]], labels: list[int]) -> Tensor:
    """(4, 4, 7): the cells that are to find these boxes are sure of them, and how central they are."""
    stacked = torch.tensor([boxes])
    owner = assign(centres(), stacked, torch.tensor([len(boxes)]))[0]
    output = torch.zeros(16, 7)
    output[:, :2] = -20.0
    for cell, number in enumerate(owner.tolist()):
        if number >= 0:
            centre, box = centres()[cell], stacked[0, number]
            output[cell, labels[number]] = 20.0
            output[cell, 2:6] = torch.cat([centre - box[:2], box[2:] - centre])
            output[cell, 6] = torch.logit(centrality(centre[None], box[None]), 1e-6).item()
    return output.reshape(4, 4, 7)


BOXES, LABELS = [[1.0, 1.0, 8.0, 7.0], [8.0, 8.0, 15.0, 16.0]], [1, 0]


def batch(**replaced: Any) -> dict[str, Tensor]:
    return {
        "image": torch.zeros(1, SIZE, SIZE, 1, dtype=torch.uint8),
        "boxes": torch.tensor([BOXES]),
        "labels": torch.tensor([LABELS]),
        "boxes_length": torch.tensor([2], dtype=torch.int32),
        **replaced,
    }


def test_the_right_answer_has_the_least_loss() -> None:
    right = perfect(BOXES, LABELS)
    least = task().loss(Says(right), batch()).item()
    cells = assign(centres(), torch.tensor([BOXES]), torch.tensor([2]))[0]
    central = centrality(centres()[cells >= 0], torch.tensor(BOXES)[cells[cells >= 0]])
    entropy = torch.special.entr(central) + torch.special.entr(1 - central)  # what is left of the third term
    assert least == pytest.approx(entropy.sum().item(), abs=1e-3)
    for place, change in ((1, -22.0), (3, 2.0), (6, 1.0)):  # another class, side, centrality
        wrong = right.clone()
        wrong[1, 1, place] += change
        assert task().loss(Says(wrong), batch()).item() > least + 0.01


def test_the_loss_does_not_depend_on_how_a_batch_is_cut() -> None:
    bound = bound_task("object_detection")
    model = built(fitting_model(bound)).eval()
    rows = example_rows(bound, 6)
    losses = []
    for size in (1, 2, 4, 6):
        cut = [batch_of(bound, rows[start : start + size]) for start in range(0, 6, size)]
        with torch.no_grad():
            total = sum(bound.loss(model, each).item() for each in cut)
        losses.append(total / sum(bound.num_items(each) for each in cut))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)


def test_padding_and_pictures_that_do_not_count_change_nothing() -> None:
    model = Says(torch.randn(4, 4, 7, generator=torch.Generator().manual_seed(0)).abs())
    alone = task().loss(model, batch())
    padded = {
        "image": torch.zeros(2, SIZE, SIZE, 1, dtype=torch.uint8),
        "boxes": torch.tensor([[*BOXES, [0.0, 0, 0, 0]], [[2.0, 2, 5, 5]] * 3]),
        "labels": torch.tensor([[*LABELS, 0], [0, 0, 0]]),
        "boxes_length": torch.tensor([2, -1], dtype=torch.int32),
    }
    assert task().loss(model, padded).item() == pytest.approx(alone.item())
    assert task().num_items(padded) == 2
    assert task().predict(model, padded, None) == task().predict(model, batch(), None)
    with torch.no_grad():
        sums = task().evaluate(model, padded)
    assert sums == pytest.approx({"loss": alone.item(), "boxes": 2.0})


def test_a_picture_without_boxes_teaches_that_nothing_is_there() -> None:
    nothing = {"boxes": torch.zeros(1, 0, 4), "labels": torch.zeros(1, 0, dtype=torch.int64)}
    empty = batch(**nothing, boxes_length=torch.zeros(1, dtype=torch.int32))
    assert task().num_items(empty) == 0
    assert task().loss(Says(perfect(BOXES, LABELS)), empty) > 1
    assert task().predict(Says(perfect(BOXES, LABELS)), empty, None)[0]["truth"] == []


# --- what is found


def test_the_right_answer_is_found_once() -> None:
    (row,) = task().predict(Says(perfect(BOXES, LABELS)), batch(), None)
    assert row["truth"] == [[*BOXES[0], 1], [*BOXES[1], 0]]
    found = sorted(row["found"], key=lambda each: each[4], reverse=True)
    assert [each[:5] for each in found] == [pytest.approx(each, abs=1e-4) for each in row["truth"]]
    assert all(0.5 < each[5] <= 1 for each in found)
    assert task().scores([row]) == pytest.approx({"map_50": 1.0, "map_50_95": 1.0})


def test_finds_are_cut_at_the_edge_and_ordered() -> None:
    output = perfect(BOXES, LABELS)
    output[1, 1, 2:6] = 100.0
    output[1, 1, 6] = 20.0
    found = finds(output, config())
    assert found[0][:5] == [0.0, 0.0, SIZE, SIZE, 1]
    assert [each[5] for each in found] == sorted((each[5] for each in found), reverse=True)


def test_average_precision_by_hand() -> None:
    """One class: 3 true boxes; finds by score: a hit, a miss, a hit that is half too large, and a repeated hit.

    At IoU 0.5 precision is 1 up to recall 1/3, 2/3 up to recall 2/3 and 0 beyond: over recall 0, 0.01 ... 1 that are
    34 places of 1 and 33 of 2/3. Above 0.65 the third find misses too.
    """
    truth = [[0, 0, 10, 10, 0], [20, 20, 30, 30, 0]], [[0, 0, 10, 10, 0]]
    found = (
        [[0, 0, 10, 10, 0, 0.9], [50, 50, 60, 60, 0, 0.8], [0, 0, 10, 10, 0, 0.1]],
        [[0, 0, 15, 10, 0, 0.7]],
    )
    rows = [{"truth": there, "found": said} for there, said in zip(truth, found, strict=True)]
    at_50 = (34 + 33 * 2 / 3) / 101
    scores = task().scores(rows)
    assert scores["map_50"] == pytest.approx(at_50)
    assert scores["map_50_95"] == pytest.approx((4 * at_50 + 6 * 34 / 101) / 10)  # 10 / 15: up to 0.65
    assert task().scores(list(reversed(rows))) == pytest.approx(scores)


def test_classes_count_alike_and_only_those_that_occur() -> None:
    rows = [{"truth": [[0, 0, 9, 9, 0]], "found": [[0, 0, 9, 9, 0, 0.5], [0, 0, 9, 9, 1, 0.9]]}]
    assert task().scores(rows)["map_50"] == pytest.approx(1.0)
    rows.append({"truth": [[0, 0, 9, 9, 1]] * 3, "found": []})
    assert task().scores(rows)["map_50"] == pytest.approx(0.5)
    assert task().scores([{"truth": [[0, 0, 9, 9, 1]], "found": []}]) == {"map_50": 0.0, "map_50_95": 0.0}
    assert task().scores([{"truth": [], "found": [[0, 0, 9, 9, 1, 0.9]]}]) == {}


def test_without_pycocotools_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(UsageError, match=r'pip install "shardyard\[metrics\]"'):
        task().scores([])


def test_pictures_show_what_is_true_and_what_is_found() -> None:
    missed = perfect(BOXES[:1], LABELS[:1])
    sheet = task().pictures(Says(missed), batch(), None, 0)["detections"]
    assert sheet.shape[2] == 3 and sheet.dtype == np.uint8
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert {TRUE_COLOUR, FOUND_COLOUR} <= colours
    times = object_detection.SMALL_PX // SIZE
    assert tuple(sheet[1 * times, 4 * times]) == FOUND_COLOUR  # over the true one's edge
    assert tuple(sheet[8 * times, 12 * times]) == TRUE_COLOUR


# --- examples


def marked(boxes: np.ndarray) -> np.ndarray:
    """A picture in which box n is filled with n + 1."""
    image = np.zeros((SIZE, SIZE, 1), np.uint8)
    for number, (left, top, right, bottom) in enumerate(boxes.astype(int), start=1):
        image[top:bottom, left:right] = number
    return image


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({"shift_px": 3}, (1 + 3 + 1) * (2 + 2 + 1)),  # to the left one fits, to the right 3, up and down 2
        ({"flip": True}, 2),
        ({"turn": True}, 4),
        ({"flip": True, "turn": True}, 8),
    ],
)
def test_boxes_go_where_their_pixels_go(settings: dict[str, Any], places: int) -> None:
    boxes = np.array([[1, 2, 5, 4], [6, 9, 9, 14]], np.float32)
    prepare = task(**settings).preparation(COLUMNS, training=True)
    assert prepare is not None
    seen = set()
    for seed in range(100):
        row = {"image": marked(boxes), "boxes": boxes, "labels": np.array([0, 1])}
        made = prepare(row, np.random.default_rng(seed))
        np.testing.assert_array_equal(made["image"], marked(made["boxes"]))
        assert made["boxes"].dtype == np.float32 and made["labels"].tolist() == [0, 1]
        seen.add(tuple(made["boxes"].ravel()))
    assert len(seen) == places


def test_nothing_is_done_to_examples_where_nothing_is_asked_for() -> None:
    assert task().preparation(COLUMNS, training=True) is None
    assert task(flip=True, turn=True, shift_px=1).preparation(COLUMNS, training=False) is None
    assert task().io() == (Image(1, SIZE, SIZE), Boxes(2))
    with pytest.raises(UsageError, match=r"uint8 of shape \(16, 16, 1\); the task wants uint8 of shape \(32, 32, 1\)"):
        task(image_size=32).preparation(COLUMNS, training=True)


def test_what_is_wrong_with_the_data_is_named() -> None:
    task().check(batch())
    task().check(batch(labels=torch.tensor([[1, 7]]), boxes_length=torch.tensor([1])))  # padding may hold anything
    with pytest.raises(UsageError, match=r"label 2, but task\.num_classes=2 allows 0 to 1"):
        task().check(batch(labels=torch.tensor([[1, 2]])))
    for wrong in ([8.0, 8.0, 8.0, 16.0], [float("nan"), 8.0, 9.0, 16.0]):
        with pytest.raises(UsageError, match="its right has to be beyond its left"):
            task().check(batch(boxes=torch.tensor([[BOXES[0], wrong]])))
