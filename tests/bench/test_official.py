"""`--against official-dino`: with a stand-in for the official code, which has its names and is made of our own modules."""

import json
import sys
from pathlib import Path

import pytest
from shrinking import ROOT, shrunk

from glpretrain.cli import main

FILES = {
    "utils": """
        from torch import nn
        CALLED = []
        class MultiCropWrapper(nn.Module):
            def __init__(self, backbone, head):
                super().__init__()
                self.backbone, self.head = backbone, head
            def forward(self, images):
                CALLED.append(len(images))
                return self.head(torch.cat([self.backbone(image).cls for image in images]))
        def get_params_groups(model):
            return [{"params": [one for one in model.parameters() if one.requires_grad]}]
        def clip_gradients(model, clip):
            CALLED.append(f"clip {clip}")
        def cancel_gradients_last_layer(epoch, model, freeze_last_layer):
            assert epoch >= freeze_last_layer
        """,
    "vision_transformer": """
        import utils
        from glpretrain.encoders import ViT
        from glpretrain.training.heads import ProjectionHead
        from glpretrain.training.prototypes import Prototypes
        class Dense(Prototypes):
            def forward(self, projections):
                return super().forward(projections).dense()
        def VisionTransformer(*, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, drop_path_rate, norm_layer):
            name, sizes = "vit_tiny_patch16_224", dict(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
            return ViT(name, img_size=img_size[0], mlp_ratio=mlp_ratio, drop_path_rate=drop_path_rate, **sizes)
        def DINOHead(in_dim, out_dim, *, norm_last_layer, nlayers, hidden_dim, bottleneck_dim):
            layers = ProjectionHead(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=nlayers)
            return torch.nn.Sequential(layers, Dense(bottleneck_dim, num_prototypes=out_dim + MORE, train_gain=not norm_last_layer))
        """,
    "main_dino": """
        import torch.distributed as dist
        import utils
        import vision_transformer as vits
        from vision_transformer import DINOHead
        class DINOLoss(torch.nn.Module):
            def __init__(self, out_dim, ncrops, warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs):
                super().__init__()
                self.ncrops = ncrops
            def forward(self, student_output, teacher_output, epoch):
                dist.all_reduce(teacher_output)
                assert dist.get_world_size() == 1 and not teacher_output.requires_grad
                with open("ran", "a") as file:
                    print(self.ncrops, *utils.CALLED, file=file)
                utils.CALLED.clear()
                return student_output.square().mean()
        """,
}


def write_code(folder: Path, *, more: int = 0) -> Path:
    folder.mkdir()
    for name, text in FILES.items():
        lines = [line.removeprefix("        ") for line in text.splitlines()]
        (folder / f"{name}.py").write_text("\n".join(["import torch", f"MORE = {more}", *lines]))
    return folder


@pytest.fixture(autouse=True)
def in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_both_codes_compute_the_same_views_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_code(tmp_path / "code")
    recipe = shrunk(ROOT / "dino.yaml", tmp_path)
    before = list(sys.path), set(sys.modules)
    assert main(["bench", str(recipe), "--against", "official-dino", "code", "--steps", "3", "--json", "both.json"]) == 0
    compared = json.loads(Path("both.json").read_text())["compared"]
    assert compared["speed"] == pytest.approx(compared["official_milliseconds"] / compared["milliseconds"])
    # One allocator, networks of the same sizes, and no chunk or logits that only one of them has.
    assert compared["taken_bytes"] == pytest.approx(compared["official_taken_bytes"], rel=0.5)
    first, *rest = Path("ran").read_text().splitlines()
    assert first == "4 2 4" and len(rest) == 2 + 3 + 2 - 1 and set(rest) == {"4 clip 3.0 2 4"}  # all views; the teacher's, the student's
    assert sys.path == before[0] and not {"utils", "vision_transformer", "main_dino"} & (set(sys.modules) - before[1])
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("mmc", "code", "bench: official-dino beside MMC of ViT; accepted: DINO of ViT"),
        ("dino", "more", "parameters and the recipe"),
    ],
)
def test_other_work_is_not_compared(name: str, code: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_code(tmp_path / "code")
    write_code(tmp_path / "more", more=1)
    assert main(["bench", str(shrunk(ROOT / f"{name}.yaml", tmp_path)), "--against", "official-dino", code]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["official-dino", "nowhere"], "bench: nowhere has no main_dino.py; accepted: a clone of facebookresearch/dino"),
        (["official-dino"], "bench: --against official-dino; accepted: official-dino PATH, a clone of facebookresearch/dino"),
        (["lightly", "code"], "bench: --against lightly code; accepted: official-dino PATH"),
    ],
)
def test_a_wrong_place_of_the_code_is_refused_before_anything_is_built(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "dino", "--against", *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
