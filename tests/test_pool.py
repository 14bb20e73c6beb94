"""The pool of single-threaded workers: labels do not depend on their number, and nothing of theirs is in the way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import common
import propagate
from common import Propagation
from propagate import Pool, propagate_labels

ROOT = Path(__file__).parent.parent


@pytest.fixture
def pools():
    made = {workers: Pool(workers) for workers in (1, 2, 5)}
    yield made
    for pool in made.values():
        pool.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", [{}, {"aggregation": "per-frame"}, {"localization": "none"}], ids=str)
def test_labels_are_the_same_to_the_bit_for_any_number_of_workers(pools, monkeypatch, dtype, factors):
    torch.manual_seed(0)
    f = F.normalize(torch.randn(4, 16, 40, 33), dim=1).to(dtype)
    labels, s = torch.rand(3, 2, 40, 33), Propagation(radius=5, **factors)
    found = []
    for pool in pools.values():
        monkeypatch.setattr(propagate, "pool", lambda pool=pool: pool)
        found.append(propagate_labels(f[3], f[:3], labels, s))
    assert all(torch.equal(z, found[0]) for z in found)


def test_a_task_has_one_thread_and_the_caller_keeps_its_own(pools):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pool = Pool(2)
        assert pool.map(lambda _: torch.get_num_threads(), range(8)) == [1] * 8
        assert torch.get_num_threads() == 3
        pool.close()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_tasks_of_tasks_do_not_wait_for_each_other(pools, workers):
    pool = pools[workers]
    assert pool.map(lambda i: sum(pool.map(lambda j: j, range(i))), range(7)) == [0, 0, 1, 3, 6, 10, 15]


def test_an_error_in_a_task_is_the_callers_and_the_rest_is_cancelled(pools):
    done = []

    def task(i):
        if i == 1:
            raise ValueError("the second")
        done.append(i)

    with pytest.raises(ValueError, match="the second"):
        pools[1].map(task, range(1000))
    assert pools[1].map(abs, [-1, -2]) == [1, 2]  # it goes on
    assert len(done) < 1000


def test_coming_frames_are_encoded_in_order_and_a_bounded_number_ahead(monkeypatch, pools):
    monkeypatch.setattr(propagate, "pool", lambda: pools[2])
    read = []
    frames = (read.append(i) or i for i in range(20))
    for i, (frame, features) in enumerate(propagate.encode_ahead(lambda frame: 10 * frame, frames)):
        assert (frame, features) == (i, 10 * i)
        assert len(read) <= i + 2 + 2  # workers + 1 ahead of it


END = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
import propagate
def work():
    for _ in range(2000):
        torch.rand(64, 64) @ torch.rand(64, 64)
[propagate.pool().submit(work) for _ in range(50)]
time.sleep(0.1)
raise SystemExit(7)
"""


def test_a_program_ends_while_tasks_run():
    """With its own exit code, and without doing what is left."""
    assert subprocess.run([sys.executable, "-c", END, ROOT], timeout=60).returncode == 7


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_has_a_pool_of_its_own():
    assert propagate.pool().map(abs, [-1]) == [1]
    child = os.fork()
    if not child:
        os._exit(propagate.pool().map(abs, [-5])[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5


@pytest.mark.parametrize(
    ("environment", "most"), [({"OMP_NUM_THREADS": "1"}, 1), ({"LOCAL_WORLD_SIZE": "4096", "OMP_NUM_THREADS": "1"}, 1)]
)
def test_the_environment_bounds_the_workers(monkeypatch, environment, most):
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert propagate.pool_workers() <= len(os.sched_getaffinity(0))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert propagate.pool_workers() == most


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
    ],
)
def test_a_containers_quota_bounds_pool_and_loaders(files, most, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    real = common.Path
    monkeypatch.setattr(common, "Path", lambda path: tmp_path if path == "/sys/fs/cgroup" else real(path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert common.usable_cpus() == propagate.pool_workers() == most
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's processes share them
    assert common.usable_cpus() == max(1, most // 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert propagate.pool_workers() == max(1, most // 2)
