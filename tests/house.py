"""The rules of the house: which room may import which, and how long a thing may be.

python -m tests.house
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Folders of the source tree, and what they are called when imported.
PACKAGES = {"pallas_kernels": "pallas_kernels", "v4jax": "v4jax", "train": "v4jax_train"}
# A room, and the rooms that it may import beside itself. The checks of arguments are everyone's.
KERNELS, MODEL, TEXT, DISK = "pallas_kernels", "v4jax.model", "v4jax.text", "v4jax.checkpoints"
LIBRARY = (KERNELS, "v4jax", MODEL, TEXT, DISK, "v4jax.decoding", "v4jax.adapters")
ROOMS: dict[str, tuple[str, ...]] = {
    KERNELS: (),
    TEXT: (),
    MODEL: (KERNELS,),
    "v4jax.decoding": (KERNELS, MODEL),
    DISK: (KERNELS, MODEL, TEXT),
    "v4jax.adapters": (KERNELS, MODEL, DISK),
    "v4jax.commands": LIBRARY,
    "v4jax": (*LIBRARY, "v4jax.commands"),
    "v4jax_train.data": (TEXT,),
    "v4jax_train": (*LIBRARY, "v4jax.commands", "v4jax_train.data"),
}
EVERYONES = "v4jax.arguments"
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, POSITIONAL = 400, 60, 6
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of the packages: its name when imported, its file and its syntax."""

    name: str
    file: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        """The narrowest room that has it."""
        inside = (room for room in ROOMS if self.name == room or self.name.startswith(room + "."))
        return max(inside, key=len)


def files(root: Path = ROOT) -> dict[str, Path]:
    """The files of the packages, by the names of their modules."""
    return {
        ".".join((package, *inside)).removesuffix(".__init__"): file
        for folder, package in PACKAGES.items()
        for file in sorted((root / folder).rglob("*.py"))
        for inside in [file.relative_to(root / folder).with_suffix("").parts]
    }


def modules(root: Path = ROOT) -> dict[str, Module]:
    """All modules of the packages, by name."""
    parse = lambda file: ast.parse(file.read_text("utf-8"))
    return {name: Module(name, file, parse(file)) for name, file in files(root).items()}


def imports(module: Module, known: dict[str, Module]) -> set[str]:
    """The modules of ours that a module imports, wherever in it."""
    names: set[str] = set()
    package = (
        module.name.split(".") if module.file.name == "__init__.py" else module.name.split(".")[:-1]
    )
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            inner = {f"{source}.{alias.name}" for alias in node.names}
            names |= {name if name in known else source for name in inner}
    return (names & known.keys()) - {module.name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [*graph[start]]
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        reach[start] = seen
    knots = {tuple(sorted(n for n in reach[m] if m in reach[n])) for m in reach if m in reach[m]}
    return sorted(list(knot) for knot in knots)


def trespasses(known: dict[str, Module]) -> list[str]:
    """Imports of rooms that a module's room may not import."""
    return [
        f"{module.name} imports {name}"
        for module in known.values()
        for name in sorted(imports(module, known))
        if name != EVERYONES and known[name].room not in (module.room, *ROOMS[module.room])
    ]


def functions(module: Module) -> Iterator[Function]:
    """All functions of a module, inner ones too."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def lines(node: Function) -> int:
    """Lines of code: a signature of many lines counts, a docstring does not."""
    first, total = node.body[0], (node.end_lineno or 0) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


def positional(node: Function) -> int:
    """Parameters that are given by place; a kernel's refs aside, and a method's object."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return sum(name not in ("self", "cls") and not name.endswith("_ref") for name in names)


def long_files(known: dict[str, Module]) -> list[str]:
    """Files of more lines than a file may have."""
    sizes = {m.name: len(m.file.read_text("utf-8").splitlines()) for m in known.values()}
    return [f"{name}: {size} lines" for name, size in sizes.items() if size > LINES_OF_A_FILE]


def long_functions(known: dict[str, Module]) -> list[str]:
    """Functions of more lines than a function may have."""
    return [
        f"{module.name}.{node.name}: {lines(node)} lines"
        for module in known.values()
        for node in functions(module)
        if lines(node) > LINES_OF_A_FUNCTION
    ]


def long_signatures(known: dict[str, Module]) -> list[str]:
    """Functions that take more by place than a reader can keep apart."""
    return [
        f"{module.name}.{node.name}: {positional(node)} positional parameters"
        for module in known.values()
        for node in functions(module)
        if positional(node) > POSITIONAL
    ]


def main() -> None:
    """Print the rooms, and what breaks a rule."""
    known = modules()
    graph = {name: imports(module, known) for name, module in known.items()}
    for room in ROOMS:
        inside = [module for module in known.values() if module.room == room]
        size = sum(len(module.file.read_text("utf-8").splitlines()) for module in inside)
        used = {known[name].room for module in inside for name in graph[module.name]} - {room}
        below = ", ".join(sorted(used)) or "none of ours"
        print(f"{room:18} {len(inside):3} files {size:6} lines; imports {below}")
    for title, wrong in {
        "imports across rooms": trespasses(known),
        "circles": [" <-> ".join(knot) for knot in circles(graph)],
        f"files over {LINES_OF_A_FILE} lines": long_files(known),
        f"functions over {LINES_OF_A_FUNCTION} lines": long_functions(known),
        f"signatures over {POSITIONAL}": long_signatures(known),
    }.items():
        print(f"{title}: {len(wrong) or 'none'}", *wrong, sep="\n  ")


if __name__ == "__main__":
    main()
