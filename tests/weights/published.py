"""Checkpoint files in the layouts that others publish, with weights from a formula."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from golden import load, noise, official_weights
from safetensors.torch import save_file

NAMES = (
    "dino",
    "ibot",
    "mugs",
    "mae",
    "fsfm",
    "dinov2",
    "dinov2_registers",
    "dinov2_gated",
    "dinov3",
    "dinov3_gated",
    "dinov3_keys",
    "mocov3",
    "msn",
    "hf_vit",
    "hf_vit_mae",
    "hf_vit_msn",
    "hf_dinov2",
    "hf_dinov2_gated",
    "hf_dinov2_with_registers",
    "hf_dinov3_vit",
    "hf_dinov3_vit_gated",
    "hf_dinov3_vit_keys",
)
HEAD = {"head.mlp.0.weight": torch.ones(8, 4), "head.last_layer.weight_g": torch.ones(8, 1)}


def reference(name):
    """Golden numbers of a format."""
    return load(f"import_{name}")


def weights_of(name):
    """The official model's state dict."""
    return official_weights(reference(name)["shapes"])


def image(size):
    """Float[1 3 H W], as the numbers were made with."""
    height, width = size
    return 1.7 * noise(1, 3, height, width, name=f"image {height} {width}")


def timm_features(model, items):
    """What a model of timm itself computes."""
    forward_features = model.forward_features
    assert callable(forward_features)
    features = forward_features(items)
    assert isinstance(features, torch.Tensor)
    return features


def write(name, folder, *, weights=None):
    """Write the official weights of a format as its authors' code saves or publishes them, and return where."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights_of(name) if weights is None else weights
    if name.startswith("hf_"):
        (folder / "config.json").write_text(json.dumps(reference(name)["config"]))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    return _save(name, weights, folder / f"{name}.pth")


def _save(name: str, weights: dict[str, torch.Tensor], path: Path):
    if name in ("dino", "ibot", "mugs"):
        content = multicrop(weights, loss={"dino": "dino_loss", "ibot": "ibot_loss", "mugs": "student_mem"}[name])
    elif name in ("mae", "fsfm"):
        content = {"model": weights, "optimizer": {"state": {}}, "epoch": 799, "args": argparse.Namespace(lr=1e-3, output_dir="out")}
    elif name == "dinov2_gated":  # as its trainer writes the teacher
        content = {"teacher": {f"backbone.{key}": tensor for key, tensor in weights.items()} | {"dino_head.mlp.0.weight": torch.ones(2, 2)}}
    elif name == "mocov3":
        content = {"epoch": 300, "arch": "vit_small", "state_dict": {f"module.{key}": tensor for key, tensor in weights.items()}}
    elif name == "msn":
        student = {f"module.{key}": torch.zeros_like(tensor) for key, tensor in weights.items()}
        content = {
            "encoder": student,
            "target_encoder": {f"module.{key}": tensor for key, tensor in weights.items()},
            "epoch": 1,
            "lr": 0.1,
        }
    else:  # the published file of DINOv2 and DINOv3 is the state dict and nothing else
        content = weights
    torch.save(content, path)
    return path


def multicrop(weights, *, loss):
    """A training checkpoint of DINO and its descendants: both sides with heads, arguments, and what numpy left in the optimizer."""
    teacher = {f"backbone.{name}": tensor for name, tensor in weights.items()} | HEAD
    student = {f"module.backbone.{name}": 0.5 * tensor for name, tensor in weights.items()} | {f"module.{k}": v for k, v in HEAD.items()}
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.0005), "weight_decay": np.linspace(0, 1, 3)[1]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny", lr=0.0005, output_dir=Path("out")),
        loss: {"center": torch.zeros(1, 8)},
    }
