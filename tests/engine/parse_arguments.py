"""Parses command lines with the parser of `vllm serve`; runs under the engine's python.

python parse_arguments.py LINES.json FOUND.json      [[token, …], …] → [{"error": text} or {name: value}, …]
"""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser


class Refusing(FlexibleArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parsed(tokens: list[str]) -> dict[str, Any]:
    try:
        found = make_arg_parser(Refusing()).parse_args(tokens)
        validate_parsed_serve_args(found)
    except (ValueError, KeyError) as error:
        return {"error": str(error)}
    return vars(found)


if __name__ == "__main__":
    lines = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([parsed(line) for line in lines], default=str))
