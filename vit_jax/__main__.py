"""python -m vit_jax COMMAND, and the console script vit-jax: lists the commands, runs one."""

import importlib
import sys

_COMMANDS = {
    "train": "vit_jax.main",
    "evaluate": "vit_jax.commands.evaluate",
    "predict": "vit_jax.commands.predict",
    "report": "vit_jax.commands.report",
    "demo": "vit_jax.commands.demo",
    "export": "vit_jax.commands.export",
    "sweep": "vit_jax.commands.sweep",
    "describe": "vit_jax.commands.describe",
    "benchmark": "vit_jax.commands.benchmark",
}


def main():
    """Runs the command that the first argument names; without one, lists all."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: vit-jax COMMAND [--help]\n")
        for name, module in _COMMANDS.items():
            doc = importlib.import_module(module).main.__doc__
            print(f"  {name:10} {doc.splitlines()[0]}")
        return
    if name not in _COMMANDS:
        print(f"error: unknown command {name}: use one of {', '.join(_COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    importlib.import_module(_COMMANDS[name]).main(arguments)


if __name__ == "__main__":
    main()
