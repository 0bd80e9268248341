"""`--against`: with stand-ins for official code and for lightly, which have their names and are made of our own modules."""

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


IBOT_FILES = {
    "utils": FILES["utils"],
    "loader": "",
    "models.__init__": "from models.vision_transformer import VisionTransformer",
    "models.vision_transformer": """
        from glpretrain.encoders import ViT
        class VisionTransformer(ViT):
            def __init__(self, *, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, qkv_bias, drop_path_rate, norm_layer,
                         return_all_tokens, masked_im_modeling):
                sizes = dict(patch_size=patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
                super().__init__("vit_tiny_patch16_224", img_size=img_size[0], mlp_ratio=mlp_ratio, drop_path_rate=drop_path_rate, **sizes)
                if masked_im_modeling:
                    self.add_mask_token()
                self.masked_im_modeling = masked_im_modeling
        """,
    "models.head": """
        from glpretrain.training.heads import ProjectionHead
        from glpretrain.training.prototypes import Prototypes
        class iBOTHead(torch.nn.Sequential):
            def __init__(self, in_dim, out_dim, *, patch_out_dim, shared_head, norm_last_layer, nlayers, hidden_dim, bottleneck_dim):
                assert shared_head and patch_out_dim == out_dim
                layers = ProjectionHead(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=nlayers)
                super().__init__(layers, Prototypes(bottleneck_dim, num_prototypes=out_dim, train_gain=not norm_last_layer))
        """,
    "main_ibot": """
        import torch.distributed as dist
        import models
        import utils
        from munkres import Munkres
        from tensorboardX import SummaryWriter
        from models.head import iBOTHead
        def forward(self, images, mask=None):
            hidden = self.backbone.masked_im_modeling
            assert hidden == (mask is not None)
            utils.CALLED.append(f"{len(images)} {'hidden' if hidden else 'seen'}")
            mask = None if mask is None else [one.flatten(1) for one in mask]
            outputs = self.backbone(list(images), mask=mask)
            rows = [torch.cat([getattr(one, name).flatten(0, -2) for one in outputs]) for name in ("cls", "patches")]
            return tuple(self.head(one).dense() for one in rows)
        utils.MultiCropWrapper.forward = forward
        class iBOTLoss(torch.nn.Module):
            def __init__(self, out_dim, patch_out_dim, ngcrops, nlcrops, *rest):
                super().__init__()
                self.sizes = (ngcrops, nlcrops)
            def forward(self, student_output, teacher_output, local, masks, epoch):
                assert len(masks) == 2 and masks[0].dtype == torch.bool and masks[0].dim() == 3
                with open("ran", "a") as file:
                    print(*self.sizes, *utils.CALLED, sep=", ", file=file)
                utils.CALLED.clear()
                return {"loss": sum(one.square().mean() for one in (*student_output, local))}
        """,
}
LIGHTLY_FILES = {
    "lightly.__init__": "",
    "lightly.loss": """
        class DINOLoss(torch.nn.Module):
            def __init__(self, *, output_dim, warmup_teacher_temp_epochs):
                super().__init__()
            def forward(self, teacher_output, student_output, *, epoch):
                with open("ran", "a") as file:
                    print(len(teacher_output), len(student_output), file=file)
                return torch.stack([one.square().mean() for one in student_output]).sum()
        """,
    "lightly.models.__init__": "",
    "lightly.models.modules": """
        from glpretrain.training.heads import ProjectionHead
        from glpretrain.training.prototypes import Prototypes
        class DINOProjectionHead(torch.nn.Sequential):
            def __init__(self, in_dim, hidden_dim, bottleneck_dim, out_dim, *, freeze_last_layer, norm_last_layer):
                layers = ProjectionHead(in_dim, hidden_dim=hidden_dim, bottleneck_dim=bottleneck_dim, num_layers=3)
                super().__init__(layers, Prototypes(bottleneck_dim, num_prototypes=out_dim, train_gain=not norm_last_layer))
            def forward(self, features):
                return super().forward(features).dense()
            def cancel_last_layer_gradients(self, *, current_epoch):
                assert current_epoch == 1
        """,
    "lightly.models.utils": """
        def deactivate_requires_grad(model):
            model.requires_grad_(False)
        def update_momentum(model, teacher, *, m):
            assert m == 0.996 and not any(one.requires_grad for one in teacher.parameters())
        """,
}


def write_code(folder: Path, *, more: int = 0, files: dict[str, str] = FILES) -> Path:
    for name, text in files.items():
        lines = [line.removeprefix("        ") for line in text.splitlines()]
        path = folder / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(["import torch", f"MORE = {more}", *lines]))
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
def test_ibot_hides_tokens_of_global_views_only(tmp_path: Path) -> None:
    write_code(tmp_path / "code", files=IBOT_FILES)
    before = set(sys.modules)
    recipe = str(shrunk(ROOT / "ibot.yaml", tmp_path))
    assert main(["bench", recipe, "--against", "official-ibot", "code", "--steps", "2", "--json", "both.json"]) == 0
    first, *rest = Path("ran").read_text().splitlines()
    assert first == "2, 2, 2 seen, 2 hidden, 2 seen" and len(rest) == 2 + 2 + 2 - 1
    assert set(rest) == {"2, 2, clip 3.0, 2 seen, 2 hidden, 2 seen"}
    assert json.loads(Path("both.json").read_text())["other"] == "official-ibot"
    assert not {"utils", "models", "models.head", "main_ibot", "munkres", "tensorboardX"} & (set(sys.modules) - before)


@pytest.mark.slow
def test_lightly_sees_view_by_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_code(tmp_path / "site", files=LIGHTLY_FILES)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["bench", str(shrunk(ROOT / "dino.yaml", tmp_path)), "--against", "lightly", "--steps", "2"]) == 0
    assert Path("ran").read_text().splitlines() == ["2 4"] * (2 + 2 + 2)
    assert "lightly" in capsys.readouterr().out
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightly"]:
        del sys.modules[name]


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
        (["official-dino"], "bench: --against official-dino; accepted: lightly, official-dino PATH, official-ibot PATH, where PATH is"),
        (["official-mae", "code"], "bench: --against official-mae given; accepted: official-dino, official-ibot, each followed by"),
        (["lightly"], "bench: --against lightly needs the package lightly, which is not installed; install it (pip install lightly)"),
    ],
)
def test_a_wrong_place_of_the_code_is_refused_before_anything_is_built(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "dino", "--against", *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
