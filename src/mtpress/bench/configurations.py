"""What a benchmark compares: checkpoints with MTP off and on, or servers that are running; and what ratios are to.

In: models and numbers of drafted tokens, or addresses. Out: `Configuration`s in the order in which they are shown. Leaves out: how
they are started (engine/launch/launch.py).
"""

from collections.abc import Sequence

from mtpress.api_key import without_login
from mtpress.bench.prompt_mix import NO_ACCEPTANCE
from mtpress.bench.result import Configuration
from mtpress.engine.memory.served_model import ServedModel
from mtpress.engine.server.client import Client
from mtpress.errors import EngineError, InputError


def configurations_of(models: Sequence[ServedModel], mtp: Sequence[int]) -> tuple[Configuration, ...]:
    """Each checkpoint with each number of drafted tokens; one without a draft head only with MTP off."""
    names = [model.name for model in models]
    builds = [
        name if names.count(name) == 1 else f"{model.path.resolve().parent.name}/{name}" for name, model in zip(names, models, strict=True)
    ]
    if len(set(builds)) < len(builds):
        raise InputError(f"{', '.join(sorted(b for b in set(builds) if builds.count(b) > 1))} is named twice")
    found = []
    for number, (build, model) in enumerate(zip(builds, models, strict=True)):
        for drafted in dict.fromkeys(mtp):
            if drafted and not model.num_mtp_layers:
                continue
            words = "MTP off" if not drafted else f"MTP n={drafted}"
            found.append(Configuration(words if len(builds) == 1 else f"{build}, {words}", build, drafted, checkpoint=number))
    if len({one.checkpoint for one in found}) < len(models):
        raise InputError("a checkpoint without a draft head can only be measured with MTP off; add off to --mtp")
    return tuple(found)


def running(urls: Sequence[str], model: str | None, api_key: str | None) -> tuple[Configuration, ...]:
    """A configuration for each server, by its model's name; InputError or EngineError where one does not answer."""
    found = []
    for url in urls:
        with Client(url, api_key) as client:
            served = client.models()
            drafted = _drafted_by(client)
        shown = without_login(url)
        if model is not None and model not in served:
            raise InputError(f"{shown} does not serve {model}; it has {', '.join(served) or 'no model'}")
        if not served:
            raise InputError(f"{shown} serves no model")
        name = model or served[0]
        found.append(Configuration(name if len(urls) == 1 else f"{name} at {shown}", name, drafted, url=shown))
    return tuple(found)


def _drafted_by(client: Client) -> int | None:
    """The number of tokens that a running vLLM drafts, 0 for none; None of another server."""
    try:
        counted = client.metrics().spec_decode
    except EngineError:
        return None
    return len(counted.accepted_per_position) if counted is not None else 0


def refuse_random(configurations: Sequence[Configuration]) -> None:
    if any(configuration.url for configuration in configurations):
        raise InputError("--prompts random needs the checkpoint's tokenizer and MTP off, so it is not for --url; use the shipped mix")
    if any(configuration.num_speculative_tokens for configuration in configurations):
        raise InputError(f"--prompts random with MTP on: {NO_ACCEPTANCE}, and the speed follows from it; use the shipped mix, or --mtp off")


def baseline_of(named: str | None, configurations: Sequence[Configuration]) -> int:
    """The number of the configuration that `named` is the label or the number (from 1) of; the first without a name."""
    if named is None:
        return 0
    labels = [configuration.label for configuration in configurations]
    folded = [label.casefold() for label in labels]
    if named.casefold() in folded:
        return folded.index(named.casefold())
    if named.isdigit() and 1 <= int(named) <= len(labels):
        return int(named) - 1
    listed = "; ".join(f"{number} {label}" for number, label in enumerate(labels, 1))
    raise InputError(f"--baseline {named}: is none of {listed}")
