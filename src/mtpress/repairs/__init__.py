"""The repairs of `mtpress repair`: one topic a file, as in rules/, all of them in registry.py."""
