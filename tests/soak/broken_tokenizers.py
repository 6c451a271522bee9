"""Ways to break what stands beside the weights: tokenizer, chat template, processor files.

In: a `Case`. Out: the same with one such file broken. Oracles: JSON's or the tokenizers library's own parser refuses the
file; templates are wrong, or never end, by construction. Leaves out: config.json.
"""

import json
from typing import Any

from broken import CALIBRATED, JUNK, QUANTIZE, Case, edit_json, torn, unparsable, way
from tokenizers import Tokenizer

KIND, TEMPLATES, PROCESSOR = "tokenizer", "chat template", "processor files"
BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def tokenizers_refuses(text: str) -> bool:
    try:
        Tokenizer.from_str(text)
    except Exception:  # the library raises nothing narrower
        return True
    return False


@way(KIND, ("weight-only", "calibrated", "check"))
def json_beside_torn(case: Case) -> str:
    return torn(case.source / case.rng.choice(BESIDE), case.rng)


@way(KIND, ("weight-only", "calibrated", "check"))
def json_beside_unparsable(case: Case) -> str:
    return unparsable(case.source / case.rng.choice(BESIDE), case.rng)


@way(KIND, QUANTIZE)
def tokenizer_missing(case: Case) -> str:
    (case.source / "tokenizer.json").unlink()
    if case.rng.random() < 0.5:
        (case.source / "tokenizer.json").mkdir()
    return "no tokenizer.json"


@way(KIND, CALIBRATED)
def section_of_another_type(case: Case) -> str:
    path = case.source / "tokenizer.json"
    content = json.loads(path.read_text())
    key = case.rng.choice(sorted(content))
    content[key] = case.rng.choice(JUNK)
    path.write_text(json.dumps(content))
    return f"{key} = {content[key]!r}" if tokenizers_refuses(path.read_text()) else ""


@way(KIND, CALIBRATED)
def deep_section_of_another_type(case: Case) -> str:
    path = case.source / "tokenizer.json"
    content = json.loads(path.read_text())
    inner: Any = content
    said = []
    for _ in range(case.rng.randint(2, 4)):
        keys = sorted(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
        if not keys:
            return ""
        key = case.rng.choice(keys)
        said.append(str(key))
        holder, inner = inner, inner[key]
    holder[key] = case.rng.choice(JUNK)
    path.write_text(json.dumps(content))
    return f"{'.'.join(said)} = {holder[key]!r}" if tokenizers_refuses(path.read_text()) else ""


@way(KIND, CALIBRATED)
def ids_beyond_the_embeddings(case: Case) -> str:
    """By construction: the samples hold the letter, the embeddings have 288 rows."""
    letter, number = case.rng.choice("Ruby"), case.rng.choice((288, 1000, 10**6, 2**31 - 1, 2**32 - 1))
    edit_json(case.source / "tokenizer.json", lambda t: t["model"]["vocab"].__setitem__(letter, number))
    return f"{letter} is token {number}"


SYNTAX = (
    "{% if %}", "{% for m in messages %}", "{{ messages", "{% endfor %}", "{{ 1 + }}", "{% macro %}", "{{ a | }}", "{% set = 3 %}", "{#",
    "{% raw %}", "{{ messages[ }}", "{% block a %}{% block a %}", "{% for m in %}{% endfor %}", "{{ 'a }}", "{% unknown_tag %}",
    "{{ x | no_such_filter }}", "{{ x is no_such_test }}", "{{ {1: } }}", "{% break %}", "{% include 'other' %}", "{% extends 'other' %}",
    "{% import 'other' as o %}", "{% from 'other' import o %}", "{% generation %}",
)  # fmt: skip
REFUSING = (
    "{{ raise_exception('no system message') }}", "{{ messages.nothing.at_all }}", "{{ nothing.at_all }}", "{{ nothing() }}",
    "{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ 1 % 0 }}", "{{ messages[0]['role'] + 3 }}", "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(role='x') }}", "{{ messages[99].role }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__()[0] }}", "{{ raise_exception.__globals__['__builtins__'].open('/etc/passwd') }}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}", "{{ self.__init__.__globals__ ['x'] }}",
    "{{ ('%s' % messages).__class__.__init__.__globals__.x }}", "{{ '{0.__class__.__init__.__globals__[x]}'.format(messages) }}",
    "{{ (messages | attr('__class__')).mro() }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ raise_exception(1/0) }}",
    "{{ range(10**9) | list }}", "{{ lipsum.__globals__['os'].x.y }}", "{{ messages | map(attribute='a.b.c') | sum }}",
    "{{ messages | first | int(base=99) + {} }}", "{{ strftime_now(3) }}", "{{ messages | tojson(indent='x', sort_keys=3, other=1) }}",
)  # fmt: skip
ENDLESS = (
    "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}",
    "{% set n = namespace(x=0) %}{% for a in range(99999) %}{% for b in range(99999) %}{% set n.x = n.x + 1 %}{% endfor %}{% endfor %}",
    "{% macro m(d) %}{% if d %}{{ m(d - 1) }}{{ m(d - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{% set n = namespace(x='ab') %}{% for a in range(200) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=[1]) %}{% for a in range(200) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "{{ 'a' * 10**10 }}", "{{ 'a' * 2 * 10**9 }}", "{{ [messages] * 10**9 }}", "{{ 9 ** (9 ** 9) }}", "{{ 7 ** (10 ** 10) }}",
    "{{ '%2000000000d' % 1 }}", "{{ '{:2000000000}'.format(1) }}", "{{ 'a'.ljust(2000000000) }}", "{{ 'a' | center(2000000000) }}",
    "{{ 'a\\n' * 1000 | indent(10000000) }}", "{{ lipsum(n=100000000) }}", "{{ 'a'.zfill(3000000000) }}",
    "{{ ('a' * 100000000).replace('a', 'a' * 100000000) }}", "{{ 'a' * 300000000 }}",
)  # fmt: skip


def template(case: Case, text: str) -> str:
    """As the whole template, or before or behind what it is; comments in it may grow, so that no two draws are one."""
    path = case.source / "chat_template.jinja"
    old, filler = path.read_text(), " " * case.rng.randrange(50)
    path.write_text(case.rng.choice((filler + text, text + filler + old)))
    return text[:60]


@way(TEMPLATES, CALIBRATED)
def template_not_jinja(case: Case) -> str:
    return template(case, case.rng.choice(SYNTAX))


@way(TEMPLATES, CALIBRATED)
def template_refuses(case: Case) -> str:
    return template(case, case.rng.choice(REFUSING))


@way(TEMPLATES, CALIBRATED)
def template_without_end(case: Case) -> str:
    return template(case, case.rng.choice(ENDLESS))


@way(TEMPLATES, CALIBRATED)
def template_cut(case: Case) -> str:
    """The real template, cut within a tag."""
    path = case.source / "chat_template.jinja"
    text = path.read_text()
    starts = [i for i in range(len(text)) if text.startswith(("{%", "{{"), i)]
    at = case.rng.choice(starts)
    at += case.rng.randint(3, max(4, text.index("}", at) - at))
    path.write_text(text[:at])
    return f"cut at {at}"


@way(TEMPLATES, CALIBRATED)
def template_not_text(case: Case) -> str:
    path = case.source / "chat_template.jinja"
    raw = path.read_bytes()
    path.unlink()
    if case.rng.random() < 0.2:
        path.mkdir()
        return "a directory"
    at = case.rng.randrange(len(raw))
    path.write_bytes(raw[:at] + case.rng.choice((b"\xff\xfe", b"\xc3\x28", b"\x80")) + raw[at:])
    return f"no UTF-8 at {at}"


@way(PROCESSOR, CALIBRATED)
def processor_of_another_model(case: Case) -> str:
    """Patches that the tower of config.json cannot take, or sizes that are none."""
    key = case.rng.choice(("patch_size", "temporal_patch_size", "merge_size"))
    value = case.rng.choice([0, -1, 3, 7, "four", [4], {}, 10**9, 1.5, True])
    edit_json(case.source / "preprocessor_config.json", lambda p: p.__setitem__(key, value))
    return f"{key} = {value!r}"


@way(PROCESSOR, CALIBRATED)
def processor_missing(case: Case) -> str:
    (case.source / "preprocessor_config.json").unlink()
    return "no preprocessor_config.json, and a sample with a picture"
