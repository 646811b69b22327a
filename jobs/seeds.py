"""Random numbers: a separate generator for every purpose."""

import hashlib

import torch


def generator(*seeds: int | str) -> torch.Generator:
    """A separate random generator for every combination of `seeds`, on the CPU."""
    digest = hashlib.sha256(repr(seeds).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
