"""The API key of a server: the variables that it is read from. It travels in the environment, for arguments stand in the process list."""

import os

API_KEY = "VLLM_API_KEY"  # vLLM reads it
KEY_VARIABLES = ("MTPRESS_API_KEY", API_KEY)


def given_key(argument: str | None) -> str | None:
    """The key of --api-key or, without it, of the first variable that is set."""
    return argument or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
