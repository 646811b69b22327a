"""Folders for a while, and what is left of them when a process is killed."""

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from s3transfer.utils import OSUtils

from serving.files import MARK, PARTIAL, temporary

KEEPS = """
import sys, time
from pathlib import Path
from serving.files import temporary

with temporary(Path(sys.argv[1])) as folder:
    (folder / "archive").mkdir()
    (folder / "archive" / "network").write_bytes(b"weights")
    print(folder, flush=True)
    time.sleep(600)
"""


def keeping(place: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that keeps a folder there, until it is killed."""
    command = [sys.executable, "-c", KEEPS, str(place)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_was_being_written_is_known_by_its_name_whether_boto3_wrote_it_or_not() -> None:
    ours = ".x.1.part"
    theirs = OSUtils().get_temp_filename(ours)
    assert theirs != ours and Path(ours).match(PARTIAL) and Path(theirs).match(PARTIAL)
    assert not any(Path(name).match(PARTIAL) for name in ("x.1.part", ".x.1", "a.part.AbCd1234"))


def test_a_folder_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    with temporary(tmp_path) as folder, temporary(tmp_path) as other:
        assert folder.is_dir() and other.is_dir() and folder != other
        (folder / "file").touch()
    with pytest.raises(ValueError, match="failed"), temporary(tmp_path) as folder:
        raise ValueError("failed")
    assert not [*tmp_path.iterdir()]


def test_a_folder_in_a_relative_one_has_an_absolute_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """… as a process that is started in another folder needs it."""
    (tmp_path / "state").mkdir()
    monkeypatch.chdir(tmp_path)
    with temporary(Path("state")) as folder:
        assert folder.is_absolute() and folder.parent == tmp_path / "state"
    assert not [*(tmp_path / "state").iterdir()]


def test_where_folders_cannot_be_locked_none_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "as NFS does")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with temporary(tmp_path) as folder, temporary(tmp_path):
        assert folder.is_dir() and not [*folder.iterdir()]
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_process_left_is_removed_and_nothing_that_is_in_use(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # readable to its user alone
    (elsewhere / MARK).touch()
    for name, mode in (("open", 0o770), ("unmarked", 0o700)):
        (tmp_path / name).mkdir(mode)
        (tmp_path / name).chmod(mode)
    (tmp_path / "open" / MARK).touch()  # by whoever may write there
    (tmp_path / "link").symlink_to(elsewhere)
    (killed, left), (lives, used) = keeping(tmp_path), keeping(tmp_path)
    try:
        with temporary(tmp_path):
            assert left.is_dir() and used.is_dir()
        killed.kill()
        killed.wait()
        assert (left / "archive" / "network").is_file()
        with temporary(tmp_path) as folder:
            names = {path.name for path in tmp_path.iterdir()}
            assert names == {"open", "unmarked", "link", used.name, folder.name}
        assert (used / "archive" / "network").is_file() and (elsewhere / MARK).is_file()
    finally:
        for process in (killed, lives):
            process.kill()
            process.communicate()
