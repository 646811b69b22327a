"""When parts of the service are full, killed or broken: what clients see, and what it says."""

import os
import time
import zipfile
from pathlib import Path

import pytest
from command import job
from conftest import pictures, predictions
from service import get, load, running, start, stop

from jobs.runs import RunFolder


@pytest.mark.slow
def test_a_full_queue_says_so_and_the_service_stays_ready(
    archive: Path, exported: RunFolder, tmp_path: Path
) -> None:
    small = {"SERVING_QUEUE_SIZE": "2", "SERVING_WORKERS": "1"}
    file, label = pictures(exported, 1)[0], predictions(exported, 1)[0]
    with (
        running(archive, tmp_path / "state", **small) as service,
        load(service, file, label, clients=40) as statuses,
    ):
        for _ in range(60):  # 12 s, longer than the time between two probes
            assert get(f"{service.address}/readyz")[0] == 200
            time.sleep(0.2)
    assert set(statuses) == {200, 503}, statuses


def broken(archive: Path, folder: Path) -> Path:
    """The archive with a handler that fails when it is loaded."""
    target = folder / archive.name
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            if name == "handler.py":
                content += b"\nraise ValueError('planted: no such weights')\n"
            copy.writestr(name, content)
    return target


@pytest.mark.slow
def test_a_handler_that_cannot_start_is_never_ready_and_says_why(
    archive: Path, tmp_path: Path
) -> None:
    service = start(broken(archive, tmp_path), tmp_path / "state")
    try:
        reason = ""
        while "planted" not in reason:
            status, answer = get(f"{service.address}/readyz")
            assert status in (0, 503), answer
            reason = answer.get("reason", "")
            time.sleep(0.2)
        assert "ValueError: planted: no such weights" in reason
        assert get(f"{service.address}/livez")[0] == 200
    finally:
        assert stop(service) == 0


# Root stays readable to it (it may hold the interpreter), and nothing else is left of its power.
NOBODY = (
    "setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps +dac_read_search "
    "--ambient-caps +dac_read_search --bounding-set -all,+dac_read_search"
)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a namespace like a container's")
def test_it_runs_as_nobody_on_a_read_only_root(archive: Path, tmp_path: Path) -> None:
    """… with no capability, and one directory that it may write to."""
    state = tmp_path / "state"
    script = (
        f"mount --bind {state} {state} && chown 54321 {state} && umount /dev/shm && "
        f'mount -o remount,bind,ro / && exec {NOBODY} "$@"'
    )
    prefix = ("unshare", "--mount", "bash", "-c", script, "bash")
    with running(archive, state, prefix=prefix, HOME="/nonexistent") as service:
        assert get(f"{service.address}/readyz")[0] == 200
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        assert "Uid:\t54321" in status
    assert [p.name for p in state.iterdir()] == ["log"], "and leaves nothing behind"


@pytest.mark.parametrize(
    ("environment", "code", "complaint"),
    [
        ({"MODEL_URI": "/nowhere.mar"}, 3, "/nowhere.mar: no such file"),
        ({"MODEL_URI": "http://127.0.0.1:9/m.mar"}, 3, "its digest is needed"),
        ({"SERVING_PRT": "1"}, 2, "SERVING_PRT: Extra inputs"),
        ({"SERVING_API_KEYS_FILE": "/nowhere"}, 2, "SERVING_API_KEYS_FILE: "),
    ],
)
def test_what_cannot_be_served_is_one_line_and_a_code(
    environment: dict[str, str], code: int, complaint: str
) -> None:
    done = job(module="serving", **{"MODEL_URI": "m.mar", **environment})
    assert done.returncode == code, done.stderr
    assert complaint in done.stderr and done.stderr.count("\n") == 1
