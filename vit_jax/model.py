"""The Vision Transformer (arXiv 2010.11929, pre-norm): float images in, float32 logits out.

Shapes: B batch, H W pixels, C channels, P patch size, N tokens, D width, h heads, K = D / h.
Parameters and their gradients are float32, activations have `dtype`; softmax, norms, and logits
compute in float32.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax import config as config_lib
from vit_jax.errors import UserError


def _linear_init(init, fan_in):
    """Returns the initializers of torch.nn.Linear, or timm's truncated normal with std 0.02."""
    if init == "pytorch":
        bound = fan_in**-0.5

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return {"kernel_init": uniform, "bias_init": uniform}
    return {"kernel_init": nn.initializers.truncated_normal(0.02)}


def gelu(x):
    """Computes the exact GELU, not its tanh approximation, with erf in float32, as torch does.

    jax.nn.gelu uses erfc, which is more accurate far in the tail but branches: on a CPU, forward
    and backward take five times as long (docs/performance.md).
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 + 0.5 * jax.lax.erf(wide * np.float32(0.5**0.5)))).astype(x.dtype)


class LayerNorm(nn.Module):
    """[..., D] -> [..., D]: nn.LayerNorm, in float32 and two passes as in torch."""

    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalize(x, scale, bias, self.eps).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x, scale, bias, eps):
    """Returns x normalized over D, times `scale`, plus `bias`: float32.

    The derivative reuses the sums over D of the forward pass, and sums over the rows once.
    """
    return _normalize(x, scale, bias, eps)[0]


def _normalize(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    total = wide.sum(-1, keepdims=True)
    squares = jnp.square(wide - total / x.shape[-1]).sum(-1, keepdims=True)
    # Without a barrier, XLA recomputes the sums wherever they are used.
    sums = jax.lax.optimization_barrier((total, squares))
    return _normal(x, sums, eps)[0] * scale + bias, (x, sums, scale)


def _normal(x, sums, eps):
    mean, variance = (s / x.shape[-1] for s in sums)
    rstd = jax.lax.rsqrt(variance + eps)
    return (x.astype(jnp.float32) - mean) * rstd, rstd


def _normalize_vjp(eps, saved, dy):
    x, sums, scale = saved
    normal, rstd = _normal(x, sums, eps)
    d = dy * scale
    dx = d - d.mean(-1, keepdims=True) - normal * (d * normal).mean(-1, keepdims=True)
    zeros, add = (np.float32(0), np.float32(0)), functools.partial(jax.tree.map, jnp.add)
    # The batch may be sharded, and XLA does not split this reduction over devices.
    sums = jax.lax.reduce((dy * normal, dy), zeros, add, range(1, dy.ndim - 1))
    dscale, dbias = (s.sum(0) for s in sums)
    return (dx * rstd).astype(x.dtype), dscale, dbias


normalize.defvjp(_normalize, _normalize_vjp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x, kernel, precision):
    """Returns [..., D] times float32[D, F] as [..., F], computed in the dtype of x.

    The kernel's gradient is float32. JAX's would have the dtype of x: each device, and each
    microbatch, would round its part to bfloat16 before the parts are added.
    """
    return jnp.matmul(x, kernel.astype(x.dtype), precision=precision)


def _matmul_fwd(x, kernel, precision):
    return matmul(x, kernel, precision), (x, kernel)


def _matmul_bwd(precision, residuals, dy):
    x, kernel = residuals
    dx = jnp.tensordot(dy, kernel.astype(x.dtype), (-1, 1), precision=precision)
    if x.dtype == jnp.bfloat16:  # exact in float32, and still multiplied as bfloat16 on a GPU
        x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    rows = tuple(range(x.ndim - 1))
    return dx, jnp.tensordot(dy, x, (rows, rows), precision=precision).T


matmul.defvjp(_matmul_fwd, _matmul_bwd)


class Linear(nn.Module):
    """[..., D] -> [..., features]: nn.Dense over a 2-D view.

    On a CPU, XLA takes a sixth less time for a small ViT than with nn.Dense on three axes.
    """

    features: int
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: jnp.dtype = jnp.float32
    precision: str | None = None

    @nn.compact
    def __call__(self, x):
        D = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (D, self.features))
        bias = self.param("bias", self.bias_init, (self.features,))
        y = matmul(x.reshape(-1, D).astype(self.dtype), kernel, self.precision)
        return (y + bias).astype(self.dtype).reshape(*x.shape[:-1], self.features)


class _Part(nn.Module):
    """The options that a VisionTransformer shares with its parts; `config.FIELDS` explains them."""

    patch_size: int = 4
    width: int = 256
    depth: int = 6
    num_heads: int = 8
    mlp_dim: int = 1024
    pool: str = "cls"
    posemb: str = "learned"
    position_bias: str = "none"
    token_shift: bool = False
    stem: str = "patch"
    weight_init: str = "pytorch"
    norm_eps: float = 1e-5
    qk_norm: bool = False
    layer_scale: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32
    matmul_precision: str = "float32"
    attention: str = "xla"
    gelu: str = "exact"
    pre_logits: int = 0
    image_size: int = 0

    @property
    def precision(self):
        """JAX's name for `matmul_precision`, in products and convolutions."""
        return {"float32": "highest", "tf32": "default"}[self.matmul_precision]


def _options(part):
    names = {field.name for field in dataclasses.fields(_Part)} - {"parent", "name"}
    return {name: getattr(part, name) for name in names}


class PatchEmbedding(_Part):
    """float[B, H, W, C] -> [B, N, D]: each P x P patch, flattened, times one matrix.

    Equals a convolution with stride P; the parameter has that kernel's shape, [P, P, C, D].
    """

    @nn.compact
    def __call__(self, x):
        B, H, W, C = x.shape
        P = self.patch_size
        init = _linear_init(self.weight_init, P * P * C)
        kernel = self.param("kernel", init["kernel_init"], (P, P, C, self.width))
        bias = self.param("bias", init.get("bias_init", nn.initializers.zeros), (self.width,))
        x = x.reshape(B, H // P, P, W // P, P, C).swapaxes(2, 3)
        x = x.reshape(B, (H // P) * (W // P), P * P * C).astype(self.dtype)
        y = matmul(x, kernel.reshape(-1, self.width), self.precision)
        return (y + bias).astype(self.dtype)


class ConvStem(_Part):
    """float[B, H, W, C] -> [B, N, D]: log2(P) stride-2 3x3 convolutions, then one 1x1.

    Source: Xiao et al. (arXiv 2106.14881), with LayerNorm over channels instead of batch norm, and
    GELU. The number of channels doubles up to D. Computes in float32, so its gradients are float32.
    """

    @nn.compact
    def __call__(self, x):
        num_convs = self.patch_size.bit_length() - 1
        conv = functools.partial(nn.Conv, precision=self.precision)
        for i in range(num_convs):
            channels = self.width // 2 ** (num_convs - 1 - i)
            x = conv(channels, (3, 3), 2, use_bias=False, name=f"conv_{i}")(x)
            x = nn.LayerNorm(name=f"norm_{i}")(x)
            x = gelu(x)
        x = conv(self.width, (1, 1), name="proj")(x)
        return x.reshape(x.shape[0], -1, self.width).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention_weights(q, k, precision):
    """[B, h, n, K], [B, h, N, K] -> [B, h, n, N]: softmax(q k'), computed in float32.

    The result has the dtype of q. The backward pass reuses it, differentiates the softmax in
    float32, and multiplies by q and k in their own dtype.
    """
    return _attention_weights(q, k, precision)[0]


def _attention_weights(q, k, precision):
    einsum = functools.partial(jnp.einsum, precision=precision)
    scores = einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32)
    # Without a barrier, XLA saves float32 scores and recomputes the weights from them.
    weights = jax.lax.optimization_barrier(jax.nn.softmax(scores).astype(q.dtype))
    return weights, (q, k, weights)


def _attention_weights_vjp(precision, saved, d):
    q, k, weights = saved
    weights, d = weights.astype(jnp.float32), d.astype(jnp.float32)
    # dscores do not depend on the mean of d. Subtracting it lets XLA use one GPU kernel.
    d = d - d.mean(-1, keepdims=True)
    dscores = (weights * (d - (weights * d).sum(-1, keepdims=True))).astype(q.dtype)
    dq = jnp.einsum("bhnm,bhmk->bhnk", dscores, k, precision=precision)
    return dq, jnp.einsum("bhnm,bhnk->bhmk", dscores, q, precision=precision)


attention_weights.defvjp(_attention_weights, _attention_weights_vjp)


def shift_tokens(x, grid):
    """[B, N, D] -> [B, N, D]: a twelfth of the channels comes from each of the four neighbors.

    Neighbors outside the grid are zero, and two thirds of the channels stay in place. Source: Wang
    et al. (arXiv 2201.10801).
    """
    B, N, D = x.shape
    rows, columns = grid
    offsets = (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)
    edges = *(i * (D // 12) for i in range(5)), D
    padded = jnp.pad(x.reshape(B, rows, columns, D), ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [
        padded[:, 1 + dy : 1 + dy + rows, 1 + dx : 1 + dx + columns, start:end]
        for (dy, dx), (start, end) in zip(offsets, itertools.pairwise(edges), strict=True)
    ]
    return jnp.concatenate(parts, axis=3).reshape(B, N, D)


class PositionBias(nn.Module):
    """q, k [B, h, N, K] -> [B, h, N, K + 3], so that q k' also includes -a |y - x - c|^2.

    x is the position of the query's patch and y that of the key's. Each head learns a falloff a,
    initially 1/2, and an offset c, initially on the unit circle. The parameters are a / 10 and
    c / 10, so that Adam changes a and c ten times as fast. Terms that do not depend on y cancel in
    the softmax and are omitted. Source: the quadratic encoding of Cordonnier et al. (arXiv
    1911.03584).
    """

    @nn.compact
    def __call__(self, q, k, grid):
        B, h, N, _ = q.shape
        positions = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(-1, 2)
        positions = np.float32(positions - positions.mean(axis=0))
        angles = 2 * np.pi / h * np.arange(h)
        circle = np.stack([np.sin(angles), np.cos(angles)], axis=1).reshape(h, 1, 2)
        a = 10 * self.param("falloff", nn.initializers.constant(0.05), (h, 1, 1))
        c = 10 * self.param("offset", lambda key: jnp.float32(circle / 10))
        squares = np.square(positions).sum(axis=1, keepdims=True)
        q_bias = jnp.concatenate([2 * a * (positions + c), jnp.broadcast_to(-a, (h, N, 1))], axis=2)
        k_bias = jnp.concatenate([positions, squares], axis=1)

        def append(x, bias):
            return jnp.concatenate(
                [x, jnp.broadcast_to(bias, (B, h, N, 3)).astype(x.dtype)], axis=3
            )

        return append(q, q_bias), append(k, k_bias)


class MultiHeadAttention(_Part):
    """[B, N, D] -> [B, n, D]: softmax(q k' / sqrt K) v in each head, q k v from one fused matrix.

    Queries come from the first n tokens (all by default), keys and values from those after the
    first `skip`. `qkv/kernel` is [D, 3 D], ordered q, k, v and by head within each: torch's
    MultiheadAttention, transposed. With `position_bias="gaussian"` and a `grid` of (rows, columns),
    the scores have a PositionBias.
    The attention maps, float32[B, h, n, N], are sown as the intermediate `attention`. With
    `attention="cudnn"`, training steps use cuDNN's fused kernel, which does not store them.
    """

    @nn.compact
    def __call__(self, x, *, train, n=None, skip=0, grid=None):
        B, N, D = x.shape
        K = D // self.num_heads
        qkv_init = _linear_init(self.weight_init, D)
        if self.weight_init == "pytorch":  # Xavier over the fused matrix, zero bias
            qkv_init = {"kernel_init": nn.initializers.xavier_uniform()}
        qkv = Linear(3 * D, dtype=self.dtype, precision=self.precision, name="qkv", **qkv_init)(x)
        qkv = jnp.unstack(qkv.reshape(B, N, 3, self.num_heads, K), axis=2)
        q, k, v = (x.swapaxes(1, 2) for x in qkv)  # [B, h, N, K]
        q, k, v = q[:, :, :n], k[:, :, skip:], v[:, :, skip:]
        if self.qk_norm:  # arXiv 2302.05442: prevents the growth of attention logits
            q = nn.LayerNorm(self.norm_eps, use_bias=False, dtype=self.dtype, name="q_norm")(q)
            k = nn.LayerNorm(self.norm_eps, use_bias=False, dtype=self.dtype, name="k_norm")(k)
        if self.attention == "cudnn" and train and n is None:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            x = jax.nn.dot_product_attention(q, k, v, implementation="cudnn").reshape(B, N, D)
        else:
            q = q * K**-0.5
            if grid and self.position_bias == "gaussian":
                q, k = PositionBias(name="position_bias")(q, k, grid)
            attention = attention_weights(q, k, self.precision)
            self.sow("intermediates", "attention", attention.astype(jnp.float32))
            attention = nn.Dropout(self.dropout)(attention, deterministic=not train)
            x = jnp.einsum("bhnm,bhmk->bhnk", attention, v, precision=self.precision)
            x = x.transpose(0, 2, 1, 3).reshape(B, -1, D)
        out_init = _linear_init(self.weight_init, D) | {"bias_init": nn.initializers.zeros}
        return Linear(D, dtype=self.dtype, precision=self.precision, name="out", **out_init)(x)


class MlpBlock(_Part):
    """[B, N, D] -> [B, N, D]: linear to `mlp_dim`, GELU, linear back."""

    @nn.compact
    def __call__(self, x, *, train):
        D = x.shape[-1]
        init = _linear_init(self.weight_init, D)
        x = Linear(self.mlp_dim, dtype=self.dtype, precision=self.precision, name="fc1", **init)(x)
        x = nn.gelu(x) if self.gelu == "tanh" else gelu(x)  # tanh: as in Google's ViTs
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        init = _linear_init(self.weight_init, self.mlp_dim)
        return Linear(D, dtype=self.dtype, precision=self.precision, name="fc2", **init)(x)


class TransformerBlock(_Part):
    """[B, N, D] -> [B, n, D]: x + attention(norm(x)), then x + mlp(norm(x)).

    Only the first n tokens (all by default) are computed; they attend to all N. `grid` is the
    number of (rows, columns) of patches, for `position_bias` and `token_shift`.
    """

    @nn.compact
    def __call__(self, x, *, train, n=None, grid=None):
        def residual(y, name):
            if self.layer_scale:  # arXiv 2103.17239
                scale = nn.initializers.constant(self.layer_scale)
                y = (y * self.param(name, scale, x.shape[-1:])).astype(self.dtype)
            y = nn.Dropout(self.dropout)(y, deterministic=not train)
            # Stochastic depth (arXiv 1603.09382) drops a branch for an entire image.
            return nn.Dropout(self.drop_path, broadcast_dims=(1, 2))(y, deterministic=not train)

        y = LayerNorm(self.norm_eps, self.dtype, name="norm1")(x)
        if self.token_shift:
            y = shift_tokens(y, grid)
        attention = MultiHeadAttention(**_options(self), name="attn")
        y = attention(y, train=train, n=n, grid=grid)
        x = x[:, :n] + residual(y, "layer_scale1")
        y = LayerNorm(self.norm_eps, self.dtype, name="norm2")(x)
        if self.token_shift:
            y = shift_tokens(y, grid)
        y = MlpBlock(**_options(self), name="mlp")(y, train=train)
        return x + residual(y, "layer_scale2")


class AttentionPooling(_Part):
    """[B, N, D] -> [B, D]: a learned query attends to all tokens, followed by an MLP block.

    The attention has no residual connection. Source: multihead attention pooling (MAP), Zhai et al.
    (arXiv 2106.04560).
    """

    @nn.compact
    def __call__(self, x, *, train):
        B, _, D = x.shape
        query = self.param("query", nn.initializers.xavier_uniform(), (1, 1, D))
        query = jnp.broadcast_to(query, (B, 1, D)).astype(self.dtype)
        x = jnp.concatenate([query, x], axis=1)
        x = MultiHeadAttention(**_options(self), name="attn")(x, train=train, n=1, skip=1)
        y = LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        return (x + MlpBlock(**_options(self), name="mlp")(y, train=train))[:, 0]


class VisionTransformer(_Part, kw_only=True):
    """float[B, H, W, C] normalized images -> float32[B, num_classes] logits.

    With an `image_size`, images are first resized: bilinear, with antialiasing if they shrink.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images, *, train=False):
        x, grid = self._embed(images), patch_grid(self, images.shape[1:])
        if train:
            # The gradients of the embeddings sum over the batch. On a GPU, XLA would lay out all
            # activations as [N, D, B] for that, which a 2-D view prevents.
            x = jax.lax.optimization_barrier(x.reshape(-1, self.width)).reshape(x.shape)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        for i in range(self.depth):
            # The rate of stochastic depth is linear in depth, as in the paper.
            options = _options(self) | {"drop_path": self.drop_path * i / max(self.depth - 1, 1)}
            block = TransformerBlock(**options, name=f"block_{i}")
            # The head reads only the class token, so the last block skips the other outputs unless
            # attention maps are requested.
            last = i == self.depth - 1 and self.pool == "cls"
            n = 1 if last and not self.is_mutable_collection("intermediates") else None
            call = {"train": train, "n": n, "grid": grid}
            if self.remat:  # keep only the input of a block for the backward pass
                x = nn.remat(lambda block, x, call=call: block(x, **call))(block, x)
            else:
                x = block(x, **call)
        x = LayerNorm(self.norm_eps, self.dtype, name="norm")(x)
        if self.pool == "map":
            x = AttentionPooling(**_options(self), name="pooling")(x, train=train)
        else:
            x = x[:, 0] if self.pool == "cls" else x.mean(axis=1)
        if self.pre_logits:  # the first ViTs' pre-training head (arXiv 2010.11929 section 3.1)
            init = _linear_init(self.weight_init, self.width)
            x = Linear(self.pre_logits, precision=self.precision, name="pre_logits", **init)(x)
            x = jnp.tanh(x)
        init = _linear_init(self.weight_init, x.shape[-1])
        head = Linear(self.num_classes, precision=self.precision, name="head", **init)
        return head(x.astype(jnp.float32))

    def _embed(self, images):
        """Returns [B, N, D]: the class token and the patches, with their position embeddings."""
        B, *image_shape = images.shape
        resized = (B, *resolution(self, image_shape))
        if images.shape != resized:
            images = jax.image.resize(images, resized, "bilinear")
        if self.stem == "conv":
            x = ConvStem(**_options(self), name="conv_stem")(images)
        else:
            x = PatchEmbedding(**_options(self), name="patch_embed")(images)
        # The notebook initializes both embeddings to zero.
        zeros, normal = nn.initializers.zeros, nn.initializers.truncated_normal(0.02)
        init = zeros if self.weight_init == "pytorch" else normal
        if self.pool == "cls":
            cls_token = self.param("cls_token", init, (1, 1, self.width))
            cls_token = jnp.broadcast_to(cls_token, (B, 1, self.width))
            x = jnp.concatenate([cls_token.astype(self.dtype), x], axis=1)
        if self.posemb == "learned":
            pos_embed = self.param("pos_embed", init, (1, x.shape[1], self.width))
        else:
            grid = patch_grid(self, image_shape)
            pos_embed = sincos2d(grid, self.width, cls_token=self.pool == "cls")
        return (x + pos_embed).astype(self.dtype)


def sincos2d(grid, width, *, cls_token):
    """Returns fixed position embeddings float32[1, N, D] (arXiv 2205.01580); class token: 0."""
    y, x = np.mgrid[: grid[0], : grid[1]]
    omega = 1.0 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    table = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, width)), table])
    return table[None].astype(np.float32)


def make_model(model_config, *, num_classes):
    """Builds a VisionTransformer from the `model` group of a config."""
    fields = dict(model_config) | config_lib.model_shape(model_config)
    del fields["size"]
    fields["dtype"] = jnp.dtype(fields["dtype"])
    return VisionTransformer(num_classes=num_classes, **fields)


def resolution(model, image_shape):
    """Returns the (H, W, C) that the model splits into patches, for images of (H, W, C)."""
    H, W, C = image_shape
    return model.image_size or H, model.image_size or W, C


def patch_grid(model, image_shape):
    """Returns (rows, columns) of patches, for images of (H, W, C)."""
    H, W, _ = resolution(model, image_shape)
    return H // model.patch_size, W // model.patch_size


def check_image_shape(model, image_shape):
    """Raises UserError if the model cannot take images of (H, W, C)."""
    H, W, _ = resolution(model, image_shape)
    if H % model.patch_size or W % model.patch_size:
        raise UserError(
            f"images of {H}x{W} pixels cannot be divided into patches of {model.patch_size}: "
            "set config.model.patch_size to a divisor, or config.model.image_size to a multiple"
        )
    N = num_tokens(model, image_shape)
    if model.attention == "cudnn" and N % 2:
        raise UserError(
            f"config.model.attention=cudnn needs an even number of tokens, not {N}: use "
            "config.model.pool=gap, without a class token, or model.attention=xla"
        )


def init_params(model, key, image_shape):
    """Returns the initial weights, a nested dict of float32 arrays, for images of (H, W, C)."""
    return model.init(key, jnp.zeros((1, *image_shape)))["params"]


def num_tokens(model, image_shape):
    """Returns N, including the class token, for images of (H, W, C)."""
    rows, columns = patch_grid(model, image_shape)
    return rows * columns + (model.pool == "cls")


def train_flops_per_image(model, image_shape):
    """Returns the floating-point operations of one image's forward and backward pass.

    Counts only matrix products, a multiply-add as two operations, and the backward pass as twice
    the forward (arXiv 2204.02311, appendix B).
    """
    N, D, P = num_tokens(model, image_shape), model.width, model.patch_size
    H, W, C = resolution(model, image_shape)
    last = 1 if model.pool == "cls" else N  # tokens that the last block computes
    bias = 3 * model.num_heads * (model.position_bias == "gaussian")  # more channels of q and k
    blocks = sum(
        6 * N * D * D + 2 * n * N * (2 * D + bias) + 2 * n * D * (D + 2 * model.mlp_dim)
        for n in [N] * (model.depth - 1) + [last]
    )
    if model.pool == "map":  # keys and values of all tokens, the rest for one query
        blocks += 4 * N * D * D + 4 * N * D + 4 * D * (D + model.mlp_dim)
    pixels, patches = H * W, H * W // P**2
    embed = 2 * pixels * C * D
    if model.stem == "conv":
        num_convs = P.bit_length() - 1
        channels = [C, *(D // 2**i for i in reversed(range(num_convs)))]
        embed = 2 * patches * D * D
        for inputs, outputs in itertools.pairwise(channels):
            pixels //= 4
            embed += 2 * pixels * 9 * inputs * outputs
    widths = [D, *[model.pre_logits] * (model.pre_logits > 0), model.num_classes]
    head = sum(2 * inputs * outputs for inputs, outputs in itertools.pairwise(widths))
    return 3 * (blocks + embed + head)
