"""What the reports over dataset svd share: which matrices, and how they are named."""

from __future__ import annotations

from typing import Literal, get_args

Matrix = Literal["W_QK", "W_OV", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"]
ALL_MATRICES: tuple[Matrix, ...] = get_args(Matrix)
