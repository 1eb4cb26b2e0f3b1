from __future__ import annotations

import pickle

import numpy as np

from configs.errors import Damaged
from data_pipelines.damage import BlockDamaged, DamagedBlock, DamageLog, first_rows


def damaged(block: int, **changes: object) -> DamagedBlock:
    values = {
        "file": "s3://b/train.arrow",
        "number": block % 3,
        "first_row": 10 * block,
        "rows": 10,
        "cause": "is missing",
    }
    return DamagedBlock(**{"block": block, **values, **changes})  # type: ignore[arg-type]


def test_the_error_names_file_block_rows_keys_and_remedy() -> None:
    error = BlockDamaged([damaged(4, cause="fails its digest", keys=("doc a", "doc z"))])
    assert isinstance(error, Damaged)
    assert "s3://b/train.arrow: block 1 (rows 40 to 49 of its split, 'doc a' to 'doc z') fails its digest" in str(error)
    assert "shardyard data verify" in str(error) and "data.damage to skip" in str(error)


def test_who_skips_already_is_not_told_to_skip() -> None:
    assert "data.damage" not in str(BlockDamaged([damaged(4)], "skip"))


def test_many_blocks_are_counted_and_the_first_named() -> None:
    error = BlockDamaged([damaged(block) for block in (9, 7, 1, 3, 5)])
    assert error.blocks == (1, 3, 5, 7, 9)
    assert "rows 10 to 19" in str(error) and "rows 90" not in str(error) and "2 more blocks" in str(error)


def test_the_error_pickles() -> None:
    error = pickle.loads(pickle.dumps(BlockDamaged([damaged(2)], "skip")))  # noqa: S301 - our own bytes
    assert error.blocks == (2,) and error.action == "skip" and str(error) == str(BlockDamaged([damaged(2)], "skip"))


def test_the_log_keeps_the_first_cause() -> None:
    log = DamageLog()
    log.add([damaged(5), damaged(2)])
    log.add([damaged(5, cause="fails its digest")])
    assert log.blocks() == [2, 5] and len(log) == 2 and 5 in log and 3 not in log
    assert log[5].cause == "is missing"


def test_first_rows() -> None:
    assert first_rows(np.array([3, 0, 4])).tolist() == [0, 3, 3]
    assert first_rows(np.array([], np.int64)).tolist() == []
