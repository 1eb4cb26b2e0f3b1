"""Which data sets a run reads: decided once for all of its workers, and named in its record.

Who launches an attempt asks for the state of the source, and builds. Workers open the folders that the record names:
they never look at the source, which their nodes need not see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from configs.errors import PeerFailed, ShardyardError
from data_pipelines.build import FOLDER, Progress, newest_built, policy_of
from data_pipelines.index import INDEX_FILE
from data_pipelines.shards import Dataset
from data_pipelines.storage import Store
from trainer.background import Background
from trainer.distributed import World, all_sum
from trainer.record import RunRecord, recorded_datasets
from trainer.run_data import MIXTURE, open_datasets
from trainer.validate import Plan

POLL_S = 0.5


def decide_datasets(
    record: RunRecord, plan: Plan, notice: Callable[[str], None], progress: Progress | None = None
) -> list[Dataset]:
    """The data sets of a run, built where they are not there yet; from now on the record names them.

    Where the source cannot be looked at, they are those that the run read before, else those of the run that it is a
    branch of, else the one built last with these settings; `notice` is told. The checkpoint's fingerprint is compared
    as ever, when it is loaded.

    Raises ShardyardErrors: see ensure_dataset.
    """
    try:
        datasets = open_datasets(plan, progress)
    except ShardyardError as error:
        names = _built_before(record, plan) if _is_source_gone(plan) else []
        if not names:
            raise
        datasets = _opened(plan, names)
        notice(f"{error} The run reads what was built before: {', '.join(dataset.path for dataset in datasets)}.")
    record.write_datasets([dataset.path.rpartition("/")[2] for dataset in datasets])
    return datasets


def decide_together(record: RunRecord, plan: Plan, world: World) -> None:
    """Rank 0 decides, which may take a build of hours; the others wait. Every rank calls it.

    Raises:
        PeerFailed: on the others, where rank 0 failed, which raises what it was.
    """
    build = None
    if world.rank == 0:
        build = Background(lambda: _decide(record, plan))
    while True:  # a collective now and then: none of them takes long, and a rank that has died is noticed
        done = build is not None and build.done.wait(POLL_S)
        ended, failed = all_sum([float(done), float(build is not None and build.error is not None)])
        if build is not None and build.error is not None:
            raise build.error
        if failed:
            raise PeerFailed("The data set could not be built or opened: rank 0 tells why.")
        if ended:
            return


def open_recorded(record: RunRecord, plan: Plan) -> list[Dataset]:
    """The data sets that were decided on for the run."""
    names = recorded_datasets(record.store)
    assert names, "who launches an attempt decides on its data sets"
    return _opened(plan, names)


def _decide(record: RunRecord, plan: Plan) -> None:
    decide_datasets(record, plan, lambda sentence: print(sentence, flush=True))


def _opened(plan: Plan, names: list[str]) -> list[Dataset]:
    folder, damage = Store(plan.config.store).child(FOLDER), policy_of(plan.source_config)
    return [Dataset.open(folder.child(name), damage=damage) for name in names]


def _is_source_gone(plan: Plan) -> bool:
    try:
        plan.source.identity(plan.source_config)
    except ShardyardError:
        return True
    return False


def _built_before(record: RunRecord, plan: Plan) -> list[str]:
    """Names of data sets that are there, for a run whose source is gone; [] where there are none."""
    store, parent = Store(plan.config.store), plan.config.parent
    known = [recorded_datasets(record.store)]
    if parent is not None and parent.state == "all":
        run, of_a_run, _ = parent.checkpoint.rpartition("/checkpoints/")
        with contextlib.suppress(ShardyardError):  # a parent that is out of reach is told of when it is loaded
            known.append(recorded_datasets(Store(run)) if of_a_run else [])
    if plan.config.data.name != MIXTURE and (name := newest_built(store, plan.config.data, plan.tokenizer)) is not None:
        known.append([name])
    for names in known:
        if names and all(store.exists(f"{FOLDER}/{name}/{INDEX_FILE}") for name in names):
            return names
    return []
