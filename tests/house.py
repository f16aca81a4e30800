"""Rules of the source code: which layer may import which, and size limits.

python -m tests.house
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Folders of the source tree and their import names.
PACKAGES = {
    "pallas_kernels": "pallas_kernels",
    "v4jax": "v4jax",
    "serve": "v4jax_serve",
    "train": "v4jax_train",
}
# Layers, and the other layers that each may import. All may import `SHARED`.
KERNELS, MODEL, TEXT, DISK = "pallas_kernels", "v4jax.model", "v4jax.text", "v4jax.checkpoints"
DECODING, ENGINE, LAUNCH = "v4jax.decoding", "v4jax.engine", "v4jax.launch"
LIBRARY = (KERNELS, "v4jax", MODEL, TEXT, DISK, DECODING, ENGINE, "v4jax.adapters")
PODS = "v4jax.pods"
LAYERS: dict[str, tuple[str, ...]] = {
    KERNELS: (),
    TEXT: (),
    MODEL: (KERNELS,),
    DECODING: (KERNELS, MODEL),
    ENGINE: (MODEL, TEXT, DECODING),
    DISK: (KERNELS, MODEL, TEXT),
    "v4jax.adapters": (KERNELS, MODEL, DISK),
    LAUNCH: (TEXT,),
    PODS: (KERNELS, "v4jax", MODEL),
    "v4jax.commands": (*LIBRARY, LAUNCH, PODS),
    "v4jax": (*LIBRARY, LAUNCH, "v4jax.commands"),
    "v4jax_serve": ("v4jax", MODEL, TEXT, DECODING, ENGINE, "v4jax.commands"),
    "v4jax_train.data": (TEXT,),
    "v4jax_train": (*LIBRARY, PODS, "v4jax.commands", "v4jax_train.data"),
}
SHARED = ("v4jax.arguments", "v4jax.waiting")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_POSITIONAL = 400, 60, 6
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of the packages: its import name, file and syntax tree."""

    name: str
    file: Path
    tree: ast.Module

    @property
    def layer(self) -> str:
        """The innermost layer that contains it."""
        around = (name for name in LAYERS if f"{self.name}.".startswith(f"{name}."))
        return max(around, key=len)


def files(root: Path = ROOT) -> dict[str, Path]:
    """Files of the packages by module name."""
    return {
        ".".join((package, *inside)).removesuffix(".__init__"): file
        for folder, package in PACKAGES.items()
        for file in sorted((root / folder).rglob("*.py"))
        for inside in [file.relative_to(root / folder).with_suffix("").parts]
    }


def modules(root: Path = ROOT) -> dict[str, Module]:
    """Modules of the packages by name."""
    parse = lambda file: ast.parse(file.read_text("utf-8"))
    return {name: Module(name, file, parse(file)) for name, file in files(root).items()}


def imports(module: Module, known: dict[str, Module]) -> set[str]:
    """Our modules that a module imports, at top level or inside functions."""
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


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or indirectly."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        visited, todo = set(), [*graph[start]]
        while todo:
            if (name := todo.pop()) not in visited:
                visited.add(name)
                todo += graph[name]
        reach[start] = visited
    cycles = {tuple(sorted(n for n in reach[m] if m in reach[n])) for m in reach if m in reach[m]}
    return sorted(list(cycle) for cycle in cycles)


def forbidden_imports(known: dict[str, Module]) -> list[str]:
    """Imports from layers that a module's layer may not import."""
    return [
        f"{module.name} imports {name}"
        for module in known.values()
        for name in sorted(imports(module, known))
        if name not in SHARED and known[name].layer not in (module.layer, *LAYERS[module.layer])
    ]


def functions(module: Module) -> Iterator[Function]:
    """All functions of a module, including nested ones."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def lines(node: Function) -> int:
    """Lines of a function, signature included, docstring excluded."""
    first, total = node.body[0], (node.end_lineno or 0) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        total -= (first.end_lineno or 0) - first.lineno + 1
    return total


def positional(node: Function) -> int:
    """Number of positional parameters, not counting `self`, `cls` and refs of kernels."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    return sum(name not in ("self", "cls") and not name.endswith("_ref") for name in names)


def long_files(known: dict[str, Module]) -> list[str]:
    """Files with too many lines."""
    sizes = {m.name: len(m.file.read_text("utf-8").splitlines()) for m in known.values()}
    return [f"{name}: {size} lines" for name, size in sizes.items() if size > MAX_FILE_LINES]


def long_functions(known: dict[str, Module]) -> list[str]:
    """Functions with too many lines."""
    return [
        f"{module.name}.{node.name}: {lines(node)} lines"
        for module in known.values()
        for node in functions(module)
        if lines(node) > MAX_FUNCTION_LINES
    ]


def long_signatures(known: dict[str, Module]) -> list[str]:
    """Functions with too many positional parameters."""
    return [
        f"{module.name}.{node.name}: {positional(node)} positional parameters"
        for module in known.values()
        for node in functions(module)
        if positional(node) > MAX_POSITIONAL
    ]


def main() -> None:
    """Print the layers and any violations of the rules."""
    known = modules()
    graph = {name: imports(module, known) for name, module in known.items()}
    for layer in LAYERS:
        inside = [module for module in known.values() if module.layer == layer]
        size = sum(len(module.file.read_text("utf-8").splitlines()) for module in inside)
        used = {known[name].layer for module in inside for name in graph[module.name]} - {layer}
        below = ", ".join(sorted(used)) or "no other layer"
        print(f"{layer:18} {len(inside):3} files {size:6} lines; imports {below}")
    for title, violations in {
        "forbidden imports": forbidden_imports(known),
        "import cycles": [" <-> ".join(cycle) for cycle in import_cycles(graph)],
        f"files over {MAX_FILE_LINES} lines": long_files(known),
        f"functions over {MAX_FUNCTION_LINES} lines": long_functions(known),
        f"positional parameters over {MAX_POSITIONAL}": long_signatures(known),
    }.items():
        print(f"{title}: {len(violations) or 'none'}", *violations, sep="\n  ")


if __name__ == "__main__":
    main()
