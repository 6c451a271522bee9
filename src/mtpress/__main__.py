"""`python -m mtpress`."""

from mtpress.start import entry

if __name__ == "__main__":
    entry()
