"""The ported notebook in PyTorch: the reference of tests/parity, and the benchmark's loops.

Class names, constructor arguments, attributes (hence the `state_dict`), construction order (hence
the random draws), and arithmetic are the notebook's. Training never imports this module.
"""

import numpy as np
import torch
from PIL import Image
from torch import nn


class PatchEmbedding(nn.Module):
    """Maps float[B, C, H, W] to [B, N, D] by a convolution with the patch as kernel and stride."""

    def __init__(self, img_size=32, patch_size=4, in_channels=3, embed_dim=256):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and pre-norm MLP on [B, N, D], each with a residual connection."""

    need_weights = True  # PyTorch's default; the benchmark sets False to enable fused attention

    def __init__(self, embed_dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        hidden_dim = int(embed_dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, embed_dim)
        )

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=self.need_weights)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Maps float[B, 3, H, W] to logits [B, num_classes], read from the class token."""

    def __init__(
        self, img_size=32, patch_size=4, num_classes=10, embed_dim=256, depth=6, num_heads=8
    ):
        super().__init__()
        self.patch_embed = PatchEmbedding(img_size, patch_size, 3, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        self.blocks = nn.Sequential(*[TransformerBlock(embed_dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1)
        x = self.blocks(x + self.pos_embed)
        return self.head(self.norm(x)[:, 0])


def transform(images):
    """ToTensor, then Normalize by 0.5 and 0.5: numpy uint8[B, H, W, 3] to float32[B, 3, H, W]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32).div(255).sub(0.5).div(0.5)


def make_optimizer(model, **options):
    """Returns the notebook's AdamW, with PyTorch's defaults for everything it does not set."""
    return torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-4, **options)


def train_step(model, optimizer, images, labels):
    """Runs one iteration of the notebook's loop. Returns the loss before the update, a float."""
    optimizer.zero_grad()
    loss = nn.CrossEntropyLoss()(model(transform(images)), torch.from_numpy(labels).long())
    loss.backward()
    optimizer.step()
    return loss.item()


def transformed_batches(images, labels, batch_size, device):
    """Yields shuffled batches of uint8[N, H, W, 3] images as the notebook's DataLoader does."""

    def collate(rows):
        pixels = [transform(np.array(Image.fromarray(images[i]))[None]) for i in rows]
        batch = torch.cat([image.contiguous() for image in pixels])
        return batch.to(device), torch.tensor([int(labels[i]) for i in rows]).to(device)

    options = {"batch_size": batch_size, "shuffle": True, "collate_fn": collate}
    loader = torch.utils.data.DataLoader(range(len(labels)), **options)
    while True:
        yield from loader


def gathered_batches(images, labels, batch_size, device):
    """Yields shuffled full batches, gathered and transformed on the device."""
    images = torch.from_numpy(images).to(device)
    labels = torch.from_numpy(labels).to(device).long()
    while True:
        order = torch.randperm(len(labels), device=device)
        for rows in order.split(batch_size)[: len(order) // batch_size]:
            batch = images[rows].to(torch.float32).div_(255).sub_(0.5).div_(0.5)
            if device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            yield batch.permute(0, 3, 1, 2).contiguous(), labels[rows]


def train(variant, images, labels, arguments, batch_size, device, bfloat16, tf32):
    """Trains a variant of torch_side.py and yields the loss of each step.

    The variant "written" ignores `bfloat16`. With `tf32`, every variant computes float32 products
    and the convolution in TF32 on a GPU; otherwise none does.
    """
    written, criterion = variant == "written", nn.CrossEntropyLoss()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if not written:
        TransformerBlock.need_weights = False
    model = VisionTransformer(**arguments).to(device)
    optimizer = make_optimizer(model, fused=None if written else True)
    if variant == "compiled":
        model = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None)
    make_batches = transformed_batches if written else gathered_batches
    for batch, targets in make_batches(images, labels, batch_size, device):
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16 and not written):
            loss = criterion(model(batch), targets)
        loss.backward()
        optimizer.step()
        yield loss.item() if written else loss.detach().clone()
