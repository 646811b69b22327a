"""As many cores are counted as the process may really use."""

import os
from pathlib import Path

import pytest

from serving import processes


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(processes, "CGROUPS", tmp_path)
    monkeypatch.setattr(processes, "CGROUP_LISTING", tmp_path / "listing")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    return tmp_path


def note(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_a_quota_the_affinity_counts(cgroups: Path) -> None:
    assert processes.cores() == 64
    note(cgroups / "listing", "0::/\n")
    note(cgroups / "cpu.max", "max 100000\n")
    assert processes.cores() == 64


@pytest.mark.parametrize(("quota", "cores"), [("200000", 2), ("350000", 3), ("50000", 1)])
def test_a_quota_of_version_2_counts_also_from_above(quota: str, cores: int, cgroups: Path) -> None:
    note(cgroups / "listing", "0::/pods/job\n")
    note(cgroups / "pods" / "cpu.max", f"{quota} 100000\n")
    note(cgroups / "pods" / "job" / "cpu.max", "max 100000\n")
    assert processes.cores() == cores


def test_a_quota_of_version_1_counts_inside_and_outside_a_container(cgroups: Path) -> None:
    note(cgroups / "listing", "7:memory:/x\n4:cpu,cpuacct:/kubepods/job\n0::/\n")
    note(cgroups / "cpu" / "cpu.cfs_quota_us", "400000\n")
    note(cgroups / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert processes.cores() == 4, "the container sees its own group as the root"
    note(cgroups / "cpu" / "kubepods" / "job" / "cpu.cfs_quota_us", "-1\n")
    note(cgroups / "cpu" / "kubepods" / "job" / "cpu.cfs_period_us", "100000\n")
    assert processes.cores() == 4


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,1", 2), ("0,-1,1", 1), ("0,1,2,3", 2)],
)
def test_gpus_that_are_hidden_are_not_counted(
    visible: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(processes, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert processes.gpus() == count
