"""Secrets of servers: where a key is read from, and what of a command line may be shown or recorded.

In: arguments as they were typed, addresses, the environment. Out: the key; arguments without secrets. A secret is dropped, not edited: a
spelling that is not known here must not leave half of it. It travels in the environment or in a header, for arguments stand in the
process list. Leaves out: everything else that arguments mean (arguments.py).
"""

import base64
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from mtpress.errors import InputError

API_KEY = "VLLM_API_KEY"  # vLLM reads it
KEY_VARIABLES = ("MTPRESS_API_KEY", API_KEY)
# Flag of `vllm serve` → the variable that does the same. The shortest that argparse takes for it: --api-server-count, --hf-overrides.
SECRET_VARIABLES = {"--api-key": API_KEY, "--hf-token": "HF_TOKEN"}
STORED_TOKEN = "--hf-token"  # without a value it is no secret: it means the token that is stored
SHORTEST = {"--api-key": "--api-k", "--hf-token": "--hf-t"}
LOGIN = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.-]*://?)\S*@", re.IGNORECASE)  # a path has one slash of it


def given_key(argument: str | None) -> str | None:
    """The key of --api-key or, without it, of the first variable that is set."""
    return argument or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)


def secret_flag(token: str) -> str | None:
    """The flag with a secret behind it that a token is, however it is spelled: --api-key, --api_key=x, --api-ke, --API-KEY; else None."""
    if not token.startswith("-"):
        return None
    name = "--" + re.split(r"[=.]", token, maxsplit=1)[0].lower().replace("_", "-").strip("-").removeprefix("no-")
    for flag, shortest in SHORTEST.items():
        if name.startswith(flag) or (flag.startswith(name) and name.startswith(shortest)):
            return flag
    return None


def refuse_secrets_in(config: str) -> None:
    """InputError where a file of --config holds one, which vLLM would write into its log. An unreadable file is vLLM's to refuse."""
    import yaml

    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return
    for name in content if isinstance(content, dict) else ():
        if flag := secret_flag(f"--{name}"):
            raise InputError(f"{config}: holds {flag}, which vLLM would write into its log; take it out and set {SECRET_VARIABLES[flag]}")


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line that may be recorded and shown: flags with a secret are dropped with what follows, and logins from addresses.

    Before `--` a flag has one value; behind it, as vLLM reads it, everything up to the next flag belongs to it.
    """
    kept: list[str] = []
    rest = list(arguments)
    behind = False
    while rest:
        token = rest.pop(0)
        behind = behind or token == "--"
        flag = secret_flag(token)
        if flag is None or (token == STORED_TOKEN and (not rest or rest[0].startswith("-"))):
            kept.append(without_login(token))
            continue
        if "=" not in token and rest:
            rest.pop(0)  # the secret, also where it begins with a dash
        while behind and rest and not rest[0].startswith("-"):
            rest.pop(0)
    return kept


def without_login(text: str) -> str:
    """The text without `user:password@` in the addresses that it holds."""
    return LOGIN.sub(r"\g<scheme>", text)


def without_secrets_in(message: str, arguments: Sequence[str]) -> str:
    """What is said of a command line, without what without_secrets() drops of it."""
    kept = without_secrets(arguments)
    for token in sorted((token for token in arguments if token not in kept and len(token) > 2), key=len, reverse=True):
        message = message.replace(token, "…")
    return without_login(message)


def split_login(address: str) -> tuple[str, str | None]:
    """(address without user and password, both as the value of an Authorization header). InputError for a login that cannot be read."""
    found = re.fullmatch(r"(https?://)([^/?#]*)@([^@]*)", address, re.IGNORECASE)
    if found is None:
        if "@" in address:
            raise InputError(
                f"{address.rpartition('@')[2]}: its user and password cannot be read; write / ? # @ in them as %2F %3F %23 %40"
            )
        return address, None
    scheme, login, host = found.groups()
    user, _, password = login.partition(":")
    encoded = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
    return scheme + host, f"Basic {encoded}"
