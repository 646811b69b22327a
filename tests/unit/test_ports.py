"""Which ports the service and its tests take for what they start."""

import socket
from pathlib import Path

import pytest

from serving import processes


def test_ports_are_free_and_different() -> None:
    ports = processes.free_ports(50)
    assert len(set(ports)) == 50
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_no_connection_is_given_one_of_them() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first < 32768:
        pytest.skip(f"here connections are given ports from {first} on, not from Linux's default")
    assert max(processes.PORTS) < first


def test_who_looks_for_one_finds_none_that_was_given_away() -> None:
    """Another process would, before the server that it is for listens."""
    [port] = processes.free_ports(1)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_a_port_that_is_taken_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        monkeypatch.setattr(processes, "PORTS", [taken] * 10_000 + list(processes.PORTS))
        assert taken not in processes.free_ports(50)
