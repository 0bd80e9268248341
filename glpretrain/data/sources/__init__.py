"""Sources of items: what all offer (`base`), and a folder for each kind of item."""

__all__: list[str] = []
