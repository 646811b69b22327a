"""Reachability of URLs."""

import urllib.request

TIMEOUT = 10  # seconds for each host


def reachable(url: str) -> tuple[bool, str]:
    """Whether the address answers, and a line that says so."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT):
            return True, f"{url} answers"
    except OSError as error:
        return False, f"{url} does not answer: {error}"
