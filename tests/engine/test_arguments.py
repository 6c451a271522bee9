import pytest

from mtpress.engine.launch.arguments import OFF, ON, command_values, final_values, json_object, read, whole_number
from mtpress.errors import InputError


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (["--max-model-len", "4096"], {"--max-model-len": "4096"}),
        (["--max_model_len=4096"], {"--max-model-len": "4096"}),
        (["--max-model-len=1", "--max_model_len", "2"], {"--max-model-len": "2"}),
        (["-tp", "2"], {"--tensor-parallel-size": "2"}),
        (["-tp=2"], {"--tensor-parallel-size": "2"}),
        (["-O3"], {"--optimization-level": "3"}),
        (["--enforce-eager"], {"--enforce-eager": ON}),
        (["--no-enforce_eager"], {"--enforce-eager": OFF}),
        (["--enforce-eager", "--no-enforce-eager"], {"--enforce-eager": OFF}),
        (["--seed", "-1"], {"--seed": "-1"}),
        (["--served-model-name", "a", "b"], {"--served-model-name": "a b"}),
        (["--device-memory-utilization", "0.5"], {"--gpu-memory-utilization": "0.5"}),
        (["--compilation-config.pass_config.fuse_x", "true"], {"--compilation-config": '{"pass_config": {"fuse_x": true}}'}),
        (["--spec-tokens", "2", "--spec-method=mtp"], {"--speculative-config": '{"num_speculative_tokens": 2, "method": "mtp"}'}),
        (["-sc", '{"method": "mtp"}', "--speculative_config.num_speculative_tokens", "3"],
         {"--speculative-config": '{"method": "mtp", "num_speculative_tokens": 3}'}),
    ],
)  # fmt: skip
def test_values_by_any_spelling(tokens: list[str], value: dict[str, str]) -> None:
    assert final_values(read(tokens)) == value


def test_tokens_stay_as_they_were_written() -> None:
    tokens = ["--max_model_len=4096", "-tp", "2", "--no-enforce-eager"]
    assert [token for argument in read(tokens) for token in argument.tokens] == tokens


def test_of_a_whole_command_the_last_flag_counts() -> None:
    assert command_values(["vllm", "serve", "m", "--max-model-len", "1", "--max-model-len=2048"]) == {"--max-model-len": "2048"}
    assert command_values(["python", "-m", "vllm", "serve"]) == {}


def test_a_word_without_a_flag_is_refused() -> None:
    with pytest.raises(InputError, match="'model' belongs to no flag"):
        read(["model", "--port", "1"])


@pytest.mark.parametrize(
    ("text", "number"), [("32768", 32768), ("32k", 32000), ("32K", 32768), ("1.5k", 1500), ("auto", None), ("-1", None)]
)
def test_whole_numbers(text: str, number: int | None) -> None:
    assert whole_number("--max-model-len", text) == number


@pytest.mark.parametrize("text", ["many", "1.5", "1.5K", "", "0x10", "12 34"])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(InputError, match="--max-model-len"):
        whole_number("--max-model-len", text)


def test_what_is_no_object_is_left_to_vllm() -> None:
    assert json_object("{broken") == json_object("[1]") == json_object(None) == {}
