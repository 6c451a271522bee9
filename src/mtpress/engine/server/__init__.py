"""A running vLLM: its process and the process that watches it, its log, its ports, and the HTTP client that asks it."""
