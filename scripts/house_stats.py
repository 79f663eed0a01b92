"""Prints counts that describe the structure of the package: python scripts/house_stats.py [ROOT].

One table row per count. ROOT is a checkout (default: this one).
"""

import ast
import pathlib
import sys


def functions(trees):
    """Yields (lines, file, name) of every function."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node.end_lineno - node.lineno + 1, path.name, node.name


def place(path, package):
    """Returns the root module or package that a file belongs to."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports(trees, package):
    """Returns the pairs (place, imported place) of different places."""
    pairs = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vit_jax"):
                _, _, rest = node.module.partition(".")
                names = [rest.split(".")[0]] if rest else [alias.name for alias in node.names]
                pairs |= {(place(path, package), name) for name in names}
    return {(a, b) for a, b in pairs if a != b}


def main():
    """Prints the counts."""
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parents[1])
    package = root / "vit_jax"
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    lengths = sorted(functions(trees), reverse=True)
    lines, file, name = lengths[0]
    rows = {
        "Python files in the package's root": len(list(package.glob("*.py"))),
        "root modules and packages": len({place(path, package) for path in texts}),
        "longest function, lines": f"{lines} (`{name}`, {file})",
        "functions over 60 lines": sum(n > 60 for n, *_ in lengths),
        "functions over 40 lines": sum(n > 40 for n, *_ in lengths),
        "files that name `num_seeds`": sum("num_seeds" in text for text in texts.values()),
        "imports between root modules and packages": len(imports(trees, package)),
        "lines of Python in vit_jax/": sum(len(text.splitlines()) for text in texts.values()),
    }
    for label, value in rows.items():
        print(f"| {label} | {value} |")


if __name__ == "__main__":
    main()
