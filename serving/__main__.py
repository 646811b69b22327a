"""`python -m serving`: see cli.py."""

from serving.cli import app

if __name__ == "__main__":
    app()
