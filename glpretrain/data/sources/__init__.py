"""Sources of items, one file per kind of file or of synthetic data; `glpretrain.data` exports them."""
