"""Settings of the service: environment variables, which override a YAML file.

Unknown names are refused in both. `SERVING_CONFIG` names the file; its keys are the fields below.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serving import processes, strict_yaml

PREFIX = "SERVING_"
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[int, Field(gt=0)]


class SettingsError(ValueError):
    """The settings are invalid; the message says what to change."""


class Settings(BaseModel):
    """Each field is the variable SERVING_<FIELD>, in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_uri: str
    """The archive to serve, as serving/fetch.py reads it; also read from MODEL_URI."""
    model_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Its digest; another archive is then refused. Needed for http(s)://… and s3://….mar."""
    public_key: Path | None = None
    """A key in PEM; an archive without a signature by its owner is then refused."""
    engine: Literal["torchserve", "asgi"] = "torchserve"
    """What runs the network: TorchServe, or this package's own process without Java."""
    port: Port = 8080
    """Port for predictions."""
    metrics_port: Port = 8082
    """Port for Prometheus; not to be exposed."""
    workers: Positive = Field(default_factory=lambda: processes.gpus() or processes.cores())
    """Processes that run the network: one for each GPU, or one of a single thread for each core."""
    batch_size: Positive = Field(default_factory=lambda: 32 if processes.gpus() else 2)
    """Requests that a worker takes at once. On a CPU a larger batch is hardly faster, and leaves
    other workers idle."""
    batch_delay_ms: Annotated[int, Field(ge=0)] = 1
    """How long a worker waits for a batch to fill."""
    abstain: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A picture whose familiarity is no larger gets no label, unless its request says `abstain`
    itself."""
    queue_size: Positive = 100
    """Requests that may wait for a worker; further ones are answered 503 with Retry-After."""
    response_seconds: Positive = 60
    """A worker that takes longer over a batch is replaced."""
    startup_seconds: Positive = 300
    """A worker that takes longer to load the network is replaced; on a GPU that compiles it."""
    memory_mb: Positive | None = None
    """A service whose processes hold more than this ends its shadow, if it has one, else it drains,
    as after SIGTERM, and ends with 1: its process manager starts another. No limit when absent."""
    compile_cache: Path | None = None
    """Where compiled kernels stay for the next start; in the state directory when absent."""
    max_body_bytes: Positive = 10_000_000
    """Larger requests are answered 413."""
    api_keys: str = ""
    """Bearer keys, separated by commas, one of which is then required for every prediction."""
    api_keys_file: Path | None = None
    """… or a file of them, one a line, which is read again when it changes."""
    key_requests_per_minute: Positive | None = None
    """How many requests each key may send to this process, all at once or little by little;
    further ones are answered 429 with Retry-After. Without keys it does nothing."""
    shadow_uri: str | None = None
    """A second archive, which gets a share of the requests and whose answers are only compared;
    also read from SHADOW_URI. For the engine `asgi`."""
    shadow_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Its digest, needed where the first one's is."""
    shadow_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of the requests that it gets."""
    endpoint_seconds: Annotated[float, Field(ge=0, le=3600)] = 5
    """After SIGTERM, how long requests are still accepted while load balancers notice."""
    drain_seconds: Positive = 30
    """… and then how long those in flight may take."""
    state_dir: Path | None = None
    """The one directory that is written to; a temporary one when absent."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.port == self.metrics_port:
            raise ValueError(f"SERVING_METRICS_PORT: {self.port} is SERVING_PORT, too")
        if self.api_keys and not self.api_keys.replace(",", "").strip():
            raise ValueError("SERVING_API_KEYS: has no key; without the setting, none is needed")
        return self


def from_environment(environment: Mapping[str, str]) -> Settings:
    """Raises:
    SettingsError: a setting is missing, unknown or out of range, or the file cannot be read.
    """
    given = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX)
    }
    for name in {"MODEL_URI", "SHADOW_URI"} & set(environment):
        given.setdefault(name.lower(), environment[name])
    below = _read(Path(given.pop("config"))) if "config" in given else {}
    try:
        return Settings.model_validate({**below, **given})
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise SettingsError(str(first["ctx"]["error"])) from None
        name = str(first["loc"][0])
        where = name if name in below and name not in given else PREFIX + name.upper()
        if name == "model_uri" and first["type"] == "missing":
            where = "MODEL_URI"
        raise SettingsError(f"{where}: {first['msg']}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = strict_yaml.parse(path.read_bytes(), "SERVING_CONFIG", SettingsError)
    except OSError as error:
        raise SettingsError(f"SERVING_CONFIG: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"SERVING_CONFIG: {path} is not a mapping of settings")
    return content
