"""The notebook's training in PyTorch, in a process that `vit-jax benchmark` drives.

    python -m vit_jax.commands.benchmark.torch_side JSON

JSON has the keys "variant", "dtype", "device", "batch_size", "seed", "data" (the config's), and
"model" (arguments of `VisionTransformer`). The variants are:

    written   the notebook's loop: PIL images are transformed one by one in the training process,
              and every loss is read immediately
    eager     optimized: uint8 data on the device, batches gathered and normalized there,
              fused AdamW, fused attention, losses left on the device
    compiled  eager with torch.compile, on a GPU with CUDA graphs

The process answers each line of stdin, a number of steps, with a line of JSON on stdout: their
seconds and losses.
"""

import json
import sys
import time

import numpy as np
import torch
from PIL import Image
from torch import nn

from vit_jax import data
from vit_jax.commands.benchmark.notebook_torch import (
    TransformerBlock,
    VisionTransformer,
    make_optimizer,
)


class Images(torch.utils.data.Dataset):
    """Equivalent of torchvision's CIFAR10 with ToTensor and Normalize, without torchvision."""

    def __init__(self, images, labels, mean, std):
        self.images, self.labels = images, labels
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        tensor = torch.from_numpy(np.array(image, np.uint8, copy=True))  # ToTensor
        tensor = tensor.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return tensor.sub_(self.mean).div_(self.std), int(self.labels[i])  # Normalize


def written(split, spec, device):
    """Runs one step of the notebook's loop per iteration, and yields its loss, a float."""
    model = VisionTransformer(**spec["model"]).to(device)
    criterion, optimizer = nn.CrossEntropyLoss(), make_optimizer(model)
    dataset = Images(split.images, split.labels, spec["data"]["mean"], spec["data"]["std"])
    loader = torch.utils.data.DataLoader(dataset, batch_size=spec["batch_size"], shuffle=True)
    while True:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            yield loss.item()


def best(split, spec, device):
    """Runs one optimized step per iteration, and yields its loss on the device."""
    TransformerBlock.need_weights = False
    torch.set_float32_matmul_precision("high")  # TF32, the default of JAX on a GPU
    model = VisionTransformer(**spec["model"]).to(device)
    criterion, autocast = nn.CrossEntropyLoss(), spec["dtype"] == "bfloat16"
    forward = model
    if spec["variant"] == "compiled":
        forward = torch.compile(model, mode="reduce-overhead" if device == "cuda" else None)
    optimizer = make_optimizer(model, fused=True)
    images = torch.from_numpy(split.images).to(device)
    labels = torch.from_numpy(split.labels).to(device).long()
    mean, std = (torch.tensor(spec["data"][k], device=device) for k in ("mean", "std"))
    while True:
        order = torch.randperm(len(labels), device=device)
        for rows in order.split(spec["batch_size"])[: len(order) // spec["batch_size"]]:
            batch = images[rows].to(torch.float32).div_(255).sub_(mean).div_(std)
            batch = batch.permute(0, 3, 1, 2).contiguous()
            if device == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                loss = criterion(forward(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.detach().clone()


def main():
    """Builds the model, then runs the steps that stdin requests until it ends."""
    spec = json.loads(sys.argv[1])
    device = spec["device"]
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} does not find the GPU that JAX uses")
    torch.manual_seed(spec["seed"])
    split = data.open_split(
        spec["data"]["name"],
        spec["data"]["train_split"],
        data_dir=spec["data"]["dir"] or None,
        image_size=spec["data"]["image_size"] or None,
    )
    steps = (written if spec["variant"] == "written" else best)(split, spec, device)
    about = f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads"
    print(json.dumps({"about": about}), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        losses = [next(steps) for _ in range(int(line))]
        losses = [float(loss) for loss in losses]  # waits for the device
        answer = {"seconds": time.perf_counter() - start, "losses": losses}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
