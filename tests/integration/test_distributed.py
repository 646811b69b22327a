"""Several processes give what one gives, write once, stop together, and outlive one another."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from command import Job, called, ended, start_job
from conftest import ROOT, copy_of, free_port, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from thin import thin_network
from torch import nn

from jobs import distributed
from jobs.errors import ConfigurationError
from jobs.runs import RunFolder, read_arrays
from jobs.train import whole_batch

EPOCHS = 6  # long enough to be stopped on the way
# Batches, splits and scoring that do not divide by two. No Adam, which magnifies the order of
# additions where a gradient is nearly zero.
RAW = tiny(
    data={"train_images": 40, "test_images": 21, "validation": 0.3},
    optim={"name": "sgd", "learning_rate": 0.01, "batch_size": 9, "epochs": EPOCHS},
    variants=[
        {"name": "finetune", "init": "pretrained", "batch_norm": "eval"},
        {"name": "frozen", "init": "pretrained", "trainable": "head"},
    ],
    runtime={"checkpoint_every": 2},
    evaluation={"batch_norm_images": 0, "batch_size": 7},
)
THIN = str(ROOT / "tests")  # where thin.py is
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def leave_none_behind() -> Iterator[None]:
    """A test that fails half-way ends its processes, those of torchrun included."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.terminate()
            process.communicate()
    STARTED.clear()


def start(*command: str | Path, **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": THIN,
            **environment,
        },
    )
    STARTED.append(process)
    return process


def start_pair(*arguments: str | Path) -> list[Job]:
    """Two processes of a job as torchrun would start them; their exit codes can be told apart."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = str(free_port())
    return [start_job(*arguments, **group, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]


def workers(agent: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in children_of(agent.pid).read_text().split()]


def children_of(pid: int) -> Path:
    return Path(f"/proc/{pid}/task/{pid}/children")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "job.yaml"
    path.write_text(yaml.safe_dump(RAW))
    return path


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The job in a single process."""
    out = tmp_path_factory.mktemp("alone")
    with thin_network():
        done = called("run", "--config", config, "--out", out, "--run-id", "r")
    assert done.returncode == 0, done.stderr
    return RunFolder(out / "r")


def assert_same(ours: RunFolder, theirs: RunFolder) -> None:
    """The same files, rows, predictions and weights, up to the order of additions."""
    assert set(ours.manifest().files) == set(theirs.manifest().files)
    for row, expected in zip(ours.metrics(), theirs.metrics(), strict=True):
        for key in ("variant", "epoch", "split", "learning_rate"):
            assert row[key] == expected[key]
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name in ("finetune", "frozen"):
        one, other = (folder.path / "variants" / name for folder in (ours, theirs))
        weights, expected_weights = (load_file(p / "best.safetensors") for p in (one, other))
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, expected_weights[key], rtol=1e-4, atol=1e-5)
        ours_said, theirs_said = (read_arrays(p / "test_predictions.npz") for p in (one, other))
        assert ours_said["labels"].tolist() == theirs_said["labels"].tolist()
        assert ours_said["logits"] == pytest.approx(theirs_said["logits"], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_one_of_two_asked_to_stop_both_stop_and_the_same_command_ends_as_one_process_would(
    config: Path, alone: RunFolder, tmp_path: Path
) -> None:
    arguments = ("run", "--config", config, "--out", tmp_path, "--run-id", "r")
    variant = tmp_path / "r" / "variants" / "finetune"
    with ended(start_pair(*arguments)) as pair:
        pair[0].wait_for(variant / "last.ckpt")
        pair[1].send_signal(signal.SIGTERM)
        messages = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair] == [75, 75], messages
    assert "SIGTERM: state saved" in messages[1] and "another process was asked" in messages[0]
    state = torch.load(variant / "last.ckpt", weights_only=True)
    assert (state["epoch"], state["step"]) != (EPOCHS, 0), "it was stopped on the way"

    with ended(start_pair(*arguments)) as pair:
        outputs = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "finetune: resumes in epoch" in outputs[0][1]
    assert "index.html" in outputs[0][0] and not outputs[1][0] and not outputs[1][1]
    assert_same(RunFolder(tmp_path / "r"), alone)


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_after_a_killed_worker_torchrun_goes_on_from_the_checkpoint(
    config: Path, alone: RunFolder, tmp_path: Path
) -> None:
    command = (*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", "--master-port")
    arguments = ("run", "--config", config, "--out", tmp_path, "--run-id", "r")
    agent = start(*command, str(free_port()), "-m", "thin", "jobs", *arguments)
    checkpoint = tmp_path / "r" / "variants" / "finetune" / "last.ckpt"
    while not checkpoint.exists():
        assert agent.poll() is None, agent.communicate()
        time.sleep(0.02)
    os.kill(workers(agent)[1], signal.SIGKILL)
    stdout, stderr = agent.communicate()
    assert agent.returncode == 0, stderr
    assert "finetune: resumes in epoch" in stderr
    assert stdout.count("index.html") == 1
    environments = yaml.safe_load((tmp_path / "r" / "environment.json").read_text())
    assert [e["processes"] for e in environments] == [2, 2]
    assert_same(RunFolder(tmp_path / "r"), alone)


def test_what_fails_in_one_process_ends_all_with_its_exit_code(
    config: Path, tmp_path: Path
) -> None:
    setting = "weights.source=/no.safetensors"
    with ended(start_pair("run", "--config", config, "--out", tmp_path, "--set", setting)) as pair:
        messages = [process.communicate()[1] for process in pair]
    assert [process.returncode for process in pair] == [3, 3], messages
    assert all(message.splitlines()[-1].startswith("error: ") for message in messages)
    assert "Traceback" not in "".join(messages)


def test_a_promotion_that_fails_ends_all_so_that_all_are_there_when_it_is_retried(
    exported: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a")
    run = copy_of(exported, tmp_path)
    settings = {"uri": "s3://runs-of-tests/b", "endpoint_url": f"http://127.0.0.1:{free_port()}"}
    arguments = [f"--set=storage.{key}={value}" for key, value in settings.items()]
    arguments += ["--set=storage.attempts=1", f"--run-id={run.run_id}", "--promote"]
    config = run.path / "config.yaml"
    with ended(start_pair("run", "--config", config, "--out", tmp_path, *arguments)) as pair:
        outputs = [process.communicate() for process in pair]
    assert [process.returncode for process in pair] == [3, 3], outputs
    assert "index.html" in outputs[0][0] and not outputs[1][0]


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Two network namespaces with names for each other, as two machines of a cluster."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    first, second = names = (f"jobs-{os.getpid()}-a", f"jobs-{os.getpid()}-b")
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add veth-a netns {first} type veth peer name veth-b netns {second}"]
    for n, name in enumerate(names, start=1):
        commands += [
            f"ip -n {name} addr add 10.89.0.{n}/24 dev veth-{name[-1]}",
            f"ip -n {name} link set veth-{name[-1]} up",
            f"ip -n {name} link set lo up",
        ]
    folders = [Path("/etc/netns") / name for name in names]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode and command == commands[0]:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
            assert not done.returncode, f"{command}: {done.stderr}"
        for n, folder in enumerate(folders, start=1):
            folder.mkdir(parents=True, exist_ok=True)
            own = f"127.0.0.1 localhost\n10.89.0.{n} {socket.gethostname()}\n"
            (folder / "hosts").write_text(f"{own}10.89.0.1 {first}\n10.89.0.2 {second}\n")
        yield names
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("thin")
def test_two_machines_outlive_a_killed_worker(
    nodes: tuple[str, str], config: Path, alone: RunFolder, tmp_path: Path
) -> None:
    """Each has its own disk: only the first one's has the run."""
    agents = []
    for number, name in enumerate(nodes):
        device = f"veth-{name[-1]}"
        command = ["ip", "netns", "exec", name, *TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1"]
        command += ["--node-rank", str(number), "--max-restarts", "2", "--rdzv-id", "job"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0]}:29400"]
        command += ["--local-addr", f"10.89.0.{number + 1}", "-m", "thin", "jobs", "run"]
        command += ["--config", str(config), "--out", str(tmp_path / name), "--run-id", "r"]
        fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as k8s/overlays/multi-node has it
        agents.append(start(*command, GLOO_SOCKET_IFNAME=device, TP_SOCKET_IFNAME=device, **fresh))
    checkpoint = tmp_path / "{}" / "r" / "variants" / "finetune" / "last.ckpt"
    places = [Path(str(checkpoint).format(name)) for name in nodes]
    while not any(place.exists() for place in places):
        assert all(agent.poll() is None for agent in agents), agents[0].communicate()
        time.sleep(0.02)
    os.kill(workers(agents[1])[0], signal.SIGKILL)
    outputs = [agent.communicate() for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    written = [name for name in nodes if (tmp_path / name / "r" / "manifest.json").exists()]
    assert written == [nodes[0]]
    assert_same(RunFolder(tmp_path / nodes[0] / "r"), alone)


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "size", lambda: size)


@given(count=st.integers(1, 200), size=st.integers(1, 9), batch_size=st.integers(1, 40))
def test_shares_cover_every_image_once_in_equally_many_batches(
    count: int, size: int, batch_size: int
) -> None:
    shares = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for rank in range(size):
            pretend(monkeypatch, rank, size)
            shares.append(distributed.batches(count, batch_size, torch.device("cpu")))
    assert torch.cat([batch for share in shares for batch in share]).tolist() == list(range(count))
    assert len({len(share) for share in shares}) == 1
    assert max(len(batch) for share in shares for batch in share) <= batch_size


def test_dropout_over_processes_draws_what_one_process_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(9, 2048, 1, 1, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(7)
    expected = nn.Dropout(0.5)(x)
    parts = []
    for rank in range(2):
        pretend(monkeypatch, rank, 2)
        torch.manual_seed(7)
        parts.append(whole_batch.WholeBatchDropout(0.5, 9)(x[distributed.share(9)]))
    assert torch.equal(torch.cat(parts), expected)
    layer = whole_batch.WholeBatchDropout(0.5, 9).eval()
    assert layer(x) is x


def test_a_batch_smaller_than_the_group_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, 0, 4)
    with pytest.raises(ConfigurationError, match="batch_size: 3 is less than 4 processes"):
        whole_batch.parallel(nn.Linear(1, 1), 3)
