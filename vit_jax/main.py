"""The command that trains: python -m vit_jax.main --config configs/X.py [--config.field=value]."""

import argparse
import os
import pathlib
import shlex
import sys

from vit_jax.errors import UserError, run_command

_PACKAGE = pathlib.Path(__file__).parent
# configs/ stands beside the package in a checkout and inside it in a wheel.
_CONFIGS = next(d for d in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if d.is_dir())
_DEFAULT = _CONFIGS / "shapes10_vit.py"


def parse(argv):
    """(config, arguments) of a command line: config, workdir (never None) and dry_run.

    Raises UserError for a wrong one.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.main",
        description="Trains a Vision Transformer by a recipe and writes the run to a workdir; "
        "started again, it continues from the newest checkpoint there.",
        epilog="--config.FIELD=VALUE changes a field of the recipe, as --config.batch_size=128 or "
        "--config.model.depth=4; vit_jax/config.py explains every field.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=pathlib.Path, default=_DEFAULT, help="a recipe's file")
    parser.add_argument("--workdir", type=pathlib.Path, help="default: workdirs/NAME_OF_RECIPE")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="explain the run and stop: parameters, FLOP, steps, memory and communication, from "
        "the compiled program; reads the data, writes no workdir",
    )
    args, rest = parser.parse_known_args(argv)

    from vit_jax import config as config_lib  # imports jax: after --help and a bad command line

    config = config_lib.from_file(args.config)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(
                f"unknown argument {name}: use --config, --workdir, --dry_run or "
                "--config.FIELD=VALUE"
            )
        if not equals:
            if not rest:
                raise UserError(f"{name} needs a value: {name}=VALUE")
            value = rest.pop(0)
        config_lib.set_field(config, name.removeprefix("--config."), value)
    config_lib.validate(config)
    args.workdir = args.workdir or pathlib.Path("workdirs") / args.config.stem
    return config, args


def compared(config):
    """{dotted name: value} of the fields that all processes of a run must share."""
    from vit_jax.config import field_names, get_field

    own = ("data.dir", "tensorboard")  # what may differ from host to host
    return {f"config.{n}": get_field(config, n) for n in field_names(config) if n not in own}


def main():
    """The console script `vit-jax`, and `python -m vit_jax.main`."""
    run_command(_main)


def _main():
    config, args = parse(sys.argv[1:])
    import jax

    # Compiled programs are kept from run to run: the second start of a recipe is much shorter.
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(cache) / "vit_jax" / "xla"))
    from vit_jax import distributed

    with distributed.joined(compared(config)) as peers:
        _run(config, args, peers)
    if args.config == _DEFAULT and (not peers or peers.process == 0):
        print("Next, CIFAR-10: ./launch.sh python -m vit_jax.main --config configs/cifar10_vit.py")


def _run(config, args, peers):
    if args.dry_run:
        from vit_jax.explain import explain
        from vit_jax.run import setup

        lines = explain(setup(config), args.workdir)
        if not peers or peers.process == 0:
            print(*lines, sep="\n")
        return
    from vit_jax.train import train

    command = shlex.join(["python", "-m", "vit_jax.main", *sys.argv[1:]])
    train(config, args.workdir, command=command, peers=peers)


if __name__ == "__main__":
    main()
