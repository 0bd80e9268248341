"""Numbers made of predictions and truth, and how sure they are. Modules are imported by their own names."""

__all__: list[str] = []
