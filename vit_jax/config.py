"""Every field of a run: its default, its meaning, its and its checks.

A recipe in configs/ starts from `defaults()` and states what differs. A duration is a number with
its unit in the name (`warmup_epochs`, `eval_every_steps`): each can be given in steps, epochs,
examples or percent of the run, 0 meaning "not given here"; giving two is an error.
"""

import ast
import difflib
import functools
import math
import pathlib
import runpy

from ml_collections import ConfigDict

from vit_jax import augment, model, optim
from vit_jax.errors import UserError

_PACKAGE = pathlib.Path(__file__).parent
# The shipped recipes are inside the package in a wheel, and next to it in a checkout.
CONFIGS = _PACKAGE / "configs"
if not CONFIGS.is_dir():
    CONFIGS = _PACKAGE.parent / "configs"
DEFAULT_RECIPE = "shapes10_vit"
UNITS = ("steps", "epochs", "examples", "percent")


def _duration(group, name, **given):
    for unit in UNITS:
        group[f"{name}_{unit}"] = given.get(unit, 0 if unit in ("steps", "examples") else 0.0)


def defaults():
    """The fields all recipes share, as a locked ConfigDict."""
    c = ConfigDict()
    c.seed = 0  # all randomness derives from (seed, step), data order from (seed, epoch)
    c.num_seeds = 1  # replicas trained in one program, with seeds seed, seed + 1, ...
    c.batch_size = 64  # global: over all devices and hosts
    c.accumulate_steps = 1  # parts that a batch is computed in, one after another, for memory
    c.eval_batch_size = 500
    c.epochs = 20.0
    c.steps = 0  # bounds the run instead of `epochs` when set
    c.init_from = ""  # weights to start from: whatever vit_jax.load_weights reads; empty: random
    c.tensorboard = True
    c.wandb = ""  # project of Weights & Biases that the run is sent to; empty: none
    _duration(c, "eval_every", epochs=1.0)  # on val_split
    _duration(c, "log_every", steps=50)
    _duration(c, "checkpoint_every", epochs=1.0)
    _duration(c, "keep_every")  # checkpoints kept for good, besides the newest two and the best
    _duration(c, "histograms_every")  # of the weights, for TensorBoard; 0: never
    c.on_save_error = "stop"  # stop | continue: a full disk and the like; the next save tries again
    c.on_bad_loss = "stop"  # stop | skip: a step of NaN or Inf, or of a spike; skip: no update
    c.spike_factor = 0.0  # a loss above so many times the epoch's mean is a spike; 0: none is

    c.data = ConfigDict()
    c.data.name = "cifar10"  # a TFDS set, or "folder:/path" with one folder a class
    c.data.dir = ""  # empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    c.data.train_split = "train"
    c.data.val_split = ""  # empty: none is held out
    c.data.test_split = "test"  # read once, at the end; empty: never, as in a sweep
    c.data.image_size = 0  # 0: as stored
    c.data.streaming = False  # reads images as it goes, for sets larger than memory
    c.data.streaming_threads = 16  # that decode, on each host
    c.data.on_bad_image = "stop"  # stop | skip: one that cannot be decoded; skip: leave it out
    c.data.mean = (0.5, 0.5, 0.5)  # of pixels in [0, 1]
    c.data.std = (0.5, 0.5, 0.5)

    c.model = ConfigDict()
    c.model.size = ""  # Ti, S, B or L; empty: the four fields below
    c.model.width = 256
    c.model.depth = 6
    c.model.num_heads = 8
    c.model.mlp_dim = 1024
    c.model.patch_size = 4
    c.model.pool = "cls"  # cls | gap
    c.model.posemb = "learned"  # learned | sincos2d
    c.model.stem = "patch"  # patch | conv
    c.model.weight_init = "trunc_normal"  # pytorch | trunc_normal | mimetic
    c.model.norm_eps = 1e-5
    c.model.qk_norm = False
    c.model.layer_scale = 0.0  # starting value; 0: off
    c.model.dropout = 0.0
    c.model.drop_path = 0.0  # at the last block, growing linearly with depth
    c.model.gelu = "exact"  # exact | tanh, the approximation that Google's .npz were trained with
    c.model.pre_logits = 0  # width of a tanh layer before the head; 0: none
    c.model.image_size = 0  # images are resized to this side on the device; 0: as they come
    c.model.remat = False  # computes each block's activations again instead of keeping them
    c.model.dtype = "float32"  # of activations: float32 | bfloat16; weights stay float32

    c.augment = ConfigDict()
    c.augment.crop = "none"  # none | pad | resized | decoded: resized, cut from the image as stored
    c.augment.crop_padding = 4
    c.augment.crop_padding_mode = "zero"  # zero | reflect
    c.augment.crop_scale = (0.08, 1.0)
    c.augment.crop_ratio = (3 / 4, 4 / 3)
    c.augment.flip = "none"  # none | random | alternating
    c.augment.policy = "none"  # none | randaugment | trivialaugment | autoaugment
    c.augment.randaugment_num_ops = 2
    c.augment.randaugment_magnitude = 9.0  # of 10
    c.augment.randaugment_magnitude_std = 0.0
    c.augment.color_jitter = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    c.augment.erasing_prob = 0.0
    c.augment.erasing_scale = (0.02, 1 / 3)
    c.augment.erasing_ratio = (0.3, 3.3)
    c.augment.erasing_mode = "zero"  # zero | noise
    c.augment.mixup_alpha = 0.0
    c.augment.cutmix_alpha = 0.0
    c.augment.mix_prob = 1.0
    c.augment.mix_switch_prob = 0.5  # of cutmix, where both are on
    c.augment.mix_per = "batch"  # batch | image
    _duration(c.augment, "mix_off_last")  # neither mixup nor cutmix in the last part of the run

    c.optim = ConfigDict()
    c.optim.name = "adamw"  # adamw | sgd | lion | muon
    c.optim.peak_lr = 1e-3
    c.optim.end_lr = 0.0
    c.optim.schedule = "cosine"  # constant | cosine | linear, after the warm-up
    c.optim.schedule_per = "step"  # step | epoch: when the rate changes
    _duration(c.optim, "warmup")
    c.optim.weight_decay = 0.05
    c.optim.decay = "kernels"  # kernels | all: what weight_decay applies to
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8
    c.optim.momentum = 0.9  # sgd
    c.optim.muon_lr = 0.02  # muon: peak rate of the hidden matrices; the rest is adamw at peak_lr
    c.optim.grad_clip_norm = 0.0  # 0: off
    c.optim.backbone_lr_factor = 1.0  # times the learning rate of all but the head
    c.optim.freeze = ""  # paths that stay as they are, as "pos_embed,block_[0-3]/*"; empty: none
    c.optim.label_smoothing = 0.0
    c.optim.ema_decay = 0.0  # 0: off; else evaluation uses the averaged weights

    c.mesh = ConfigDict()
    c.mesh.data = 0  # devices on the axis; 0: all that fsdp leaves
    c.mesh.fsdp = 1
    return c.lock()


def nearest(name, names):
    """' (did you mean X?)', or '' where nothing is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def field_names(config, prefix=""):
    """All dotted field names of a ConfigDict."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from field_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def in_steps(group, name, *, steps_per_epoch, batch_size, total_steps):
    """The duration `name` of a config group in steps; 0 when it is given in no unit.

    Raises UserError when it is given in two units, or is negative.
    """
    given = {unit: group[f"{name}_{unit}"] for unit in UNITS if group[f"{name}_{unit}"]}
    if len(given) > 1:
        names = " and ".join(f"{name}_{unit}={value:g}" for unit, value in given.items())
        raise UserError(f"{names} are both given: keep one and set the other to 0")
    for unit, value in given.items():
        if value < 0 or not math.isfinite(value):
            raise UserError(f"{name}_{unit} must be at least 0, got {value:g}")
        factor = {
            "steps": 1,
            "epochs": steps_per_epoch,
            "examples": 1 / batch_size,
            "percent": total_steps / 100,
        }[unit]
        return max(1, round(value * factor))
    return 0


def validate(config):
    """Raises UserError, one line, for a value outside what its field allows."""
    m, o = config.model, config.optim

    def one_of(name, value, allowed):
        if value not in allowed:
            known = ", ".join(a for a in allowed if a)
            hint = nearest(str(value), list(allowed))
            raise UserError(f"config.{name} must be one of {known}; got {value!r}{hint}")

    def at_least(name, value, least, below=math.inf):
        if not least <= value < below:
            upper = f" and below {below}" if below < math.inf else ""
            raise UserError(f"config.{name} must be at least {least}{upper}, got {value}")

    one_of("model.size", m.size, ("", *model.SIZES))
    one_of("model.pool", m.pool, model.POOLS)
    one_of("model.posemb", m.posemb, model.POSEMBS)
    one_of("model.stem", m.stem, model.STEMS)
    one_of("model.weight_init", m.weight_init, model.INITS)
    one_of("model.dtype", m.dtype, model.DTYPES)
    one_of("model.gelu", m.gelu, model.GELUS)
    one_of("on_save_error", config.on_save_error, ("stop", "continue"))
    one_of("on_bad_loss", config.on_bad_loss, ("stop", "skip"))
    one_of("data.on_bad_image", config.data.on_bad_image, ("stop", "skip"))
    one_of("optim.name", o.name, optim.OPTIMIZERS)
    one_of("optim.schedule", o.schedule, optim.SCHEDULES)
    one_of("optim.schedule_per", o.schedule_per, ("step", "epoch"))
    one_of("optim.decay", o.decay, optim.DECAYS)
    for name in ("batch_size", "accumulate_steps", "eval_batch_size", "num_seeds"):
        at_least(name, config[name], 1)
    at_least("data.streaming_threads", config.data.streaming_threads, 1)
    if config.data.streaming and config.num_seeds > 1:
        raise UserError("config.data.streaming trains one seed: set config.num_seeds=1")
    if config.augment.crop == "decoded" and not (config.data.streaming and config.data.image_size):
        raise UserError(
            "config.augment.crop=decoded needs config.data.streaming=true and a "
            "config.data.image_size, which it scales to"
        )
    if config.augment.crop == "decoded" and config.augment.flip == "alternating":
        raise UserError(
            "config.augment.flip=alternating knows an image by its stored pixels, which "
            "config.augment.crop=decoded replaces: use flip=random"
        )
    at_least("batch_size", config.batch_size, config.accumulate_steps)
    at_least("seed", config.seed, 0, below=2**31)
    at_least("steps", config.steps, 0)
    at_least("spike_factor", config.spike_factor, 0)
    at_least("mesh.data", config.mesh.data, 0)
    at_least("mesh.fsdp", config.mesh.fsdp, 1)
    if not config.steps and not 0 < config.epochs < math.inf:
        raise UserError(f"config.epochs must be above 0, got {config.epochs:g}")
    for name in ("width", "depth", "num_heads", "mlp_dim", "patch_size"):
        at_least(f"model.{name}", m[name], 1)
    for name in ("dropout", "drop_path"):
        at_least(f"model.{name}", m[name], 0, below=1)
    for name in ("layer_scale", "pre_logits", "image_size"):
        at_least(f"model.{name}", m[name], 0)
    if not m.norm_eps > 0:
        raise UserError(f"config.model.norm_eps must be above 0, got {m.norm_eps:g}")
    width, _, num_heads, _ = model.SIZES.get(m.size, (m.width, 0, m.num_heads, 0))
    if width % num_heads:
        raise UserError(
            f"config.model.num_heads={num_heads} does not divide config.model.width={width}"
        )
    if m.posemb == "sincos2d" and (width % 4 or width < 8):
        raise UserError(f"posemb=sincos2d needs a width that is a multiple of 4, got {width}")
    if m.stem == "conv" and (m.patch_size & (m.patch_size - 1) or m.patch_size < 2):
        raise UserError(f"stem=conv needs a patch_size that is a power of 2, got {m.patch_size}")
    for name in ("peak_lr", "end_lr", "muon_lr", "weight_decay", "grad_clip_norm"):
        at_least(f"optim.{name}", o[name], 0)
    at_least("optim.backbone_lr_factor", o.backbone_lr_factor, 0)
    for name in ("b1", "b2", "momentum", "label_smoothing", "ema_decay"):
        at_least(f"optim.{name}", o[name], 0, below=1)
    if not o.eps > 0:
        raise UserError(f"config.optim.eps must be above 0, got {o.eps:g}")
    if not config.data.train_split or not (config.data.val_split or config.data.test_split):
        raise UserError("config.data needs a train_split, and a test_split or a val_split")
    if len(config.data.mean) != len(config.data.std) or min(config.data.std) <= 0:
        raise UserError(
            f"config.data.mean {config.data.mean} and std {config.data.std} must have one entry "
            "a channel, std above 0"
        )
    augment.validate(config.augment, batch_size=config.batch_size)
    # A bad duration is told before any data is read; the counts do not matter for that.
    every = ("eval_every", "log_every", "checkpoint_every", "keep_every", "histograms_every")
    groups = dict.fromkeys(every, config)
    for name, group in (groups | {"warmup": o, "mix_off_last": config.augment}).items():
        in_steps(group, name, steps_per_epoch=1, batch_size=1, total_steps=1)


def recipe_path(name):
    """Returns the path of a recipe. `name` is a file's path or a shipped recipe's name.

    Raises UserError if there is neither; its line names the nearest recipe and lists all.
    """
    path = pathlib.Path(name).expanduser()
    shipped = {p.stem: p for p in sorted(CONFIGS.glob("*.py"))}
    if str(name) in shipped and not path.is_file():
        return shipped[str(name)]
    if path.is_dir() or not path.exists():
        problem = "is a directory" if path.is_dir() else "does not exist"
        raise UserError(
            f"the config file {name} {problem}{nearest(path.stem, shipped)}: pass the path of a "
            f"Python file, or one of {', '.join(shipped)}"
        )
    return path


def from_file(path):
    """The ConfigDict of a recipe: what `get_config()` in that Python file returns.

    `path` may also be the name of a shipped recipe. The file is executed. Raises UserError when it
    does not exist, has no get_config, or sets a field that does not exist or to a value of another
    type.
    """
    path = recipe_path(path)
    try:
        namespace = runpy.run_path(str(path))
        config = namespace["get_config"]()
    except UserError:
        raise
    except KeyError as e:
        raise UserError(f"the config file {path} fails: no field or function {e}") from e
    except Exception as e:  # a recipe is a program: anything can go wrong in it
        raise UserError(f"the config file {path} fails: {type(e).__name__}: {e}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, not {type(config)}")
    return from_dict(config.to_dict())


def from_dict(values):
    """The ConfigDict of `config.to_dict()`, or of the JSON of that (lists become tuples).

    Raises UserError for a field that this version lacks or a value of another type.
    """
    config = defaults()

    def update(values, prefix=""):
        for name, value in values.items():
            if isinstance(value, dict):
                update(value, f"{prefix}{name}.")
            else:
                set_field(config, prefix + name, value)

    if not isinstance(values, dict):
        raise UserError(f"a config is an object of fields, got {type(values).__name__}")
    update(values)
    return config


def set_field(config, name, value):
    """Sets the field of a dotted name to a value, or to what a text from the command line says.

    Raises UserError for an unknown field (the nearest name told), a group, or a value that is not
    of the field's type.
    """
    names = list(field_names(config))
    if name not in names:
        raise UserError(f"unknown config field {name}{nearest(name, names)}")
    *groups, field = name.split(".")
    group = functools.reduce(lambda c, part: c[part], groups, config)
    try:
        group[field] = _as_type_of(group[field], value)
    except (
        *(TypeError, ValueError, KeyError, SyntaxError, OverflowError),
        *(RecursionError, MemoryError),  # of ast, for brackets thousands deep
    ):
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        expected = kind.get(type(group[field]), "numbers in brackets, as (0.5, 0.5)")
        shown = repr(value) if len(repr(value)) < 100 else f"{repr(value)[:100]}..."
        raise UserError(f"config.{name} takes {expected}, got {shown}") from None


def override(config, arguments, flags):
    """Sets what a command line's arguments say: --config.FIELD=VALUE or --config.FIELD VALUE.

    Raises UserError for any other argument; its line names the command's own `flags`.
    """
    arguments = list(arguments)
    while arguments:
        name, equals, value = arguments.pop(0).partition("=")
        if not name.startswith("--config."):
            raise UserError(f"unknown argument {name}: use {flags} or --config.FIELD=VALUE")
        if not equals:
            if not arguments:
                raise UserError(f"{name} needs a value: {name}=VALUE")
            value = arguments.pop(0)
        set_field(config, name.removeprefix("--config."), value)
    validate(config)


def _as_type_of(old, value):
    if isinstance(old, tuple):
        value = ast.literal_eval(value) if isinstance(value, str) else value
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if not value or not all(isinstance(v, (int, float)) for v in value):
            raise ValueError
        return tuple(float(v) for v in value)
    if isinstance(old, bool):
        return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
    if isinstance(old, str):
        if not isinstance(value, str):
            raise TypeError
        return value
    if isinstance(value, bool) or (isinstance(old, int) and isinstance(value, float)):
        raise TypeError
    return type(old)(value)


def difference(ours, theirs, *, ignore=()):
    """'field: a, was b' for every dotted field on which two configs differ, as a list."""
    names = dict.fromkeys([*field_names(ours), *field_names(theirs)])
    values = ((n, get_field(ours, n), get_field(theirs, n)) for n in names if n not in ignore)
    return [f"{name}: {a!r}, was {b!r}" for name, a, b in values if a != b]


def get_field(config, name):
    """The value of a dotted name; None where there is no such field."""
    for part in name.split("."):
        config = config.get(part) if config is not None else None
    return config
