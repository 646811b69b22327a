"""The memory that a container may use, and not the machine's, is what doctor goes by."""

import os
from pathlib import Path

import pytest
from conftest import tiny_config

from jobs import doctor
from serving import processes

GIB = 2**30
NO_LIMIT = 2**63 - 4096  # how version 1 says so


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GiB, and a place for its cgroups' files."""
    monkeypatch.setattr(processes, "CGROUPS", tmp_path)
    monkeypatch.setattr(processes, "CGROUP_LISTING", tmp_path / "listing")
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 * GIB // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    return tmp_path


def doctor_says() -> str:
    return doctor._memory(tiny_config()).detail.split(" · ")[0]


@pytest.mark.parametrize(
    ("listing", "files", "expected"),
    [
        ("", {}, "64.0 GiB"),
        ("0::/\n", {"memory.max": "max\n"}, "64.0 GiB"),
        ("0::/\n", {"memory.max": f"{2 * GIB}\n"}, "2.0 GiB"),
        ("0::/pod/job\n", {"pod/job/memory.max": "max\n", "pod/memory.max": f"{GIB}"}, "1.0 GiB"),
        (
            "0::/pod/job\n",
            {"pod/job/memory.max": f"{GIB // 2}", "pod/memory.max": f"{GIB}"},
            "0.5 GiB",
        ),
        ("9:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": f"{NO_LIMIT}\n"}, "64.0 GiB"),
        (
            "9:memory:/pod/job\n4:cpu,cpuacct:/pod/job\n",
            {
                "memory/memory.limit_in_bytes": f"{3 * GIB}",
                "memory/pod/job/memory.limit_in_bytes": f"{NO_LIMIT}",
            },
            "3.0 GiB",
        ),
    ],
    ids=["none", "v2 max", "v2", "v2 above", "v2 below", "v1 none", "v1 above"],
)
def test_doctor_names_the_least_of_the_limits(
    cgroups: Path, listing: str, files: dict[str, str], expected: str
) -> None:
    (cgroups / "listing").write_text(listing)
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text)
    assert doctor_says() == expected
