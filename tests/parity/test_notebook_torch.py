"""The port against PyTorch: the same weights and batches give the same numbers, in float32.

Limits at the notebook's size: logits 1e-5, each gradient 1e-4 of its largest entry. Limit over 50
AdamW steps: losses 1e-4. docs/port.md lists the measured differences. Tests of the parts have
smaller limits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ours import (
    NUM_CLASSES,
    Trainer,
    assert_all_below,
    notebook_config,
    relative_differences,
    sizes,
)

from vit_jax import augment, data, model, optim
from vit_jax.weights import from_params, notebook_to_params, params_to_notebook
from vit_jax.weights.layouts import NOTEBOOK

FULL = sizes(width=256, depth=6, num_heads=8, patch_size=4)
SMALL = sizes(width=64, depth=2, num_heads=4, patch_size=8)
STEPS_PER_EPOCH = 25


@pytest.fixture
def make_reference(torch, reference):
    """Builds the PyTorch model of FULL or SMALL, always the same, without constant weights."""
    return lambda fields: _make_reference(torch, reference, fields)


def _make_reference(torch, reference, fields):
    torch.manual_seed(0)
    names = {"embed_dim": "width", "depth": "depth", "num_heads": "num_heads"}
    kwargs = {theirs: fields[ours] for theirs, ours in names.items()}
    vit = reference.VisionTransformer(patch_size=fields["patch_size"], **kwargs)
    return reference.lively(vit)


@pytest.fixture(scope="module")
def weights(torch, reference):
    """The full-size PyTorch model's weights as our parameters."""
    return notebook_to_params(_make_reference(torch, reference, FULL).state_dict())


@pytest.fixture(scope="module")
def full(split):
    return Trainer(notebook_config(**FULL), *split, steps_per_epoch=STEPS_PER_EPOCH)


@pytest.fixture(scope="module")
def small(split):
    return Trainer(notebook_config(**SMALL), *split, steps_per_epoch=STEPS_PER_EPOCH)


def test_config_has_the_notebooks_sizes():
    config = notebook_config()
    assert {name: config.model[name] for name in FULL} == FULL


def test_logits_at_full_size(torch, reference, make_reference, full, weights, split):
    images = split[0][:16]
    with torch.no_grad():
        theirs = make_reference(FULL)(reference.transform(images)).numpy()
    ours = full.logits(weights, images)
    assert np.ptp(theirs) > 0.5
    assert np.abs(ours - theirs).max() < 1e-5


def test_loss_gradients_and_steps_at_full_size(reference, make_reference, full, weights, split):
    images, labels = split
    vit = make_reference(FULL)
    loss, theirs = reference.gradients(vit, images[:8], labels[:8])
    ours_loss, grads, _ = full.train(weights, [range(8)])
    assert abs(ours_loss[0] - loss) < 1e-5
    assert min(np.abs(g).max() for g in theirs.values()) > 1e-4  # all above rounding noise
    assert_all_below(relative_differences(from_params(grads, NOTEBOOK), theirs), 1e-4)

    batches = [range(8 * i, 8 * i + 8) for i in range(3)]
    optimizer = reference.make_optimizer(vit)
    losses = [reference.train_step(vit, optimizer, images[b], labels[b]) for b in batches]
    assert np.abs(full.train(weights, batches)[0] - losses).max() < 1e-4


def test_patch_embedding(torch, reference, make_reference, weights):
    images = np.random.default_rng(1).normal(size=(4, 32, 32, 3)).astype(np.float32)
    ours = model.PatchEmbedding(patch_size=4, width=256)
    ours = ours.apply({"params": weights["patch_embed"]}, images)
    with torch.no_grad():
        theirs = make_reference(FULL).patch_embed(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    assert ours.shape == theirs.shape == (4, 64, 256)
    assert np.abs(ours - theirs).max() < 3e-6


def test_attention_and_its_maps(torch, make_reference, weights):
    x = np.random.default_rng(2).normal(size=(2, 65, 256)).astype(np.float32)
    ours = model.MultiHeadAttention(num_heads=8)
    ours, sown = ours.apply(
        {"params": weights["block_1"]["attn"]}, x, train=False, mutable="intermediates"
    )
    tensor = torch.tensor(x)
    attn = make_reference(FULL).blocks[1].attn
    with torch.no_grad():
        theirs, maps = attn(tensor, tensor, tensor, average_attn_weights=False)
    assert np.abs(ours - theirs.numpy()).max() < 3e-6
    assert np.abs(sown["intermediates"]["attention"][0] - maps.numpy()).max() < 1e-6


def test_transformer_block_and_its_gradient(torch, make_reference, weights):
    rng = np.random.default_rng(3)
    x, cotangent = rng.normal(size=(2, 2, 65, 256)).astype(np.float32)
    block = model.TransformerBlock(num_heads=8, mlp_dim=1024)
    params = weights["block_1"]

    @jax.jit
    def forward_and_gradient(x, cotangent):
        y, vjp = jax.vjp(lambda x: block.apply({"params": params}, x, train=True), x)
        return y, vjp(cotangent)[0]

    ours, gradient = forward_and_gradient(x, cotangent)
    tensor = torch.tensor(x, requires_grad=True)
    theirs = make_reference(FULL).blocks[1](tensor)
    theirs.backward(torch.tensor(cotangent))
    assert np.abs(ours - theirs.detach().numpy()).max() < 1e-5
    assert np.abs(gradient - tensor.grad.numpy()).max() < 1e-5


def test_layer_norm_of_nearly_constant_tokens(torch):
    """Tokens for which eps dominates, or E[x^2] - E[x]^2 would be noise."""
    x = np.random.default_rng(4).normal(size=(8, 256)).astype(np.float32)
    x = 10 + x * np.float32([[1], [0.1], [1e-2], [3e-3], [1e-3], [3e-4], [1e-4], [0]])
    norm = model.LayerNorm(notebook_config().model.norm_eps, jnp.float32)
    params = {"scale": np.ones(256, np.float32), "bias": np.zeros(256, np.float32)}
    theirs = torch.nn.LayerNorm(256)(torch.tensor(x)).detach().numpy()
    # 10 + 1e-4 x is rounded to about 1e-6, and so is its mean.
    assert np.abs(norm.apply({"params": params}, x) - theirs).max() < 1e-3


def test_cross_entropy(torch):
    logits = np.random.default_rng(5).normal(size=(64, 10)).astype(np.float32)
    logits *= np.logspace(-3, 4, 64, dtype=np.float32)[:, None]
    labels = np.arange(64) % NUM_CLASSES
    theirs = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), reduction="none"
    ).numpy()
    one_hot = optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, NUM_CLASSES))
    integer = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    np.testing.assert_allclose(one_hot, theirs, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(integer, theirs, rtol=1e-6, atol=1e-6)


def test_adamw_updates_from_the_same_gradients(torch):
    """Five updates, for a matrix and a bias, with gradients of 1e-11 (where eps matters) to 100.

    They agree to 3e-5 of the learning rate: optax has 1 - b2**step in float32, torch in float64.
    """
    o = notebook_config().optim
    rng = np.random.default_rng(6)
    start = {"kernel": rng.normal(size=(14, 8)), "bias": rng.normal(size=(14, 8))}
    start = {name: value.astype(np.float32) for name, value in start.items()}
    start["kernel"][:, 4:] = 0.0  # zeros: no decay, and no rounding hides the update
    scale = np.logspace(-11, 2, 14, dtype=np.float32)[:, None]
    steps = [
        {name: (rng.normal(size=(14, 8)) * scale).astype(np.float32) for name in start}
        for _ in range(5)
    ]
    steps[2]["bias"][:] = 0.0
    schedule = optim.make_schedule(o, total_steps=5, steps_per_epoch=5, warmup_steps=0)
    optimizer = optim.make_optimizer(o, schedule)
    ours = {name: jnp.asarray(value) for name, value in start.items()}
    state = optimizer.init(ours)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    reference = torch.optim.AdamW(theirs.values(), lr=3e-4, weight_decay=1e-4)
    for grads in steps:
        updates, state = optimizer.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        reference.step()
        for name, p in theirs.items():
            np.testing.assert_allclose(ours[name], p.detach().numpy(), rtol=1e-6, atol=1e-8)


def test_adamw_decays_every_parameter(torch, make_reference):
    """An update with zero gradients scales every weight by 1 - lr wd, embeddings and norms too."""
    o = notebook_config().optim
    optimizer = optim.make_optimizer(o, optax.constant_schedule(o.peak_lr * 1e4))
    vit = make_reference(SMALL)
    weights = notebook_to_params(vit.state_dict())
    grads = jax.tree.map(np.zeros_like, weights)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(weights), weights)
    ours = from_params(optax.apply_updates(weights, updates), NOTEBOOK)
    reference = torch.optim.AdamW(vit.parameters(), lr=3.0, weight_decay=1e-4)
    for p in vit.parameters():
        p.grad = torch.zeros_like(p)
    reference.step()
    for name, p in vit.state_dict().items():
        np.testing.assert_allclose(ours[name], p.numpy(), rtol=3e-7, err_msg=name)


def test_losses_and_weights_of_50_adamw_steps(reference, make_reference, small, split):
    """Losses per step, the epoch mean that the notebook prints, and the final weights."""
    images, labels = split
    vit = make_reference(SMALL)
    optimizer = reference.make_optimizer(vit)
    params = notebook_to_params(vit.state_dict())
    batches = [np.arange(64) + i % 3 * 64 for i in range(2 * STEPS_PER_EPOCH)]
    losses = [reference.train_step(vit, optimizer, images[b], labels[b]) for b in batches]
    assert losses[-1] < 0.7 * losses[0]  # the model has trained
    ours, _, state = small.train(params, batches)
    assert np.abs(ours - losses).max() < 1e-4
    epoch_mean = float(state.sums["loss"]) / STEPS_PER_EPOCH
    assert abs(epoch_mean - sum(losses[STEPS_PER_EPOCH:]) / STEPS_PER_EPOCH) < 1e-4
    # The key bias cancels in the softmax: its gradient is rounding noise, which Adam amplifies.
    ours = from_params(state.params, NOTEBOOK)
    for name, p in vit.state_dict().items():
        ours[name], p = ours[name], p.numpy()
        if name.endswith("in_proj_bias"):
            ours[name], p = np.delete(ours[name], np.s_[64:128]), np.delete(p, np.s_[64:128])
        assert np.abs(ours[name] - p).max() < 1e-4, name


def test_partial_last_batch(reference, make_reference, small, split):
    """16 rows padded to 64 have the loss and gradients of PyTorch on the 16 alone."""
    images, labels = split
    vit = make_reference(SMALL)
    params = notebook_to_params(vit.state_dict())
    rows = np.arange(192, 208)
    loss, theirs = reference.gradients(vit, images[rows], labels[rows])
    ours_loss, grads, _ = small.train(params, [np.r_[rows, np.full(48, -1)]])
    assert abs(ours_loss[0] - loss) < 1e-6
    assert_all_below(relative_differences(from_params(grads, NOTEBOOK), theirs), 1e-4)


def test_epoch_is_782_steps_with_every_example_once():
    indices = data.epoch_order(50_000, 64, seed=0, epoch=0)
    assert indices.shape == (782, 64)
    assert (indices[:-1] >= 0).all()
    assert (indices[-1] >= 0).tolist() == [True] * 16 + [False] * 48
    assert np.array_equal(np.sort(indices[indices >= 0]), np.arange(50_000))


def test_evaluation_counts(torch, reference, make_reference, small, split):
    """The notebook's number of correct predictions and summed loss, with a partial last batch."""
    images, labels = split
    vit = make_reference(SMALL).eval()
    with torch.no_grad():
        logits = vit(reference.transform(images))
    targets = torch.from_numpy(labels).long()
    correct = (torch.max(logits, 1)[1] == targets).sum().item()
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    params = notebook_to_params(vit.state_dict())
    ours = small.evaluate(params, data.eval_order(208, 64))
    assert (ours["correct"], ours["count"]) == (correct, 208)
    assert 0 < correct < 208
    assert abs(ours["loss"] - loss) / loss < 1e-5


@pytest.mark.parametrize("compiled", [False, True])
def test_transform_is_bit_equal(torch, reference, compiled):
    images = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1).reshape(1, 16, 16, 3)
    config = notebook_config()
    normalize = functools.partial(augment.normalize, mean=config.data.mean, std=config.data.std)
    ours = np.asarray((jax.jit(normalize) if compiled else normalize)(jnp.asarray(images)))
    theirs = reference.transform(images).permute(0, 2, 3, 1).numpy()
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.int32), np.ascontiguousarray(theirs).view(np.int32))


def test_our_weights_have_the_same_logits_in_the_notebook(torch, reference, small, split):
    """Fresh weights of ours, loaded with strict=True."""
    init = jax.jit(lambda key: model.init_params(small.model, key, (32, 32, 3)))
    params = jax.device_get(init(jax.random.key(1)))
    vit = reference.VisionTransformer(patch_size=8, embed_dim=64, depth=2, num_heads=4)
    vit.load_state_dict(params_to_notebook(params), strict=True)
    with torch.no_grad():
        theirs = vit(reference.transform(split[0][:16])).numpy()
    assert np.abs(small.logits(params, split[0][:16]) - theirs).max() < 1e-5
