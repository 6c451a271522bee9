"""`python -m mtpress`."""

from mtpress.cli import entry

if __name__ == "__main__":
    entry()
