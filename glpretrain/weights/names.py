"""Published layouts: how other code names the tensors of an encoder, in one table that is read in both directions.

`Layout.to_timm` renames the tensors of a checkpoint to our names, which are timm's for images; `Layout.from_timm` renames them back for
an export to Hugging Face transformers.
Left out: finding out which layout a file has (`formats`), and reading and writing files (`published`, `exports`).
"""

import re
from dataclasses import dataclass, field, replace

import torch

from glpretrain.encoders.timm_model import PositionResize
from glpretrain.weights.files import State

# Attention heads of the published models by width.
_HEADS = {192: 3, 384: 6, 512: 8, 640: 10, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1536: 24, 1664: 16}
_POINT_HEADS = {192: 4, 384: 6, 512: 8}

Statistics = tuple[list[float], list[float]] | tuple[None, None]
# DINOv3's models of satellite images, which are recognised by their file name.
SATELLITE: Statistics = ([0.430, 0.411, 0.296], [0.213, 0.156, 0.143])
# FSFM's main training set; models of other data have theirs in a text file beside the checkpoint.
_VGGFACE2: Statistics = (
    [0.5482207536697388, 0.42340534925460815, 0.3654651641845703],
    [0.2789176106452942, 0.2438540756702423, 0.23493893444538116],
)
# AudioSet's filterbanks: mean and twice the standard deviation, in AST's dataloader.py and ASiT's data_transformations.py.
_AUDIOSET: Statistics = ([-4.2677393], [2 * 4.5689974])

# What stands before the names within a block: "blocks.3." in most files, "blocks.0.3." where DINOv2's training wraps blocks in chunks,
# "blocks.blocks.3." in Point-MAE's files; "encoder.layer.3.", "layer.3." or "layers.3." in those of Hugging Face.
_BLOCK = re.compile(r"blocks\.(?:\d+\.|blocks\.)?(\d+)\.")
_HUGGINGFACE_BLOCK = re.compile(r"(?:encoder\.)?layers?\.(\d+)\.")
# Hugging Face's classes with a head put one of these before the names of the encoder.
_MODELS = "vit|dinov2|dinov2_with_registers|dinov3_vit|audio_spectrogram_transformer|model"
_WRAPPER = re.compile(rf"^(?:(?:{_MODELS})\.)+(?=embeddings|encoder|layer|norm|pooler)")


@dataclass(frozen=True)
class Layout:
    """One published layout: its names, and what cannot be read off the tensors.

    Args:
        title: name of the layout as people write it.
        position_resize: how the layout's own code resizes learned positions to another image size.
        pretraining: regular expression for the start of names that only pretraining or classification needs.
        names: our name of a module or parameter, within a block or outside, and the published name; names that are equal may be left out
            where `architecture` is empty.
        gated: names that replace those in `names` where the MLPs are gated (SwiGLU).
        block: what stands before the published names within a block; {} is the number of the block.
        architecture: class of Hugging Face transformers that opens this layout; empty for the files of other code.
        heads: attention heads of the published models by width.
        statistics: mean and std of the training data; None stands for ImageNet's.
        modality: name of the kind of items that the layout's models see as images.
    """

    title: str
    position_resize: PositionResize = "timm"
    pretraining: str = r"(?!)"
    names: dict[str, str] = field(default_factory=dict)
    gated: dict[str, str] = field(default_factory=dict)
    block: str = "blocks.{}."
    architecture: str = ""
    heads: dict[int, int] = field(default_factory=lambda: _HEADS)
    statistics: Statistics = (None, None)
    modality: str = "image"

    def to_timm(self, state: State, *, gated: bool = False) -> State:
        """Tensors of a file under our names; names without an entry in the table stay as they are.

        Args:
            state: tensors under the published names.
            gated: whether the MLPs are gated, for layouts in which one published name then means something else.
        """
        # Where a name occurs twice, the later entry counts.
        first, last = (self.names, self.gated) if gated else (self.gated, self.names)
        pairs = [*(_NEWER if self.architecture else {}).items(), *first.items(), *last.items()]
        ours = {published: own for own, published in pairs}
        renamed: State = {}
        for name, tensor in state.items():
            if self.architecture:
                name = _WRAPPER.sub("", name)
                block, inner = _split(name, _HUGGINGFACE_BLOCK)
                found = _translate(inner, ours)
            else:
                block, inner = _split(name, _BLOCK)
                found = _translate(inner, ours) or inner
            renamed[name if found is None else f"blocks.{block}.{found}" if block else found] = tensor
        if "attn.q" in self.names:
            _join_qkv(renamed)
        if "reg_token" in self.names and {"reg_token", "cls_token", "pos_embed"} <= renamed.keys():
            # timm's models with registers add positions to patches only, so the position of the class token becomes part of the token.
            positions = renamed["pos_embed"]
            renamed |= {"cls_token": renamed["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
        return renamed

    def from_timm(self, state: State, *, gated: bool) -> tuple[State, list[str]]:
        """Inverse of `to_timm` for the layouts of Hugging Face, except that the position of the class token stays in the token.

        Args:
            state: tensors under timm's names, with a class token.
            gated: whether the MLPs are gated.

        Returns:
            The tensors under the published names, and the names for which the layout has no place.
        """
        published = self.names | (self.gated if gated else {})
        renamed: State = {}
        unknown: list[str] = []
        for name, tensor in state.items():
            block, inner = _split(name, _BLOCK)
            before = self.block.format(block) if block else ""
            if inner.startswith("attn.qkv.") and len(tensor) == 3 * state["cls_token"].shape[-1]:
                leaf = inner.removeprefix("attn.qkv")
                parts = zip(self.qkv, tensor.tensor_split(3), strict=True)
                renamed |= {f"{before}{part}{leaf}": piece for part, piece in parts}
            elif (found := _translate(inner, published)) is not None:
                renamed[before + found] = tensor
            else:
                unknown.append(name)
        return renamed, unknown

    @property
    def qkv(self) -> tuple[str, str, str]:
        """Published names of the layers that make queries, keys and values, within a block."""
        return self.names["attn.q"], self.names["attn.k"], self.names["attn.v"]

    @property
    def scales(self) -> tuple[str, ...]:
        """Published names of the layer scales behind attention and MLP, within a block; none where a layout has no layer scale."""
        return tuple(self.names[own] for own in ("ls1.gamma", "gamma_1", "ls2.gamma", "gamma_2") if own in self.names)


def _split(name: str, block: re.Pattern[str]) -> tuple[str, str]:
    """The number of the block, empty outside the blocks, and the rest of the name."""
    found = block.match(name)
    return (found[1], name[found.end() :]) if found else ("", name)


def _translate(name: str, table: dict[str, str]) -> str | None:
    """A name whose start, cut at a dot, is replaced by the longest entry of the table; None where there is no entry."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if (start := ".".join(parts[:count])) in table:
            return table[start] + name[len(start) :]
    return None


def _join_qkv(state: State) -> None:
    """Put queries, keys and values into one tensor wherever all three are there, as timm keeps them; biases also where those of queries
    and of values have names of their own."""
    for key in [name for name in state if re.match(r"blocks\.\d+\.attn\.k\.bias$", name)]:
        names = [key.replace(".attn.k.bias", f".attn.{part}") for part in ("q_bias", "k.bias", "v_bias")]
        if all(name in state for name in names):
            state[key.replace(".attn.k.", ".attn.qkv.")] = torch.cat([state.pop(name) for name in names])
    for query in [name for name in state if re.match(r"blocks\.\d+\.attn\.q\.", name)]:
        names = [query.replace(".attn.q.", f".attn.{part}.") for part in ("q", "k", "v")]
        if all(name in state for name in names):
            state[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(name) for name in names])


# The published files, by the name that `load_backbone` takes as `format`.
FILES = {
    "dino": Layout("DINO", "dino", r"head\."),
    "ibot": Layout("iBOT", "dino", r"head\.|masked_embed$", {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}),
    "mugs": Layout("Mugs", "dino", r"(instance_|local_group_|group_)?head\.|relation_blocks\."),
    "mae": Layout("MAE", "bicubic", r"decoder_|mask_token$"),
    "fsfm": Layout(
        "FSFM",
        "bicubic",
        r"(rep_)?decoder_|mask_token$|projector\.|predictor\.",
        heads=_HEADS | {384: 12},
        statistics=_VGGFACE2,
    ),
    "deit": Layout("DeiT", "bicubic", r"head\."),  # also MAE after fine-tuning, and converted MoCo v3 (which needs num_heads=12)
    "dinov2": Layout(
        "DINOv2",
        "dino",
        r"mask_token$|dino_head\.|ibot_head\.",
        {"reg_token": "register_tokens", "mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"},
    ),
    "dinov3": Layout(
        "DINOv3",
        "timm",
        r"mask_token$|dino_head\.|ibot_head\.|local_cls_norm\.|rope_embed\.",
        {
            "reg_token": "storage_tokens",
            "gamma_1": "ls1.gamma",
            "gamma_2": "ls2.gamma",
            "mlp.fc1_g": "mlp.w1",
            "mlp.fc1_x": "mlp.w2",
            "mlp.fc2": "mlp.w3",
        },
        heads={384: 6, 768: 12, 1024: 16, 1152: 18, 1280: 20, 1536: 24, 4096: 32},
    ),
    "mocov3": Layout("MoCo v3", "bicubic", r"head\.", heads={384: 12, 768: 12}),
    "msn": Layout("MSN", "bicubic", r"(fc|pred)\."),
    "asit": Layout("ASiT", "bicubic", r"head\.", statistics=_AUDIOSET, modality="audio"),
    "ast": Layout("AST", "timm", r"(head|head_dist)\.", statistics=_AUDIOSET, modality="audio"),
    "timm": Layout("timm", "timm", r"(head|head_dist|attn_pool|fc|classifier)\."),
}

# Point transformers. (CONCH has no entry: after a prefix its names are timm's.)
_POINT_PRETRAINING = r"cls_head|lm_head|mask_token|pos_embedding\.|head\."
POINT_MAE = Layout(
    "Point-MAE",
    pretraining=_POINT_PRETRAINING,
    names={
        "tokens.first": "encoder.first_conv",
        "tokens.second": "encoder.second_conv",
        "project": "reduce_dim",
        "position": "pos_embed",
        "cls_position": "cls_pos",
    },
    heads=_POINT_HEADS,
)
POS_BERT = Layout(
    "POS-BERT",
    pretraining=_POINT_PRETRAINING,
    names={
        f"tokens.{own}.{number}": f"{published}{layer}"
        for own, published in (("first", ""), ("second", "gather_local_0."))
        for number, layer in ((0, "conv1"), (1, "bn1"), (3, "conv2"), (4, "bn2"))
    },
    heads=_POINT_HEADS,
)

# Hugging Face transformers: names of its newer classes, which newer versions of the older ones use too.
_NEWER = {
    "patch_embed.proj": "embeddings.patch_embeddings",
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OLDER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
}
_REGISTERS = {"reg_token": "embeddings.register_tokens"}
_HEADS_AND_MASK = r"pooler\.|classifier\.|decoder\.|embeddings\.mask_token$"
VIT = Layout(
    "Hugging Face vit",
    "bicubic",
    _HEADS_AND_MASK,
    _OLDER | {"norm1": "layernorm_before", "norm2": "layernorm_after", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"},
    block="encoder.layer.{}.",
    architecture="ViTModel",
)
DINOV2 = Layout(
    "Hugging Face dinov2",
    "bicubic",
    _HEADS_AND_MASK,
    {
        **_OLDER,
        **{name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")},
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    },
    gated={"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"},
    block="encoder.layer.{}.",
    architecture="Dinov2Model",
)
DINOV2_REGISTERS = replace(
    DINOV2,
    title="Hugging Face dinov2_with_registers",
    position_resize="timm",
    names=DINOV2.names | _REGISTERS,
    architecture="Dinov2WithRegistersModel",
)
DINOV3 = Layout(
    "Hugging Face dinov3_vit",
    "timm",
    _HEADS_AND_MASK,
    {
        **_NEWER,
        **_REGISTERS,
        "cls_token": "embeddings.cls_token",
        "norm": "norm",
        "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
        "gamma_1": "layer_scale1.lambda1",
        "gamma_2": "layer_scale2.lambda1",
    },
    gated={"mlp.fc1_x": "mlp.up_proj", "mlp.fc1_g": "mlp.gate_proj"},
    block="layer.{}.",
    architecture="DINOv3ViTModel",
)
AST = replace(
    VIT,
    title="Hugging Face audio-spectrogram-transformer",
    position_resize="timm",
    names=VIT.names | {"dist_token": "embeddings.distillation_token"},
    architecture="ASTModel",
    statistics=_AUDIOSET,
    modality="audio",
)
# By the model_type of config.json.
HUGGINGFACE = {
    "vit": VIT,
    "vit_mae": replace(VIT, title="Hugging Face vit_mae", architecture="ViTMAEModel"),
    "vit_msn": replace(VIT, title="Hugging Face vit_msn", architecture="ViTMSNModel"),
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2_REGISTERS,
    "dinov3_vit": DINOV3,
    "audio-spectrogram-transformer": AST,
}
