"""Methods, one per file. A recipe names the class of its method."""

from glpretrain.methods.asit import ASiT
from glpretrain.methods.dcglr import DCGLR
from glpretrain.methods.dino import DINO
from glpretrain.methods.fsfm import FSFM
from glpretrain.methods.gpfm import GPFM
from glpretrain.methods.hybrid import HybridDistillation
from glpretrain.methods.ibot import IBOT
from glpretrain.methods.local_contrast import LocalContrast
from glpretrain.methods.mae import MAE
from glpretrain.methods.mask_embed import MaskEmbed
from glpretrain.methods.mmc import MMC
from glpretrain.methods.mugs import Mugs
from glpretrain.methods.point_mae import PointMAE

__all__ = [
    "DCGLR",
    "DINO",
    "FSFM",
    "GPFM",
    "IBOT",
    "MAE",
    "MMC",
    "ASiT",
    "HybridDistillation",
    "LocalContrast",
    "MaskEmbed",
    "Mugs",
    "PointMAE",
]
