"""What the service can be told, by environment variables; unknown ones are refused."""

import os
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PREFIX = "SERVING_"


class SettingsError(ValueError):
    """The environment does not make a service; the message says what to change."""


class Settings(BaseModel):
    """Each field is the variable SERVING_<FIELD>, in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_uri: str
    """The archive to serve, a path; also read from MODEL_URI."""
    model_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Its digest; another archive is then refused."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8080
    metrics_port: Annotated[int, Field(ge=1, le=65535)] = 8082
    workers: Annotated[int, Field(gt=0)] = len(os.sched_getaffinity(0))
    """Processes that run the network, one thread each."""
    max_body_bytes: Annotated[int, Field(gt=0)] = 10_000_000
    endpoint_seconds: Annotated[float, Field(ge=0)] = 5
    """After SIGTERM, how long requests are still taken while load balancers learn of it."""
    drain_seconds: Annotated[int, Field(gt=0)] = 30
    """… and then how long those in flight may take."""
    state_dir: str | None = None
    """The one directory that is written to; a temporary one when absent."""


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Raises:
    SettingsError: a variable is missing, unknown or out of range.
    """
    given = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX)
    }
    if "MODEL_URI" in environment:
        given.setdefault("model_uri", environment["MODEL_URI"])
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = PREFIX + str(first["loc"][0]).upper()
        raise SettingsError(f"{name}: {first['msg']}") from None
