"""Learning-rate schedule, weight-decay mask and gradient transformation, all of optax."""

import jax
import optax

OPTIMIZERS = ("adamw", "sgd", "lion", "muon")
SCHEDULES = ("constant", "cosine", "linear")
DECAYS = ("kernels", "all")


def make_schedule(o, *, total_steps, steps_per_epoch, warmup_steps, peak_lr=None):
    """The learning rate as a function of the step, float32[].

    A linear warm-up over `warmup_steps`, then constant, cosine or linear from `peak_lr` to
    `end_lr` at `total_steps`. With `schedule_per = "epoch"` the part after the warm-up changes
    only at the start of an epoch, as a torch scheduler stepped once an epoch does.
    """
    peak = o.peak_lr if peak_lr is None else peak_lr
    steps = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, steps, alpha=o.end_lr / peak if peak else 0.0),
        "linear": optax.linear_schedule(peak, o.end_lr, steps),
    }[o.schedule]
    if o.schedule_per == "epoch":
        per_step, after = after, lambda step: per_step(step // steps_per_epoch * steps_per_epoch)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def decay_mask(decay, params):
    """A tree of bools: what weight decay applies to.

    "all" is every parameter, as torch.optim.AdamW does by default; "kernels" leaves out biases,
    norms, layer scales, and the position and class embeddings.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay == "all" or path[-1].key == "kernel", params
    )


def _muon_labels(params):
    """ "muon" for the hidden matrices, those inside the blocks; "adamw" for all else."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: "muon" if path[0].key.startswith("block_") and p.ndim == 2 else "adamw",
        params,
    )


def make_optimizer(o, schedule, *, muon_schedule=None):
    """optax.GradientTransformation from the `optim` group of a config.

    Weight decay is decoupled and multiplied by the learning rate in all but sgd, where it is
    added to the gradient; both are torch's conventions.
    """

    def mask(params):
        return decay_mask(o.decay, params)

    adamw = optax.adamw(schedule, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=mask)
    if o.name == "adamw":
        steps = [adamw]
    elif o.name == "lion":
        steps = [optax.lion(schedule, o.b1, o.b2, weight_decay=o.weight_decay, mask=mask)]
    elif o.name == "sgd":
        steps = [
            optax.add_decayed_weights(o.weight_decay, mask),
            optax.sgd(schedule, o.momentum or None),
        ]
    else:  # github.com/KellerJordan/Muon
        muon = optax.contrib.muon(muon_schedule, weight_decay=o.weight_decay)
        steps = [optax.multi_transform({"muon": muon, "adamw": adamw}, _muon_labels)]
    if o.grad_clip_norm:
        steps.insert(0, optax.clip_by_global_norm(o.grad_clip_norm))
    return optax.chain(*steps)
