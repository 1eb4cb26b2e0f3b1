from __future__ import annotations

import os
import signal

import pytest

# Before torch is imported anywhere: with few cores, threads that wait for each other cost more than they do.
os.environ["OMP_NUM_THREADS"] = "1"

# A shell has its background jobs ignore Ctrl-C, and what they start inherits it: but tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files without processes of their own that still take many seconds together; `make check` leaves them out.
LONGER = (
    "cluster/dashboard/test_checkpoints_page.py",
    "cluster/dashboard/test_cluster_page.py",
    "cluster/dashboard/test_compare_page.py",
    "cluster/dashboard/test_data_sets_page.py",
    "cluster/dashboard/test_overview_page.py",
    "cluster/dashboard/test_pages.py",
    "cluster/dashboard/test_step_examples.py",
    "cluster/dashboard/test_sweeps_page.py",
    "cluster/kubernetes/test_access.py",
    "cluster/kubernetes/test_lists.py",
    "cluster/kubernetes/test_objects.py",
    "cluster/kubernetes/test_validation.py",
    "cluster/test_bad_input.py",
    "cluster/test_data_commands.py",
    "cluster/test_extend.py",
    "cluster/test_kuberay_api.py",
    "cluster/test_kuberay_command.py",
    "cluster/test_kuberay_manifest.py",
    "cluster/test_kuberay_reasons.py",
    "cluster/test_kuberay_target.py",
    "cluster/test_metrics_command.py",
    "cluster/test_mlflow_copy.py",
    "cluster/test_ray_job.py",
    "cluster/test_simulated.py",
    "cluster/test_sweep.py",
    "cluster/test_sweep_schedulers.py",
    "cluster/test_warm_process.py",
    "contract/test_models.py",
    "crash/test_object_store.py",
    "data_pipelines/test_buckets.py",
    "data_pipelines/test_build.py",
    "data_pipelines/test_cache.py",
    "data_pipelines/test_damage.py",
    "data_pipelines/test_diff.py",
    "data_pipelines/test_duplicates.py",
    "data_pipelines/test_export.py",
    "data_pipelines/test_fetch.py",
    "data_pipelines/test_fuzz.py",
    "data_pipelines/test_index.py",
    "data_pipelines/test_inspect.py",
    "data_pipelines/test_kills.py",
    "data_pipelines/test_loader.py",
    "data_pipelines/test_mapped.py",
    "data_pipelines/test_mixture.py",
    "data_pipelines/test_mixture_build.py",
    "data_pipelines/test_near_duplicates.py",
    "data_pipelines/test_pack.py",
    "data_pipelines/test_order.py",
    "data_pipelines/test_package_sources.py",
    "data_pipelines/test_packages.py",
    "data_pipelines/test_s3.py",
    "data_pipelines/test_shards.py",
    "data_pipelines/test_sources.py",
    "data_pipelines/test_sources_media.py",
    "data_pipelines/test_sources_memory.py",
    "data_pipelines/test_sources_remote.py",
    "data_pipelines/test_sources_tables.py",
    "data_pipelines/test_storage.py",
    "data_pipelines/test_tokenizer.py",
    "data_pipelines/test_writer.py",
    "deploy/test_files.py",
    "deploy/test_kubernetes.py",
    "deploy/test_slurm.py",
    "test_docs.py",
    "trainer/test_batch_norm.py",
    "trainer/test_checkpoint_files.py",
    "trainer/test_cnn.py",
    "trainer/test_face_recognition.py",
    "trainer/test_huggingface.py",
    "trainer/test_image_classification.py",
    "trainer/test_heap.py",
    "trainer/test_image_runs.py",
    "trainer/test_hf.py",
    "trainer/test_initialization.py",
    "trainer/test_lease.py",
    "trainer/test_loop.py",
    "trainer/test_mixture_runs.py",
    "trainer/test_record.py",
    "trainer/test_recurrent.py",
    "trainer/test_seq2seq.py",
    "trainer/test_session.py",
    "trainer/test_skipping.py",
    "trainer/test_step_examples.py",
    "trainer/test_warm_start.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.as_posix().endswith(LONGER):
            item.add_marker(pytest.mark.longer)
    for_gpus = [item for item in items if item.get_closest_marker("gpu") is not None]
    if for_gpus and not _has_gpu():
        config.hook.pytest_deselected(items=for_gpus)
        items[:] = [item for item in items if item not in for_gpus]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--schedules", type=int, default=0, help="long schedules that tests/chaos runs; 0: a short one")
    parser.addoption("--first-seed", type=int, default=0, help="seed of the first schedule, to replay one that failed")
