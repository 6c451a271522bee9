"""How the package hangs together, in figures: rooms, the arrows between them, circles, floors.

    python tests/structure.py [SRC]        of src/mtpress here, or of another checkout

A room is a folder, or a module that stands at the top. An arrow is a pair of rooms of which one imports from the other, also where
the import stands inside a function; an import under TYPE_CHECKING is none. A circle is a set of rooms that all reach one another.
A floor is a step of the longest way down.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "mtpress"
Arrows = dict[str, set[str]]


def modules(source: Path) -> dict[str, Path]:
    """Dotted name → file, packages by their own name."""
    files = {file.relative_to(source.parent): file for file in source.rglob("*.py")}
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): file for path, file in files.items()}


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


def file_arrows(source: Path) -> Arrows:
    known = modules(source)
    return {name: set(imported(file, known)) - {name, PACKAGE} for name, file in known.items()}


def room(name: str, source: Path) -> str:
    """The folder that a module stands in; for a package, that package; a module at the top is a room of its own."""
    parts = name.split(".")[1:]
    while parts and not source.joinpath(*parts).is_dir():
        if len(parts) == 1:
            return parts[0]
        parts.pop()
    return ".".join(parts) or PACKAGE


def room_arrows(source: Path) -> Arrows:
    arrows: Arrows = {}
    for name, targets in file_arrows(source).items():
        start = room(name, source)
        arrows.setdefault(start, set()).update(end for target in targets if (end := room(target, source)) != start)
    return arrows


def circles(arrows: Arrows) -> list[set[str]]:
    """Sets of more than one that all reach one another."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for end in arrows.get(waiting.pop(), ()):
                if end not in seen:
                    seen.add(end)
                    waiting.append(end)
        return seen

    reach = {name: reached(name) for name in arrows}
    sets = {frozenset({name} | {end for end in ends if name in reach.get(end, ())}) for name, ends in reach.items()}
    return sorted((set(found) for found in sets if len(found) > 1), key=len, reverse=True)


def floors(arrows: Arrows) -> int:
    """Rooms on the longest way down; those of one circle count as one."""
    of = {name: min(circle) for circle in circles(arrows) for name in circle}
    whole: Arrows = {}
    for start, ends in arrows.items():
        first = of.get(start, start)
        whole.setdefault(first, set()).update(of.get(end, end) for end in ends)
    depth: dict[str, int] = {}

    def down(name: str) -> int:
        if name not in depth:
            depth[name] = 1 + max((down(end) for end in whole.get(name, ()) if end != name), default=0)
        return depth[name]

    return max(map(down, whole))


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / PACKAGE).resolve()
    files, rooms = file_arrows(source), room_arrows(source)
    top = [name for name in files if name.count(".") == 1 and not source.joinpath(name.split(".")[1]).is_dir()]
    folders = {name for name in rooms if source.joinpath(*name.split(".")).is_dir()}
    between = sum(len(ends) for ends in rooms.values())
    print(f"{len(files)} files, {len(folders)} folders, {len(top)} modules at the top")
    print(f"{len(rooms)} rooms, {between} arrows between them, {floors(rooms)} floors")
    for title, arrows in (("files", files), ("rooms", rooms)):
        found = circles(arrows)
        print(f"circles of {title}: {len(found)}")
        for circle in found:
            print("   " + ", ".join(sorted(circle)))


if __name__ == "__main__":
    main()
