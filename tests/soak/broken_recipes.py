"""Ways to break a recipe.

In: a `Case`. Out: the same with a recipe that is no YAML, or no recipe. Each fault is there by construction.
"""

import random
from typing import Any

from broken import QUANTIZE, RECIPE, Case, way

KIND = "recipe"
KEYS = ("name", "summary", "format", "quantize", "in_proj_ab", "vision", "kv_cache", "rounding", "constant_input_scale", "calibration")
SOURCE_KEYS = ("dataset", "subset", "split", "num_samples", "max_seq_len")
LAUGHS = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else '1'}]\n" for i in range(12))


def misspelt(key: str, r: random.Random) -> str:
    """One letter off, and no other key."""
    at = r.randrange(len(key))
    new = r.choice(
        (
            key[:at] + key[at + 1 :],
            key[:at] + r.choice("qxz") + key[at:],
            key[:at] + r.choice("QXZ-") + key[at + 1 :],
            key.upper(),
            key + "s",
        )
    )
    return new if new not in (*KEYS, *SOURCE_KEYS, "") else key + "_x"


@way(KIND, QUANTIZE)
def key_misspelt(case: Case) -> str:
    """Another key beside all that a recipe needs, or in place of one it needs."""
    r = case.rng
    wrong = misspelt(r.choice(KEYS), r)
    if r.random() < 0.4:
        needed = r.choice(("name", "summary", "format", "quantize"))
        wrong = misspelt(needed, r)
        case.recipe.write_text(RECIPE.replace(f"{needed}:", f"{wrong}:"))
    elif r.random() < 0.5:
        wrong = misspelt(r.choice(SOURCE_KEYS), r)
        case.recipe.write_text(RECIPE + f"calibration: {{{wrong}: 3}}\n")
    else:
        case.recipe.write_text(RECIPE + f"{wrong}: 3\n")
    return wrong


@way(KIND, QUANTIZE)
def value_wrong(case: Case) -> str:
    r = case.rng
    key = r.choice((*KEYS, *(f"calibration.{k}" for k in SOURCE_KEYS)))
    wrong: dict[str, list[str]] = {
        "name": ["3", "My Build", "../x", "''", "[a]", "null", "-x", '"a\\nb"', "x/y", "true"],
        "summary": ["3", "[a]", "null", "{a: 1}", "1.5", "2020-01-01", "true"],
        "format": ["nvfp8", "NVFP4", "4", "null", "[nvfp4]", "''", "int4", "{}"],
        "quantize": ["[]", "mpl", "[mpl]", "mlp", "null", "3", "[3]", "{mlp: 1}", "[[mlp]]", "[mlp, lm_head]", "[mtp]", "[MLP]", "[null]"],
        "in_proj_ab": ["nvfp8", "null", "3", "[bf16]", "BF16", "''", "true"],
        "vision": ["strip", "null", "3", "true", "[keep]", "{}"],
        "kv_cache": ["fp8", "null", "8", "[auto]", "no"],
        "rounding": ["min", "null", "[max]", "3", "gptq"],
        "constant_input_scale": ["0", "-1", ".nan", ".inf", "-.inf", "1e5", "'0.1'", "[0.1]", "true", "10001", "{}"],
        "calibration": ["3", "[]", "builtin", "'x'", "null", "true", "[builtin]"],
        "calibration.dataset": ["3", "null", "[a]", "{}", "true"],
        "calibration.subset": ["3", "[a]", "{}", "1.5"],
        "calibration.split": ["3", "null", "[a]", "true"],
        "calibration.num_samples": ["0", "-1", "100001", "'20'", "2.5", "null", "[20]", "true", ".inf", "9" * 400, "1_000_000", "{}"],
        "calibration.max_seq_len": ["0", "-8192", "1000001", "'8192'", "8192.0", "null", "false", "0x7fffffffffffffff"],
    }
    value = r.choice(wrong[key])
    if key.startswith("calibration."):
        case.recipe.write_text(f"{RECIPE}calibration:\n  {key.partition('.')[2]}: {value}\n")
    else:
        kept = "".join(line + "\n" for line in RECIPE.splitlines() if not line.startswith(f"{key}:"))
        case.recipe.write_text(f"{kept}{key}: {value}\n")
    return f"{key}: {value[:40]}"


@way(KIND, QUANTIZE)
def enormous_number(case: Case) -> str:
    r = case.rng
    digits = r.randint(4_400, 20_000)
    number = r.choice(
        (
            "0x" + "f" * digits,
            "9" * digits,
            "0b" + "1" * digits,
            "0" + "7" * digits,
            "1" + ":59" * (digits // 3),
            "-" + "9" * digits,
            "1e" + "9" * digits,
        )
    )
    key = r.choice(("constant_input_scale", "summary", "format", "quantize", "vision", "calibration"))
    if key == "calibration":
        case.recipe.write_text(f"{RECIPE}calibration: {{num_samples: {number}}}\n")
    elif number.startswith("1e") and key == "summary":  # YAML 1.1 reads a number without a point as text
        return ""
    else:
        kept = "".join(line + "\n" for line in RECIPE.splitlines() if not line.startswith(f"{key}:"))
        case.recipe.write_text(f"{kept}{key}: {number}\n")
    return f"{key}: {number[:12]}… of {len(number)} digits"


@way(KIND, QUANTIZE)
def bomb(case: Case) -> str:
    """Anchors that stand for 9¹² items; merged, nested, or as the value of a key whose message would print it."""
    r = case.rng
    key = r.choice(("summary", "format", "quantize", "vision", "calibration", "name", "extra"))
    kept = "".join(line + "\n" for line in RECIPE.splitlines() if not line.startswith(f"{key}:"))
    merged = "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" if i else "m0: &m0 {a: 1}\n" for i in range(12))
    text = r.choice(
        (f"{kept}{key}: *a11\n", f"{LAUGHS}{kept}{key}: *a11\n", f"{kept}{key}: &x [*x, *x]\n", f"{merged}{kept}",
        f"{kept}{key}: &x {{*x : *x}}\n",
         f"{LAUGHS}{kept}{key}: {{*a11 : 1}}\n", f"{kept}x:\n{''.join('  ' + line + chr(10) for line in LAUGHS.splitlines())}{key}: *a11\n")
    )  # fmt: skip
    case.recipe.write_text(text)
    return f"{key}, {len(text)} bytes"


@way(KIND, QUANTIZE)
def tag(case: Case) -> str:
    mark = case.rng.choice(
        (
            "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/object/new:os.system ['true']",
            "!!python/module:os",
            "!!python/tuple [mlp]", "!unknown mlp", "!!binary mlp", "!!set {mlp, gdn}", "!!omap [mlp: 1]", "!!timestamp mlp", "!!int mlp",
            "!!float mlp", "!!bool mlp", "!!null mlp", "!!map [mlp]", "!!seq {a: 1}", "!!python/object:os.stat_result {}",
            "!!pairs [a: 1]", "! [",
        )
    )  # fmt: skip
    where = case.rng.choice(("whole", "quantize", "summary"))
    kept = "".join(line + "\n" for line in RECIPE.splitlines() if not line.startswith(f"{where}:"))
    case.recipe.write_text(f"{mark}\n" if where == "whole" else f"{kept}{where}: {mark}\n")
    return f"{where}: {mark}"


@way(KIND, QUANTIZE)
def not_yaml(case: Case) -> str:
    r = case.rng
    n = r.randint(2_000, 60_000)
    text = r.choice(
        (
            "", "\n\n", "# nothing\n", "---\n", "- a\n- b\n", "3\n", "name\n", "null\n", RECIPE + "---\n" + RECIPE,
            RECIPE + "\tvision: keep\n",
            RECIPE + "vision:\tkeep\n\t- x\n", RECIPE + "  - ][\n", RECIPE + "a: b: c\n", RECIPE + "'open\n", RECIPE + "{",
            RECIPE + "x: [1, 2\n", "[" * n,
            "{a: " * n, "- " * n, "? " * n, RECIPE + "x: @y\n", RECIPE + "x: `y`\n", RECIPE + "%YAML 3.0\n", RECIPE + "x: \0\n",
            RECIPE + "x: \x07\n",
            RECIPE + RECIPE, RECIPE + "format: nvfp4\n", RECIPE + "1: 2\n", RECIPE + "null: 2\n", RECIPE + "[a, b]: 2\n",
            RECIPE + "{a: 1}: 2\n",
            RECIPE + "true: false\n", RECIPE.replace(":", " "), RECIPE.replace(": ", ":"), RECIPE + "x: !!float abc\n",
            RECIPE + "x: 2024-99-99\n",
            RECIPE + "calibration: {num_samples: 3, num_samples: 4}\n", RECIPE + "? [a]\n: b\n", RECIPE + "2024-01-01: 3\n",
        )
    )  # fmt: skip
    case.recipe.write_text(text)
    return repr(text[-40:])


@way(KIND, QUANTIZE)
def not_text(case: Case) -> str:
    r = case.rng
    raw = RECIPE.encode()
    at = r.randrange(len(raw))
    case.recipe.write_bytes(
        r.choice(
            (
                raw[:at] + b"\xff" + raw[at:],
                raw[:at] + b"\0" + raw[at:],
                r.randbytes(500) + b"\xff",
                RECIPE.encode("utf-16"),
                b"\x1f\x8b" + raw,
            )
        )
    )
    return f"bytes at {at}"


@way(KIND, QUANTIZE)
def not_a_file(case: Case) -> str:
    what = case.rng.choice(("missing", "directory", "loop", "large", "pipe"))
    case.recipe.unlink()
    if what == "directory":
        case.recipe.mkdir()
    elif what == "loop":
        case.recipe.symlink_to(case.recipe)
    elif what == "large":
        case.recipe.write_text(RECIPE + "# more\n" * case.rng.randint(20_000, 1_000_000))
    elif what == "pipe":
        import os

        os.mkfifo(case.recipe)
    return what


def all_keys() -> dict[str, Any]:
    """For the test that the table above knows every key."""
    return {"recipe": KEYS, "calibration": SOURCE_KEYS}
