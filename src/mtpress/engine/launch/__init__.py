"""The `vllm serve` command: flags with their reasons, profiles of hardware, known issues, the installed engine."""
