"""Folders of pictures are decoded no faster than they are written, and hashed once."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs import config
from jobs.data import decoding
from jobs.data.dataset import load
from serving import ahead


@pytest.fixture
def photos(tmp_path: Path) -> config.Data:
    """Two classes of 60 pictures each."""
    random = np.random.default_rng(0)
    for index in range(120):
        file = tmp_path / "photos" / "train" / f"class{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    root, cache = str(tmp_path / "photos"), str(tmp_path / "cache")
    return config.Data(source="folder", root=root, cache=cache)


def test_no_more_pictures_wait_for_the_disk_than_are_said_to(
    photos: config.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "DECODING_AHEAD", 5)
    read, mapped = decoding._read, ahead.mapped
    lock = threading.Lock()
    decoded, taken, waiting = 0, 0, []

    def count(path: Path, size: tuple[int, int]) -> Any:
        nonlocal decoded
        with lock:
            decoded += 1
        return read(path, size)

    def write_slowly(*of: Any) -> Any:
        nonlocal taken
        for result in mapped(*of):
            taken += 1
            time.sleep(0.002)
            waiting.append(decoded - taken)
            yield result

    monkeypatch.setattr(decoding, "_read", count)
    monkeypatch.setattr(ahead, "mapped", write_slowly)
    loaded = load(photos)
    assert len(loaded.train) + len(loaded.validation) + len(loaded.test) == 120
    assert max(waiting) <= 5
