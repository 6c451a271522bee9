"""What of a command line is recorded: no secret, however it is spelled, and everything else."""

import pytest

from mtpress.api_key import secret_flag, split_login, without_login, without_secrets
from mtpress.cli import main
from mtpress.errors import InputError

SECRET = "a-SECRET"


@pytest.mark.parametrize(
    "given",
    [
        ["--api-key", SECRET],
        [f"--api-key={SECRET}"],
        ["--api-key", f"my {SECRET} key"],
        [f"--api-key=my {SECRET} key"],
        ["--api-key", f"it's {SECRET}"],
        ["--api-key", f"--{SECRET}"],
        ["--url", f"http://user:{SECRET}@host:1"],
        [f"--url=https://user:{SECRET}@host:1/v1"],
        ["--url", f"http://user:a/{SECRET}@host"],
        *(
            ["--", *behind]
            for behind in (
                ["--api-key", SECRET],
                ["--api_key", SECRET],
                [f"--api_key={SECRET}"],
                ["--api-ke", SECRET],
                ["--api-k", SECRET],
                ["--api-key", "one", SECRET],
                ["--api-key", "--x", SECRET],
                ["--api-key.x", SECRET],
                ["--no-api-key", SECRET],
                ["--API-KEY", SECRET],
                ["-api-key", SECRET],
                [f"--hf-token={SECRET}"],
                ["--hf_tok", SECRET],
            )
        ),
    ],
)
def test_secrets_are_dropped(given: list[str]) -> None:
    recorded = without_secrets(["bench", "CKPT", *given, "--rounds", "1"])
    assert SECRET not in str(recorded)
    assert recorded[:2] == ["bench", "CKPT"]
    assert recorded[-2:] == ["--rounds", "1"]


def test_the_rest_stays() -> None:
    given = [
        "bench",
        "CKPT",
        "--url",
        "http://host:1",
        "--api-server-count",
        "2",
        "--",
        "--api",
        "x",
        "--hf-config-path",
        "y",
        "--seed",
        "-1",
    ]
    assert without_secrets(given) == given
    assert without_secrets(["bench", "--api-key", "k", "CKPT"]) == ["bench", "CKPT"]
    assert secret_flag("api-key") is None
    stored = ["serve", "CKPT", "--", "--hf-token", "--enforce-eager"]
    assert without_secrets(stored) == stored


def test_a_login_is_for_the_header_alone() -> None:
    assert split_login("http://host:1/v1") == ("http://host:1/v1", None)
    assert split_login("http://us%40er:p%2Fw@host:1/v1") == ("http://host:1/v1", "Basic dXNAZXI6cC93")
    assert without_login("GET http://u:p@h/ and https://q@i failed") == "GET http://h/ and https://i failed"
    for address in (f"http://user:a/{SECRET}@host", f"user:{SECRET}@host", f"//user:{SECRET}@host"):
        with pytest.raises(InputError, match=r"write / .* as %2F") as raised:
            split_login(address)
        assert SECRET not in str(raised.value)


@pytest.mark.parametrize("arguments", [["check"], ["eval"], ["inspect"]])
def test_a_login_in_the_place_of_a_path_is_not_shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--base", "nowhere"] if arguments == ["eval"] else []
    assert main([*arguments, f"https://user:{SECRET}@host/x", *more, "--json"]) == 2
    said = "".join(capsys.readouterr())
    assert "host/x" in said and SECRET not in said
