"""`make demo`: the whole path on one machine: storage, training, promotion, service, an answer."""

import json
import os
import socket
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.client import Config as ClientConfig
from botocore.exceptions import BotoCoreError, ClientError

from jobs.errors import UnavailableError

SECONDS_TO_START = 60


class ObjectStore:
    """A real S3 server (SeaweedFS, from a wheel) on loopback; its data stay in a folder."""

    def __init__(self, folder: Path, keys: dict[str, str], bucket: str) -> None:
        """
        Args:
            keys: `aws_access_key_id` and `aws_secret_access_key` of who may do everything.
        """
        self.folder, self.keys, self.bucket = folder, keys, bucket
        self.ports = [free_port() for _ in range(10)]
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
            *(str(Path(sysconfig.get_path("scripts")) / "weed"), "mini", f"-dir={self.folder}"),
            *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.config={identities}"),
            *(f"-{name}={port}" for name, port in zip(names, self.ports, strict=True)),
            *("-admin.ui=false", "-webdav=false", "-s3.iam=false", "-s3.autoCreateBucket=false"),
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us; we stop it when nobody needs it
                env={**os.environ, "WEED_S3_SSE_KEY": "0" * 64},
            )
        self._wait()

    def kill(self) -> None:
        """SIGKILL: it is made for that, and takes 20 seconds to stop when asked."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def client(self, **settings: Any) -> Any:
        config = ClientConfig(s3={"addressing_style": "path"}, **settings)
        region = "us-east-1"
        return boto3.client(
            "s3", endpoint_url=self.address, region_name=region, config=config, **self.keys
        )

    def _wait(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        client = self.client(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5)
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
