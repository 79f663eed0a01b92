"""Weights of PyTorch ViTs: transformers itself, timm's names, and the notebook."""

import json
import pathlib
import pickle

import numpy as np
import pytest
from small_models import random_model, same_bits

import vit_jax
from vit_jax.errors import UserError
from vit_jax.weights import layouts, params_to_notebook
from vit_jax.weights.finetune import resize_positions

IMAGES = np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32)


def logits_of(weights, images=IMAGES):
    return np.asarray(weights.make_model().apply({"params": weights.params}, images))


@pytest.fixture
def hugging(torch, transformers):
    """Builds a ViTForImageClassification of transformers with random weights."""

    def make(**options):
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
        sizes |= {"num_attention_heads": 3, "image_size": 16, "patch_size": 4, "num_labels": 5}
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**sizes | options)
        ).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(0, 0.4)
        return model

    return make


def hugging_logits(torch, model, images=IMAGES):
    with torch.no_grad():
        return model(torch.tensor(images).permute(0, 3, 1, 2)).logits.numpy()


@pytest.mark.parametrize("gelu", ["gelu", "gelu_pytorch_tanh"])
def test_hugging_face_folder(torch, hugging, tmp_path, gelu):
    theirs = hugging(hidden_act=gelu, layer_norm_eps=1e-6, id2label=dict(enumerate("abcde")))
    theirs.save_pretrained(tmp_path)
    pixels = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    got = vit_jax.load_weights(tmp_path)
    assert (got.kind, got.num_classes, got.grid) == ("huggingface", 5, (4, 4))
    assert got.model["norm_eps"] == 1e-6 and got.class_names == list("abcde")
    assert got.preprocessing == {"divide_by": 255, "mean": [0.5] * 3, "std": [0.25] * 3}
    np.testing.assert_allclose(logits_of(got), hugging_logits(torch, theirs), atol=1e-5)


@pytest.mark.parametrize("pre_logits", [None, 16])
def test_torchvision_logits(torch, torchvision, tmp_path, pre_logits):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=16,
        patch_size=4,
        num_layers=2,
        num_heads=3,
        hidden_dim=24,
        mlp_dim=40,
        num_classes=5,
        representation_size=pre_logits,
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.4)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    got = vit_jax.load_weights(tmp_path / "vit.pth", num_heads=3)
    assert (got.kind, got.num_classes, got.grid) == (layouts.TORCHVISION, 5, (4, 4))
    with torch.no_grad():
        expected = theirs(torch.tensor(IMAGES).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits_of(got), expected, atol=1e-5)


def test_hugging_face_files_and_both_generations_of_names(torch, hugging, tmp_path):
    theirs = hugging()
    theirs.save_pretrained(tmp_path / "folder")
    lone = tmp_path / "lone.safetensors"
    (tmp_path / "folder" / "model.safetensors").rename(lone)
    torch.save(theirs.state_dict(), tmp_path / "memory.pt")  # with the names of transformers 5
    expected = hugging_logits(torch, theirs)
    for path in (lone, tmp_path / "memory.pt"):
        got = vit_jax.load_weights(path, num_heads=3)
        assert got.model["norm_eps"] == 1e-12
        np.testing.assert_allclose(logits_of(got), expected, atol=1e-5)
    assert {vit_jax.load_weights(p, num_heads=3).kind for p in (lone, tmp_path / "memory.pt")} == {
        "huggingface",
        "huggingface 5",
    }


def test_hugging_face_model_for_images_that_are_not_square(torch, hugging, tmp_path):
    theirs = hugging(image_size=[8, 24])
    theirs.save_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 8, 24, 3)).astype(np.float32)
    got = vit_jax.load_weights(tmp_path)
    assert got.grid == (2, 6)
    np.testing.assert_allclose(
        logits_of(got, images), hugging_logits(torch, theirs, images), atol=1e-5
    )


def test_hugging_face_backbone_has_no_head(hugging, tmp_path):
    hugging().vit.save_pretrained(tmp_path)
    got = vit_jax.load_weights(tmp_path)
    assert got.num_classes == 0 and "head" not in got.params
    with pytest.raises(UserError, match="has no head"):
        got.make_model()


def timm_logits(torch, tensors, images):
    """Computes the forward pass of timm's VisionTransformer, by its names, in torch operations."""
    F = torch.nn.functional
    t = {name: torch.as_tensor(array) for name, array in tensors.items()}

    def linear(x, name):
        return F.linear(x, t[f"{name}.weight"], t[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], 1e-6)

    x = torch.tensor(images).permute(0, 3, 1, 2)
    x = F.conv2d(x, t["patch_embed.proj.weight"], t["patch_embed.proj.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2)
    if "cls_token" in t:
        x = torch.cat([t["cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + t["pos_embed"]
    for i in range(2):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        qkv = qkv.unflatten(2, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + linear(y, f"blocks.{i}.attn.proj") * t.get(f"blocks.{i}.ls1.gamma", 1)
        y = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + linear(y, f"blocks.{i}.mlp.fc2") * t.get(f"blocks.{i}.ls2.gamma", 1)
    x = norm(x, "norm")
    x = x[:, 0] if "cls_token" in t else x.mean(1)
    if "pre_logits.fc.weight" in t:
        x = torch.tanh(linear(x, "pre_logits.fc"))
    return linear(x, "head").numpy()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("fields", [{}, {"pool": "gap"}, {"layer_scale": 1.0}, {"pre_logits": 8}])
def test_timm_layout(torch, tmp_path, fields, suffix):
    from safetensors.numpy import save_file

    _, params = random_model(image_shape=(16, 16, 3), norm_eps=1e-6, **fields)
    tensors = layouts.from_params(params, layouts.TIMM, num_heads=3)
    path = tmp_path / f"timm{suffix}"
    if suffix == ".pth":  # nested, as DeiT's are
        torch.save({"model": {k: torch.tensor(v) for k, v in tensors.items()}}, path)
    else:
        save_file(tensors, path)
    got = vit_jax.load_weights(path, num_heads=3)
    assert got.kind == "timm" and same_bits(got.params, params)
    np.testing.assert_allclose(logits_of(got), timm_logits(torch, tensors, IMAGES), atol=1e-5)


def test_half_precision_becomes_float32(torch, tmp_path):
    from safetensors.torch import save_file

    _, params = random_model(image_shape=(16, 16, 3))
    tensors = layouts.from_params(params, layouts.TIMM, num_heads=3)
    for dtype in (torch.float16, torch.bfloat16):
        half = {k: torch.tensor(v).to(dtype) for k, v in tensors.items()}
        save_file(half, tmp_path / "f.safetensors")
        torch.save(half, tmp_path / "f.pt")
        for name in ("f.safetensors", "f.pt"):
            got = vit_jax.load_weights(tmp_path / name, num_heads=3).params
            expected = half["head.weight"].float().numpy().T
            np.testing.assert_array_equal(got["head"]["kernel"], expected)
            assert got["head"]["kernel"].dtype == np.float32


def test_notebook_file(torch, reference, tmp_path):
    torch.manual_seed(0)
    theirs = reference.VisionTransformer().eval()
    with torch.no_grad():
        theirs.cls_token.normal_()
        theirs.pos_embed.normal_()
    torch.save(theirs.state_dict(), tmp_path / "vit.pt")
    got = vit_jax.load_weights(tmp_path / "vit.pt")
    assert (got.model["num_heads"], got.model["norm_eps"], got.grid) == (8, 1e-5, (8, 8))
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(logits_of(got, images), expected, atol=1e-5)
    assert same_bits(
        {k: v.numpy() for k, v in params_to_notebook(got.params).items()},
        {k: v.numpy() for k, v in theirs.state_dict().items()},
    )


class Payload:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("executed"),))


def test_torch_files_that_are_corrupted_or_contain_code_are_rejected(torch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pathlib.Path("f.pt")

    def rejection():
        with pytest.raises(UserError, match=r"f\.pt") as error:
            vit_jax.load_weights(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    torch.save({"weight": torch.zeros(3)}, path)
    assert "its names are weight" in rejection()
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2], pickle.dumps(Payload())):
        path.write_bytes(content)
        assert "is corrupted, or contains more than arrays" in rejection()
    for thing in ({"model": Payload()}, Payload(), torch.nn.Linear(2, 2)):
        torch.save(thing, path)
        assert "pickled code is never run" in rejection()
    assert not pathlib.Path("executed").exists()
    torch.save([torch.zeros(3)], path)
    assert "must be a state_dict, got list" in rejection()
    torch.save({"weight": torch.zeros(3), "epoch": 3}, path)
    assert "epoch has type int" in rejection()
    torch.save({"weight": torch.zeros(3, dtype=torch.int64)}, path)
    assert "weight has type int64" in rejection()


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("grid", "new"), [((14, 14), (24, 24)), ((4, 7), (9, 3)), ((8, 8), (3, 5)), ((1, 4), (3, 1))]
)
def test_positions_are_resized_as_in_torch(torch, method, grid, new):
    table = np.random.default_rng(0).normal(size=(1, 1 + grid[0] * grid[1], 6)).astype(np.float32)
    got = resize_positions(table, grid, new, method)
    square = torch.tensor(table[:, 1:]).reshape(1, *grid, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(
        square, size=new, mode=method, align_corners=False, antialias=False
    )
    expected = expected.permute(0, 2, 3, 1).reshape(1, -1, 6).numpy()
    np.testing.assert_allclose(got[:, 1:], expected, atol=1e-5)
    assert (got[:, :1] == table[:, :1]).all()


def test_positions_are_resized_as_in_transformers(torch, hugging, tmp_path):
    theirs = hugging()
    theirs.save_pretrained(tmp_path)
    got = vit_jax.load_weights(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 24, 32, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        expected = theirs(pixels, interpolate_pos_encoding=True).logits.numpy()
    params = dict(got.params)
    params["pos_embed"] = resize_positions(params["pos_embed"], got.grid, (6, 8), "bicubic")
    logits = got.make_model().apply({"params": params}, images)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
