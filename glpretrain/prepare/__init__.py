"""Commands that turn raw files into folders to train on: whole-slide images into tiles, photographs into faces."""

__all__: list[str] = []
