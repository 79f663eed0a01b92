"""python -m vit_jax COMMAND, and the console script vit-jax: lists the commands or runs one."""

import argparse
import importlib
import re
import sys

from vit_jax.errors import UserError, run_command

COMMANDS = {
    "train": ("vit_jax.main", "train a Vision Transformer from a recipe"),
    "evaluate": ("vit_jax.commands.evaluate", "evaluate a run on a split or an image folder"),
    "predict": ("vit_jax.commands.predict", "classify image files"),
    "probe": ("vit_jax.commands.probe", "fit simple classifiers to a run's frozen features"),
    "report": ("vit_jax.commands.report", "write an HTML report of a run"),
    "demo": ("vit_jax.commands.demo", "serve a local page to try a model"),
    "export": ("vit_jax.commands.export", "write a run's weights for other libraries"),
    "sweep": ("vit_jax.commands.sweep", "search values of config fields and tabulate the runs"),
    "describe": ("vit_jax.main", "describe a run without training", "--dry_run"),
    "benchmark": ("vit_jax.commands.benchmark.measure", "measure training throughput and memory"),
    "completion": ("vit_jax.__main__", "print a script for completion in bash and zsh"),
}
_COMPLETION = """\
# zsh runs the functions of bash.
[ -z "$ZSH_VERSION" ] || { autoload -U compinit bashcompinit && compinit && bashcompinit; }
_vit_jax() {
    local words=
    case $COMP_CWORD:${COMP_WORDS[1]}:$3 in
    1:*) words="COMMANDS" ;;
    *:train:--config | *:describe:--config) words="RECIPES" ;;
    *:train:* | *:describe:*) [[ $2 == -* ]] && words="OPTIONS" ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$2"))
}
complete -o default -F _vit_jax vit-jax  # files, if nothing matches\
"""


def main():
    """Runs the command named by the first argument, or lists all commands."""
    run_command(_main, sys.argv[1:])


def _main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: vit-jax COMMAND ...\n\ncommands (vit-jax COMMAND --help explains each):")
        for name, (_, help_text, *_) in COMMANDS.items():
            print(f"  {name:11} {help_text}")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}: use one of {', '.join(COMMANDS)}")
    if name == "completion":
        _print_completion(rest)
        return
    module, _, *first = COMMANDS[name]
    importlib.import_module(module).main([*first, *rest])


def _print_completion(arguments):
    from vit_jax import config, main

    text = "Print a script for bash and zsh that completes commands, and the options, recipes, and "
    text += "config fields of train. To load it: source <(vit-jax completion)"
    argparse.ArgumentParser(prog="vit-jax completion", description=text).parse_args(arguments)
    options = re.findall(r"--\w+", main.make_parser().format_usage())
    script = _COMPLETION.replace("COMMANDS", " ".join(COMMANDS))
    script = script.replace("RECIPES", " ".join(p.stem for p in config.CONFIGS.glob("*.py")))
    fields = [f"--config.{name}" for name in config.FIELDS]
    print(script.replace("OPTIONS", " ".join([*options, *fields])))


if __name__ == "__main__":
    main()
