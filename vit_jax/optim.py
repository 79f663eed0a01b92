"""Learning-rate schedule, weight-decay mask, and gradient transformation, built from optax."""

import functools

import jax
import jax.numpy as jnp
import optax

from vit_jax.parallel import mesh as mesh_lib


def make_schedule(o, *, total_steps, steps_per_epoch, warmup_steps, peak_lr=None):
    """Builds the learning rate as a function of the step, float32[], from the `optim` group.

    After a linear warmup, the learning rate stays at the peak (default: `o.peak_lr`), or decays
    from it to `o.end_lr` at `total_steps` (cosine or linear). With `schedule_per = "epoch"`, the
    part after the warmup changes only at the start of an epoch, like a torch scheduler stepped once
    per epoch.
    """
    peak = o.peak_lr if peak_lr is None else peak_lr
    steps = max(total_steps - warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, steps, alpha=o.end_lr / peak if peak else 0.0),
        "linear": optax.linear_schedule(peak, o.end_lr, steps),
    }[o.schedule]
    if o.schedule_per == "epoch":
        per_step = after

        def after(step):  # steps count from the end of the warmup, epochs from the start of the run
            epoch_start = (step + warmup_steps) // steps_per_epoch * steps_per_epoch
            return per_step(jnp.maximum(epoch_start - warmup_steps, 0))

    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def decay_mask(decay, params):
    """Returns a tree of bools: the parameters that weight decay applies to.

    "all" is every parameter, the default of torch.optim.AdamW. "kernels" is every parameter named
    `kernel`: no biases, norms, layer scales, embeddings, pooling query, or `position_bias`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay == "all" or path[-1].key == "kernel", params
    )


def global_norm(tree):
    """Returns the Euclidean norm of all elements of a tree of arrays with at least one axis.

    The squares are summed within each row, then over all rows. On a GPU, XLA fuses the row sums
    into the update's kernels; optax.tree.norm would launch one more kernel per matrix.
    """
    rows = [jnp.square(x).sum(-1).ravel() for x in jax.tree.leaves(tree)]
    # Without a barrier, XLA splits the sum again.
    return jnp.sqrt(jax.lax.optimization_barrier(jnp.concatenate(rows)).sum())


def _clip_by_global_norm(max_norm):
    """Builds optax.clip_by_global_norm from `global_norm`."""

    def clip(grads, params):
        del params
        scale = jnp.minimum(1.0, max_norm / global_norm(grads))
        return jax.tree.map(lambda g: g * scale, grads)

    return optax.stateless(clip)


def _stack_equal_shapes(tx, mesh):
    """Wraps a transformation so that it receives arrays of equal shape stacked on a new axis 0.

    Each device of the mesh computes the updates for its part of this axis, then receives the rest.
    """

    def key(x):
        return "x".join(map(str, x.shape))

    def stack(tree):
        groups = {}
        for x in jax.tree.leaves(tree):
            groups.setdefault(key(x), []).append(x)
        return {name: jnp.stack(group) for name, group in groups.items()}

    def place(tree, sharding):
        return jax.lax.with_sharding_constraint(tree, sharding(mesh)) if mesh else tree

    def update(grads, state, params):
        # Only the updates are divided; otherwise XLA would divide the gradients and the state too.
        grad_groups, param_groups = (
            place(stack(tree), mesh_lib.replicated) for tree in (grads, params)
        )
        updates, state = tx.update(grad_groups, state, param_groups)
        state = place(state, mesh_lib.replicated)
        updates = place(place(updates, mesh_lib.batch_sharding), mesh_lib.replicated)
        groups = {name: iter(jnp.unstack(group)) for name, group in updates.items()}
        return jax.tree.map(lambda g: next(groups[key(g)]), grads), state

    return optax.GradientTransformation(lambda params: tx.init(stack(params)), update)


def _muon_labels(params):
    def label(path, p):
        return "muon" if path[0].key.startswith("block_") and p.ndim == 2 else "adamw"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(o, schedule, *, muon_schedule=None, mesh=None):
    """Builds an optax.GradientTransformation from the `optim` group of a config.

    With a mesh, its devices divide Muon's matrix products among themselves.

    Weight decay is decoupled and multiplied by the learning rate, except in sgd, where it is added
    to the gradient; both are torch's conventions.
    """
    mask = functools.partial(decay_mask, o.decay)
    adamw = optax.adamw(schedule, o.b1, o.b2, o.eps, weight_decay=o.weight_decay, mask=mask)
    if o.name == "adamw":
        steps = [adamw]
    elif o.name == "sgd":
        decay = optax.add_decayed_weights(o.weight_decay, mask)
        steps = [decay, optax.sgd(schedule, o.momentum or None)]
    else:  # github.com/KellerJordan/Muon
        matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
        muon = optax.contrib.muon(
            muon_schedule,
            weight_decay=o.weight_decay,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: matrix, params),
        )
        muon = _stack_equal_shapes(muon, mesh)  # one product for all blocks, on a GPU one kernel
        steps = [optax.partition({"muon": muon, "adamw": adamw}, _muon_labels)]
    if o.grad_clip_norm:
        steps.insert(0, _clip_by_global_norm(o.grad_clip_norm))
    return optax.chain(*steps)
