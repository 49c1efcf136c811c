"""lakebed: a columnar data lake of how transformer circuits form during training."""

__version__ = "0.1.0"
