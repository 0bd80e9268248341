"""What decides how slides are cut."""

from typing import Literal, NamedTuple


class Settings(NamedTuple):
    """Size, resolution, tissue and format of tiles; one folder holds tiles of one kind."""

    size: int = 224  # pixels of a tile's side
    mpp: float = 0.5  # microns along one pixel of a tile
    overlap: int = 0  # pixels that neighbours share
    min_tissue: float = 0.5  # least share of tissue
    format: Literal["jpg", "png"] = "jpg"
    quality: int = 90  # of JPEG
    per_shard: int = 2048  # tiles
    mpp_of_slide: float | None = None  # microns along a pixel of level 0, for slides that do not say

    def checked(self) -> "Settings":
        """These settings, when each is in range.

        Raises:
            ValueError: one is not.
        """
        accepted = {
            "size": (self.size >= 16, "at least 16 pixels"),
            "mpp": (0.05 <= self.mpp <= 100, "0.05 to 100 microns per pixel"),
            "overlap": (0 <= self.overlap < self.size, f"0 to {self.size - 1}, less than size"),
            "min_tissue": (0 <= self.min_tissue <= 1, "a share in [0, 1]"),
            "format": (self.format in ("jpg", "png"), "jpg or png"),
            "quality": (1 <= self.quality <= 100, "1 to 100"),
            "per_shard": (self.per_shard >= 1, "at least 1 tile"),
            "mpp_of_slide": (self.mpp_of_slide is None or 0.05 <= self.mpp_of_slide <= 20, "0.05 to 20 microns per pixel"),
        }
        for name, (good, values) in accepted.items():
            if not good:
                raise ValueError(f"{name}: {self._asdict()[name]}; accepted: {values}")
        return self
