"""The rules of `mtpress check`: one topic a file, all of them in registry.py."""
