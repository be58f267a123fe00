"""What the screen reads, and the bound on its error: `vqtriton.planes` makes and derives them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CodePlanes(NamedTuple):
    """Codebooks in the form that the tensor-core screen reads."""

    codes: Tensor  # [H, K, inner] fp16, K padded, in the order of the columns
    # [H, K] fp32, (‖e_k‖² − E²)/2, or −E²/2 for dot products, likewise; PAD_OFFSET: no finite code
    offset: Tensor
    mean: Tensor  # [H, D] fp32
    scale: Tensor  # [H] fp32, a power of two
    # [H, P, 4] fp32: upper bounds of E, of max ‖low part of e_k‖ and of max ‖residual of e_k‖, and
    # the E²/2 that is in `offset`. Each program may have written a row: the largest value holds.
    norms: Tensor
    group: int  # codes in a group: group j is codes [j·group, (j + 1)·group)
    lanes: int  # threads that share a row of an accumulator
    vec: int  # columns that follow one another in a thread
    is_split: bool  # inner is (high, low, high, bias) per dimension, (low, high, high, weight) in x
    has_bias_columns: bool  # three inner columns hold the bias
    is_dot: bool = False  # scores are dot products: the mean is 0

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What must be kept to make it again with `planes_of`."""
        return self.codes, self.offset, self.mean, self.scale, self.norms


class ScreenBound(NamedTuple):
    """What `vqtriton.kernels.screen_codes` turns into the bound of a row."""

    products: float  # times (‖x_h‖ + ‖x_l‖ + ‖δx‖)·E
    bias: float  # times E²
    distances: float  # times (‖x_h‖ + ‖x_l‖ + ‖δx‖)²
    tiny: float


class OwnBound(NamedTuple):
    """|score error| ≤ products·(‖y‖·E + E²/2) + distances·‖y‖² + tiny, with E = max ‖e_k‖."""

    products: float
    distances: float
    tiny: float
