"""python -m vit_jax COMMAND, and the console script vit-jax: lists the commands or runs one."""

import importlib
import sys

from vit_jax.errors import UserError, run_command

COMMANDS = {
    "train": ("vit_jax.main", "train a Vision Transformer from a recipe"),
    "evaluate": ("vit_jax.commands.evaluate", "evaluate a run on a split or an image folder"),
    "predict": ("vit_jax.commands.predict", "classify image files"),
    "report": ("vit_jax.commands.report", "write an HTML report of a run"),
    "demo": ("vit_jax.commands.demo", "serve a local page to try a model"),
    "export": ("vit_jax.commands.export", "write a run's weights for other libraries"),
    "sweep": ("vit_jax.commands.sweep", "train a grid of runs and tabulate them"),
    "describe": ("vit_jax.main", "describe a run without training", "--dry_run"),
    "benchmark": ("vit_jax.commands.benchmark.measure", "measure training throughput and memory"),
}


def main():
    """Runs the command named by the first argument, or lists all commands."""
    run_command(_main, sys.argv[1:])


def _main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: vit-jax COMMAND ...\n\ncommands (vit-jax COMMAND --help explains each):")
        for name, (_, help_text, *_) in COMMANDS.items():
            print(f"  {name:10} {help_text}")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}: use one of {', '.join(COMMANDS)}")
    module, _, *first = COMMANDS[name]
    importlib.import_module(module).main([*first, *rest])


if __name__ == "__main__":
    main()
