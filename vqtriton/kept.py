"""A codebook as an earlier search prepared it, for as long as its values stay the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqtriton.functional import PreparedCodebook, prepare_codebook
from vqtriton.tensors import is_traced


class KeptCodebook:
    """What was prepared last. It can be made again, so it is neither copied nor pickled."""

    def __init__(self) -> None:
        # marks of the codebook that was prepared, and the tensor
        self._last: tuple[tuple[Any, ...], Tensor | None, PreparedCodebook] | None = None

    def __reduce__(self) -> tuple[type[KeptCodebook], tuple[()]]:
        return KeptCodebook, ()

    def forget(self) -> None:
        self._last = None

    def of(
        self, codebook: Tensor, *, backend: str, is_frozen: bool = False
    ) -> Tensor | PreparedCodebook:
        """The codebook as it was prepared where it is surely the same, or else as it is.

        On a CPU its values are compared. Elsewhere that would wait for the device, and a write
        through ``.data`` or by a graph leaves no trace, so there only a frozen one is kept.
        """
        is_cpu = codebook.device.type == "cpu"
        if not _is_plain(codebook) or not (is_cpu or is_frozen):
            return codebook
        mark: tuple[Any, ...] = backend, codebook.device
        if not is_cpu:
            if codebook.is_inference():
                # it counts no versions
                return codebook
            mark += codebook.data_ptr(), codebook._version
        if self._last is not None:
            of, _, prepared = self._last
            if of == mark and (not is_cpu or torch.equal(prepared.codebook, codebook)):
                return prepared
        # a later inference may want gradients, for which this one's tensors could not be saved
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare_codebook(codebook, backend=backend)
        # with the tensor, so that no other can come to have its address
        self._last = mark, None if is_cpu else codebook, prepared
        return prepared


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are there and will be: not traced, transformed or captured."""
    return not (
        is_traced()
        or type(tensor) not in (Tensor, nn.Parameter)
        or tensor.is_meta
        # what is prepared in a graph has the memory of the graph
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
