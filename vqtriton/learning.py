"""How a codebook learns: its start, moving averages, revival of dead codes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from vqtriton import clustering, distributed, ops
from vqtriton.checks import check_arguments, check_number
from vqtriton.codebooks import SHARDED, Codebook
from vqtriton.kernels.arguments import Update
from vqtriton.tensors import finite_rows, is_traced

# what `reset_codes` puts between a code and its copy, in standard deviations of the codes
JITTER = 0.01


class LearnedCodebook(Codebook):
    """A codebook that learns in forward. Arguments are those of `vqtriton.VectorQuantize`."""

    # counts and sums of steps that were not applied yet
    _pending: list[Tensor] | None
    # whether a step was seen since the threshold was set
    _is_threshold_checked = False

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int,
        *,
        num_codebooks: int,
        codebook_update: str,
        decay: float,
        kmeans_init: bool,
        kmeans_iters: int,
        threshold_ema_dead_code: float,
        sync_codebook: bool,
        backend: str,
    ) -> None:
        super().__init__(
            codebook_dim,
            codebook_size,
            num_codebooks=num_codebooks,
            codebook_update=codebook_update,
            kmeans_init=kmeans_init,
            backend=backend,
        )
        self.kmeans_iters = kmeans_iters
        self.sync_codebook = sync_codebook
        # [2] float32, 1 - decay and the threshold: on the device, so that a schedule of theirs is
        # no constant of a graph. Made anew from the two numbers when the codebook is elsewhere.
        with torch.inference_mode(False):
            self._rates = torch.empty(2, dtype=torch.float32)
        self.decay = decay
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self._is_broadcast = self._accumulates = False

    @property
    def decay(self) -> float:
        """Of the moving averages, in [0, 1]; may be set at any time."""
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        check_number("decay", value, float, 0, 1)
        if value != vars(self).get("_decay"):
            self._decay = value
            self._rates[0] = 1 - value

    @property
    def threshold_ema_dead_code(self) -> float:
        """Cluster size, in rows a step, below which a code is revived; may be set at any time."""
        return self._threshold

    @threshold_ema_dead_code.setter
    def threshold_ema_dead_code(self, value: float) -> None:
        check_number("threshold_ema_dead_code", value, float, 0)
        # a trainer may set it in each step, and a write is a launch
        if value != vars(self).get("_threshold"):
            self._threshold = value
            self._rates[1] = value
            self._revives = value > 0
            self._is_threshold_checked = False

    @torch.no_grad()
    def _restart(self, which: Tensor, x: Tensor | None) -> None:
        """See `vqtriton.VectorQuantize.reset_codes`; x is [..., D], or [..., H, D]."""
        which = self._mask_of_codes(which)
        if not self._has_codes():
            raise ValueError("codebook has no codes yet: it waits for its k-means start")
        codes = self.codebook.detach()
        parts = [self._by_codebook(tensor) for tensor in (codes, which, self.cluster_size)]
        rows: Sequence[Tensor | None] = [None] * len(parts[0])
        if x is not None:
            check_arguments(x, parts[0][0], precision="exact", backend=self.backend)
            rows = self._by_codebook(self._flat(x.detach()), 1)
        fresh = [
            self._fresh(head, of_head, size, row)
            for head, of_head, size, row in zip(*parts, rows, strict=True)
        ]
        sizes = self.cluster_size.where(~which, self.cluster_size.mean(-1, keepdim=True))
        self._write(self._joined(fresh).where(which[..., None], codes))
        self.cluster_size.copy_(sizes)
        self._renew()

    def _fresh(self, codes: Tensor, which: Tensor, size: Tensor, x: Tensor | None) -> Tensor:
        """[K, D], new values for some codes of one codebook."""
        stay = ~which
        if x is None:
            if not stay.any():
                raise ValueError("which is every code; give the rows x to draw from as well")
            # all sizes may be zero
            weights = size.where(stay, 0) + 1e-20 * stay
            drawn = torch.multinomial(weights, self.codebook_size, replacement=True)
            spread = JITTER * codes[stay].std(0, correction=0)
            return codes[drawn] + spread * torch.randn_like(codes)
        rows = x[finite_rows(x.float())]
        if len(rows) == 0:
            raise ValueError(f"x has {len(x)} rows and no finite row to draw from")
        order = torch.randperm(len(rows), dtype=torch.int64, device=rows.device)
        # with fewer rows than codes some are used again
        order = order.repeat(-(-self.codebook_size // len(order)))
        fresh = torch.empty_like(codes)
        fresh[which] = rows[order[: int(which.sum())]].float()
        return fresh

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Context manager for gradient accumulation: several batches, one step of the codebook.

        Training steps inside only add up their statistics, and the next step outside applies all of
        them. Run all micro-batches but the last one inside, as with DDP's ``no_sync``. Then all
        choose from the same codes. Dead codes are replaced by rows of the last micro-batch.

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128)
            >>> first, last = torch.randn(2, 100, 16)
            >>> with vq.accumulate():
            ...     loss = vq(first).loss
            >>> loss = vq(last).loss  # the codes learn from both
        """
        before, self._accumulates = self._accumulates, True
        try:
            yield
        finally:
            self._accumulates = before

    # --- what forward calls ---

    def _is_trainable(self) -> bool:
        """Whether forward may write codes: not those that are frozen as parameters are."""
        return self.codebook_update == "ema" or any(p.requires_grad for p in self.parameters())

    def _start(self, vectors: Tensor, mask: Tensor | None) -> None:
        """Before a step: the same codebook on every rank, from data if asked for."""
        for tensor in (self.codebook, self.cluster_size):
            # as `load_state_dict` and `setattr` see to, but not an assignment to ``.data``
            if tensor.dtype != torch.float32 and tensor.is_leaf and not self._is_sharded:
                tensor.data = tensor.data.float()
        if torch.compiler.is_compiling() and self.kmeans_init and self._seen is None:
            start_uncompiled(self, vectors, mask)
        else:
            self._start_once(vectors, mask)

    def _start_once(self, vectors: Tensor, mask: Tensor | None) -> None:
        if self._revives and not torch.compiler.is_compiling():
            self._check_threshold(vectors.numel() // self.codebook_dim // (self.num_codebooks or 1))
        must_broadcast = (
            self.sync_codebook and not self._is_broadcast and distributed.world_size() > 1
        )
        if not must_broadcast and self._has_codes():
            return
        # before anything changes or other ranks are waited for
        codebook = self._by_codebook(self.codebook)[0]
        check_arguments(vectors, codebook, mask, precision="exact", backend=self.backend)
        if must_broadcast:
            with torch.no_grad():
                # not state_dict(): FSDP2 has hooks on it that put the shards back. Nor parameters
                # that FSDP1 has made views of its own, which it takes care of
                own = (p for p in self.parameters() if p._base is None)
                distributed.broadcast_([*own, *self.buffers()])
            # a flag and no look at the tensors: all ranks must come to the same answer
            self._is_broadcast, self._seen = True, None
        if not self._has_codes():
            self._start_from_data(vectors.detach(), mask)
            self._has_codes()

    def _check_threshold(self, num_rows: int) -> None:
        """Warns in the first step if most codes would be replaced again and again.

        By shapes alone, so nothing waits for the device; rows that are masked count here.
        """
        if self._is_threshold_checked or self._accumulates or self._pending is not None:
            # of a step that is accumulated the rows are not known
            return
        self._is_threshold_checked = True
        num_rows *= distributed.world_size() if self.sync_codebook else 1
        share, threshold = num_rows / self.codebook_size, self.threshold_ema_dead_code
        if threshold >= share > 0:
            warnings.warn(
                f"threshold_ema_dead_code is {threshold:g}, but this step has only {share:g} rows "
                f"per code ({num_rows} rows, {self.codebook_size} codes): most codes will be "
                f"replaced again and again. Choose 0.1 to 0.4 of the rows per code, which is "
                f"{0.1 * share:.2g} to {0.4 * share:.2g}",
                # who called the module
                stacklevel=8,
            )

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor) -> None:
        """One step of the statistics, and of what follows from them."""
        # not the public function: it checks its arguments, and can be differentiated
        size, parts = self.codebook_size, [self._by_codebook(t, 1) for t in (rows, indices)]
        found = [ops.code_sums(*part, size, self.backend) for part in zip(*parts, strict=True)]

        def draw() -> list[Tensor]:
            drawn = [
                distributed.sample_rows(
                    x, size, keep=(chosen >= 0) & finite_rows(x), sync=self.sync_codebook
                )
                for x, chosen in zip(*parts, strict=True)
            ]
            return [self._joined(tensors) for tensors in zip(*drawn, strict=True)]

        sums, counts = (self._joined(tensors) for tensors in zip(*found, strict=True))
        local = self._collect(sums, counts, draw)
        if local:
            self._step(distributed.all_reduce(local, sync=self.sync_codebook))

    def _collect(
        self, sums: Tensor, counts: Tensor, draw: Callable[[], Sequence[Tensor]]
    ) -> list[Tensor]:
        """What the ranks are to sum for a step; nothing if another batch is to come first.

        ``draw`` gives rows for dead codes, as `vqtriton.distributed.sample_rows` does.
        """
        local = [counts, sums] if self.codebook_update == "ema" else [counts]
        if self._pending is not None:
            local = [now + before for now, before in zip(local, self._pending, strict=True)]
        self._pending = local if self._accumulates else None
        if self._accumulates:
            return []
        return [*local, *draw()] if self._revives else local

    def _step(self, totals: list[Tensor]) -> None:
        """The step, with what `_collect` gave, summed."""
        # one by one, as `counts, *others = totals` gives a compiled step of torch 2.8 a tuple
        counts = totals.pop(0)
        averaged = totals.pop(0) if self.codebook_update == "ema" else None
        is_own = self._owns_codebook()
        codebook = self.codebook if is_own else self.codebook.detach().clone()
        samples, is_filled = totals or (None, None)
        state, rates = (self.cluster_size, codebook), self._rates_here()
        ops.ema_update_(*Update(*state, counts, averaged, samples, is_filled, rates), self.backend)
        if not is_own:
            self._write(codebook)

    @torch.no_grad()
    def _start_from_data(self, vectors: Tensor, mask: Tensor | None) -> None:
        # before k-means takes its time
        self._check_writable()
        heads = self._by_codebook(self._flat(vectors), 1)
        masks = None if mask is None else self._by_codebook(self._flat(mask, 0), 1)
        found = [
            clustering.lloyd(
                clustering.Rows(rows if masks is None else rows[masks[head]]),
                self.codebook_size,
                self.kmeans_iters,
                sync=self.sync_codebook,
                backend=self.backend,
            )
            for head, rows in enumerate(heads)
        ]
        codebooks, counts, has_rows = zip(*found, strict=True)
        # without a row on any rank: the next batch may have some
        if all(has_rows):
            self._write(self._joined(codebooks))
            self.cluster_size.copy_(self._joined(counts).clamp(min=1))

    def _flat(self, tensor: Tensor, num_dims: int = 1) -> Tensor:
        """[N, …], with the last dims kept, and before them that of the codebooks."""
        num_dims += bool(self.num_codebooks)
        return tensor.reshape(-1, *tensor.shape[tensor.ndim - num_dims :])

    def _mask_of_codes(self, which: Tensor) -> Tensor:
        """[K] bool of what `reset_codes` takes."""
        if not isinstance(which, Tensor):
            raise TypeError(f"which is a {type(which).__name__}; it must be a tensor")
        which = which.to(self.codebook.device)
        shape = self._shape_of("cluster_size")
        is_mask = which.dtype == torch.bool
        if is_mask and tuple(which.shape) != shape:
            raise ValueError(f"which has shape {tuple(which.shape)}; a mask must be {shape}")
        if is_mask:
            return which
        if self.num_codebooks:
            raise TypeError(f"which is a {which.dtype} tensor; it must be a mask {shape} of bool")
        if which.is_floating_point() or which.is_complex():
            raise TypeError(f"which is a {which.dtype} tensor; it must be bool or integers")
        if ((which < 0) | (which >= self.codebook_size)).any():
            raise ValueError(f"which has indices outside [0, {self.codebook_size})")
        mask = torch.zeros(shape, dtype=torch.bool, device=which.device)
        mask[which.long()] = True
        return mask

    def _steps_at_once(self) -> bool:
        """Whether an op can search and make the step: no rank or other batch comes in between."""
        return (
            # neither a compiler nor torch.func takes an op that changes what it differentiates by
            (self.codebook_update == "ema" or not is_traced())
            and not self._accumulates
            and self._pending is None
            and self._owns_codebook()
            and not self.num_codebooks
            and not (self.sync_codebook and distributed.world_size() > 1)
        )

    def _rates_here(self) -> Tensor:
        if self._rates.device != self.cluster_size.device:
            self._rates = self._rates_on(self.cluster_size.device)
        return self._rates

    def _rates_on(self, device: torch.device) -> Tensor:
        rates = [1 - self.decay, self.threshold_ema_dead_code]
        # to be written to later, whatever mode this is
        with torch.inference_mode(False):
            return torch.tensor(rates, dtype=torch.float32, device="cpu").to(device)

    def _forget(self) -> None:
        super()._forget()
        self._pending = None

    def _renew(self) -> None:
        super()._renew()
        # each rank may have written other codes
        self._is_broadcast = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_broadcast = self._is_broadcast
        super()._load_from_state_dict(*args, **kwargs)
        # it may be that one rank alone has loaded: then no other would meet it
        self._is_broadcast = was_broadcast

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "codebook" and is_shard(value):
            self._take_shards()
        elif name == "codebook":
            # of other codes
            self._pending = None
        super().__setattr__(name, value)

    def _take_shards(self) -> None:
        """FSDP sets a shard in place of the parameter. Forward then sees a copy, gathered from the
        shards, and what it changes there is lost; the optimizer's steps are not.
        """
        # without values yet, codes may be loaded later
        waits = not (self._is_sharded or self.codebook.is_meta or self._has_codes())
        if self._revives or waits:
            raise ValueError(SHARDED)
        self._is_sharded = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedCodebook:
        super()._apply(fn, recurse)
        self._rates = self._rates_on(self.cluster_size.device)
        return self


def is_shard(value: Any) -> bool:
    """Of a codebook: a DTensor of FSDP2, or what the first FSDP cuts out of its flat parameter."""
    is_flat = isinstance(value, torch.nn.Parameter) and value.ndim == 1
    return is_flat or hasattr(value, "device_mesh")


# a start depends on data and happens once, so it is no part of a graph. Not by
# torch.compiler.disable, which imports all of the compiler
start_uncompiled = _disable_dynamo(LearnedCodebook._start_once)
