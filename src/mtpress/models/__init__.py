"""Model families. A folder is looked up by config.json's model_type; adding a family is adding a folder here."""

import importlib
from types import ModuleType

from mtpress.errors import InputError

FAMILIES = {"qwen3_5": "qwen3_5", "qwen3_5_text": "qwen3_5"}


def family(model_type: str) -> ModuleType:
    """The module that knows the tensors of a model_type; InputError for one that mtpress does not make."""
    if model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"config.json: model_type {model_type[:60]!r} is not supported; mtpress knows {known} (Qwen3.5, 3.6, 3.8 dense)")
    return importlib.import_module(f"mtpress.models.{FAMILIES[model_type]}.names")
