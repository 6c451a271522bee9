"""PyPI's torchvision beside a CPU-only torch, made importable.

In: an interpreter's start (a .pth file calls `install`, so the processes that an engine starts are covered). Out: a
torchvision that imports. Leaves out: nms itself; nothing that vLLM's image processing uses calls it.

PyPI's wheel is built for CUDA, so its compiled part does not load beside a CPU torch, and `import torchvision` dies with
"operator torchvision::nms does not exist": it gives two operators a fake implementation without looking whether they
exist. Declaring them is enough. Where the compiled part loads, nothing is declared; until torchvision is imported, torch
is not touched either.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

TARGET = "torchvision.extension"  # the first that torchvision imports: it loads the compiled part
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[Any] = []  # an operator lives as long as the library that declared it


def declare_missing() -> None:
    """Declares those of the two operators that torch does not have."""
    import torch

    missing = [schema for schema in SCHEMAS if not hasattr(torch.ops.torchvision, schema.split("(")[0])]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in missing:
            library.define(schema)  # type: ignore[no-untyped-call]
        _libraries.append(library)


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        declare_missing()


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TARGET:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Watches for torchvision's import; a second call changes nothing."""
    if _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)
