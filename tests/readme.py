"""The commands that the README tells people to type."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
JOBS = sorted({c for c in COMMANDS if c.startswith("python -m jobs")})
