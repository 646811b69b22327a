"""`python -m serving`: runs the service that the environment describes; see settings.py.

Exit codes: 0 drained after SIGTERM · 1 a child died · 2 settings · 3 no model.
"""

import os
import sys

from serving.archive import ModelError
from serving.settings import SettingsError, from_environment
from serving.supervisor import Supervisor


def main() -> int:
    try:
        return Supervisor(from_environment(os.environ)).run()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
