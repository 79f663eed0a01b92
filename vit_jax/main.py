"""The train command: python -m vit_jax.main --config configs/X.py [--config.field=value]."""

import argparse
import ast
import contextlib
import os
import pathlib
import re
import shlex
import sys

from vit_jax.errors import UserError, run_command


def main(argv=None):
    """Runs the command with the arguments in `argv` (default: sys.argv)."""
    argv = sys.argv[1:] if argv is None else argv
    config, args = parse(argv)
    if args.target:  # no device of this machine takes part
        _describe(config, args)
        return
    import jax

    from vit_jax.config import flat
    from vit_jax.parallel import backend, processes
    from vit_jax.train import train

    if config.deterministic:
        backend.require_determinism()
    # All processes must agree on these before reading data. data.dir may differ between hosts.
    shared = {f"config.{name}": v for name, v in flat(config).items() if name != "data.dir"}
    shared |= {"NUM_PROCESSES": os.environ.get("NUM_PROCESSES"), "jax version": jax.__version__}
    with processes.joined():
        backend.start_backend()
        processes.check_same(shared)
        if args.dry_run:
            _describe(config, args)
            return
        command = shlex.join(["python", "-m", "vit_jax.main", *argv])
        train(config, args.workdir, command=command, profile_steps=args.profile_steps)
        if jax.process_index() == 0:
            for purpose, command in next_commands(config, args.config.stem, args.workdir).items():
                print(f"Next, {purpose}: {command}")


def make_parser():
    """Returns the parser of all arguments except --config.FIELD=VALUE."""
    parser = argparse.ArgumentParser(
        prog="vit-jax train",
        description="Train a Vision Transformer from a recipe and write the run to a workdir. "
        "Rerun the same command to resume from the newest checkpoint.",
        epilog="--config.FIELD=VALUE changes a field of the recipe, for example "
        "--config.batch_size=128 or --config.optim.warmup=5epochs; --help_config lists every "
        "field.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=pathlib.Path,
        metavar="RECIPE",
        nargs="?",
        const=False,  # --config without a value
        help="name of a shipped recipe, such as cifar10_vit, or path of a recipe file "
        "(default: a small ViT on synthetic images); without a value, list the shipped recipes and "
        "exit",
    )
    text = "directory for the run (default: workdirs/NAME_OF_RECIPE)"
    parser.add_argument("--workdir", type=pathlib.Path, help=text)
    text = "write a trace of these steps, such as 20-25, to WORKDIR/profile"
    parser.add_argument("--profile_steps", metavar="FIRST-LAST", help=text)
    text = "describe the run and exit: parameters, FLOP, steps, memory, and communication, from "
    text += "the compiled program; reads the data, writes no workdir"
    parser.add_argument("--dry_run", action="store_true", help=text)
    group = parser.add_argument_group("with --dry_run")
    text = "list every module: shapes, parameters, and forward FLOP for one image"
    group.add_argument("--layers", action="store_true", help=text)
    text = "compile for GPUs that this machine need not have, such as h100 or a100-80gbx8; needs "
    text += "the extra gpu-check"
    group.add_argument("--target", metavar="GPU", help=text)
    text = "find the largest batch that fits in the target's memory, and how to save memory"
    group.add_argument("--fit", action="store_true", help=text)
    text = "estimate the step's time by part and by kernel"
    group.add_argument("--kernels", action="store_true", help=text)
    text = "replace peak rates: bf16, tf32, f32 in TFLOP/s, bandwidth in GB/s, launch in us"
    group.add_argument("--rates", nargs="+", metavar="NAME=NUMBER", default=[], help=text)
    text = "HEIGHTxWIDTHxCHANNELSxCLASSES of images that are not read, such as 32x32x3x10"
    group.add_argument("--shape", help=text)
    text = "number of training images for --shape (default: 50000)"
    group.add_argument("--examples", type=int, default=50000, metavar="N", help=text)
    text = "list every field of a config and exit"
    parser.add_argument("--help_config", action="store_true", help=text)
    return parser


def parse(argv):
    """Returns the validated config and the parsed arguments of a command line.

    In the arguments, `config` is the path or name of the recipe, `workdir` is never None, and
    `profile_steps` is (first, last) or None. Raises UserError for invalid arguments.
    """
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)

    from vit_jax import config as config_lib  # slow to import: after --help

    if args.help_config or args.config is False:
        text = config_lib.field_help() if args.help_config else recipe_list(config_lib.CONFIGS)
        print(*text, sep="\n")
        sys.exit()
    args.config = args.config or pathlib.Path(config_lib.DEFAULT_RECIPE)
    config = config_lib.from_file(args.config)
    config_lib.override(config, rest, "--config, --workdir, --dry_run")
    only_dry_run = ("layers", "target", "fit", "kernels", "rates", "shape", "examples")
    used = [f"--{name}" for name in only_dry_run if getattr(args, name) != parser.get_default(name)]
    if used and not args.dry_run:
        raise UserError(f"{', '.join(used)}: use only with --dry_run")
    if "--examples" in used and not args.shape:
        raise UserError("--examples needs --shape, which replaces the data")
    if args.profile_steps and args.dry_run:
        raise UserError("--profile_steps cannot be used with --dry_run, which trains no steps")
    if args.profile_steps:
        if not re.fullmatch(r"\d{1,10}-\d{1,10}", args.profile_steps):
            raise UserError(f"--profile_steps {args.profile_steps}: use FIRST-LAST, such as 20-25")
        args.profile_steps = tuple(map(int, args.profile_steps.split("-")))
    args.workdir = args.workdir or pathlib.Path("workdirs") / args.config.stem
    return config, args


def recipe_list(folder):
    """Yields a line per recipe of a folder, the measured ones first, from their docstrings."""
    rows = []
    for path in folder.glob("*.py"):
        text = ""
        with contextlib.suppress(SyntaxError, ValueError):  # an unfinished recipe is listed too
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        measured = re.search(r"^Measured: (.+?)\.(?:\s|$)", text, re.M)
        result = measured[1] if measured else "not measured"
        rows.append((not measured, path.stem, text.partition("\n")[0].removesuffix("."), result))
    for _, name, purpose, result in sorted(rows):
        yield f"{name:20}  {purpose:52}  {result}"


def _describe(config, args):
    from vit_jax.commands.describe.describe import print_description

    print_description(config, args)


def next_commands(config, recipe, workdir):
    """Returns {purpose: shell command} for a finished run of a recipe, by the recipe's name."""
    from vit_jax.config import DEFAULT_RECIPE
    from vit_jax.seeds import RunWorkdir

    launcher = os.environ.get("VIT_JAX_LAUNCHER")  # set by launch.sh
    python = [launcher, "python"] if launcher else [sys.executable]
    first = RunWorkdir(workdir, config).folders[0]  # seeds share a report, not a checkpoint
    commands = {
        "evaluate": ("vit_jax", "evaluate", "--workdir", str(first)),
        "report": ("vit_jax", "report", "--workdir", str(workdir)),
    }
    if recipe == DEFAULT_RECIPE and config.data.name == "shapes10":
        commands["CIFAR-10"] = ("vit_jax.main", "--config", "cifar10_vit")
    return {name: shlex.join([*python, "-m", *command]) for name, command in commands.items()}


if __name__ == "__main__":
    run_command(main)
