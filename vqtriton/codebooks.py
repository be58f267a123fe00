"""A codebook and its life: how it starts, learns, is frozen, set, copied and loaded.

The codes are the state, and nothing beside them may disagree with them. ``cluster_size`` says how
many rows a step each code stands for, so how slowly it moves. Whoever writes codes, by whatever
way, finds them in the next step as they were written. docs/codebook.md is this in one page.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from vqtriton import clustering, distributed, ops
from vqtriton.functional import (
    PreparedCodebook,
    check_arguments,
    check_x,
    code_sums,
    prepare_codebook,
)
from vqtriton.screening import finite_rows

# what `reset_codes` puts between a code and its copy, in standard deviations of the codes
JITTER = 0.01


def check_number(
    name: str, value: Any, kind: type, least: float, most: float | None = None
) -> None:
    """
    Raises:
        TypeError: the argument is not of its type.
        ValueError: it is out of its range.
    """
    kinds = (int, float) if kind is float else (kind,)
    # True is an int to Python, 1 a float to everybody
    if not any(isinstance(value, kind) for kind in kinds) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.80}; it must be of type {kind.__name__}")
    # float32, as the statistics and the loss that it is for
    if not least <= value <= (torch.finfo(torch.float32).max if most is None else most):
        wanted = f"finite and at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} is {value!r:.80}; it must be {wanted}")


class Codebook(nn.Module):
    """The state of `vqtriton.VectorQuantize`, which has the arguments, and all that changes it."""

    codebook: Tensor
    cluster_size: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        codebook_update: str,
        decay: float,
        kmeans_init: bool,
        kmeans_iters: int,
        threshold_ema_dead_code: float,
        sync_codebook: bool,
        backend: str,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_size = codebook_size
        self.codebook_update = codebook_update
        self.kmeans_init = kmeans_init
        self.kmeans_iters = kmeans_iters
        self.sync_codebook = sync_codebook
        self.backend = backend
        # True: the codes stay as they are, in training mode as well
        self.frozen = False
        # [2] float32, 1 - decay and the threshold: on the device, so that a schedule of theirs is
        # no constant of a graph. Made anew from the two numbers when the codebook is elsewhere.
        self._rates = torch.empty(2, dtype=torch.float32)
        self.decay = decay
        self.threshold_ema_dead_code = threshold_ema_dead_code
        # the tensor that was seen to hold codes, so that steps need not wait for the device
        self._seen: tuple[Tensor] | None = None
        # a tensor that `is_initialized` gave, and what it said
        self._answer: tuple[Tensor, bool] | None = None
        self._has_warned = self._is_broadcast = self._is_sharded = self._accumulates = False
        # sums and counts of steps that were not applied yet
        self._pending: list[Tensor] | None = None
        self._prepared: tuple[Any, PreparedCodebook] | None = None

        codebook = torch.empty(codebook_size, dim, dtype=torch.float32)
        if codebook_update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("cluster_size", torch.empty(codebook_size, dtype=torch.float32))
        self.reset_parameters()

    # --- what the user sets ---

    @property
    def decay(self) -> float:
        return self._decay

    @decay.setter
    def decay(self, value: float) -> None:
        check_number("decay", value, float, 0, 1)
        if value != vars(self).get("_decay"):
            self._decay = value
            self._rates[0] = 1 - value

    @property
    def threshold_ema_dead_code(self) -> float:
        return self._threshold

    @threshold_ema_dead_code.setter
    def threshold_ema_dead_code(self, value: float) -> None:
        check_number("threshold_ema_dead_code", value, float, 0)
        # a trainer may set it in each step, and a write is a launch
        if value != vars(self).get("_threshold"):
            self._threshold = value
            self._rates[1] = value
            self._revives = value > 0

    @property
    def is_initialized(self) -> Tensor:
        """[] bool, on the CPU: whether there are codes, and not only zeros that wait for
        ``kmeans_init``. False that is written into it, as by ``fill_``, starts anew."""
        self._heed_answer()
        has_codes = not self.kmeans_init or holds_codes(self.codebook)
        self._answer = torch.tensor(has_codes, dtype=torch.bool, device="cpu"), has_codes
        return self._answer[0]

    @is_initialized.setter
    def is_initialized(self, value: Tensor | bool) -> None:
        if not value:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Codes and statistics of a new module, whatever was there: after ``to_empty``, too."""
        if not self._owns_codebook():
            self._write(self.codebook.detach().clone().copy_(self._first_codes()))
        elif self.kmeans_init:
            self.codebook.zero_()
        else:
            self.codebook.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
        # one row each: the codes move with the first rows that choose them
        self.cluster_size.fill_(1)
        self._forget()

    @torch.no_grad()
    def set_codebook(self, codes: Tensor, cluster_size: Tensor | float = 1.0) -> None:
        """Replaces all codes, in place: optimizers and graphs keep their tensor.

        Args:
            codes: [K, D], finite, on any device.
            cluster_size: rows a step that each code stands for, [K] or one number: the more, the
                slower it moves with the next steps ("ema").

        Raises:
            TypeError, ValueError: it does not fit, or the codebook cannot be written to.

        Example:
            >>> vq = vqtriton.VectorQuantize(64, 512)
            >>> vq.set_codebook(vqtriton.kmeans(x, 512), cluster_size=len(x) / 512)
            >>> vq(x)
        """
        check_x(codes, name="codes")
        shape = self.codebook_size, self.dim
        if tuple(codes.shape) != shape:
            raise ValueError(f"codes has shape {tuple(codes.shape)}; it must be {shape}")
        # of float64 some that are finite overflow in float32
        codes = codes.detach().to(self.codebook.device, torch.float32)
        if not codes.isfinite().all():
            raise ValueError("codes holds NaN or infinity, or what is infinite in float32")
        size = torch.as_tensor(cluster_size, dtype=torch.float32)
        if size.shape not in ((), (self.codebook_size,)) or not (
            (size >= 0).all() and size.isfinite().all()
        ):
            raise ValueError(
                f"cluster_size is {cluster_size!r:.80}; it must be finite and at least 0, one "
                f"number or {self.codebook_size} of them"
            )
        self._write(codes)
        self.cluster_size.copy_(size)
        self._forget()

    @torch.no_grad()
    def reset_codes(self, which: Tensor, x: Tensor | None = None) -> None:
        """Starts some codes anew, such as those that nobody chooses.

        Args:
            which: [K] bool, or the indices of the codes, int.
            x: [..., D]: they become random rows of it. Without it each is put beside one of the
                codes that stay, drawn in proportion to the cluster sizes.

        Raises:
            TypeError, ValueError: ``which`` or ``x`` does not fit, or no code would stay.

        Example:
            >>> counts = vqtriton.metrics.counts(indices, vq.codebook_size)
            >>> vq.reset_codes(counts == 0, x)
        """
        which = self._mask_of_codes(which)
        codes, stay = self.codebook.detach(), ~which
        if x is None:
            if not stay.any():
                raise ValueError("which is every code; give the rows x to draw from as well")
            # all sizes may be zero
            weights = self.cluster_size.where(stay, 0) + 1e-20 * stay
            drawn = torch.multinomial(weights, self.codebook_size, replacement=True)
            spread = JITTER * codes[stay].std(0, correction=0)
            fresh = codes[drawn] + spread * torch.randn_like(codes)
        else:
            check_arguments(x, codes, precision="exact", backend=self.backend)
            rows = x.detach().reshape(-1, self.dim)
            rows = rows[finite_rows(rows.float())]
            if len(rows) == 0:
                raise ValueError(f"x has shape {tuple(x.shape)} and no finite row to draw from")
            order = torch.randperm(len(rows), dtype=torch.int64, device=rows.device)
            # with fewer rows than codes some are used again
            order = order.repeat(-(-self.codebook_size // len(order)))
            fresh = torch.empty_like(codes)
            fresh[which] = rows[order[: int(which.sum())]].float()
        mean = self.cluster_size.mean()
        self._write(fresh.where(which[:, None], codes))
        self.cluster_size.copy_(mean.where(which, self.cluster_size))
        self._forget()

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Training steps inside only add up their statistics; the next one outside applies all.

        For gradient accumulation, as DDP's ``no_sync``: the micro-batches but the last run inside,
        so that all choose from the same codes, and a step of the codebook is one of the optimizer.
        Dead codes are replaced by rows of the last micro-batch.

        Example:
            >>> with vq.accumulate():
            ...     vq(first)
            >>> vq(last)  # learns from both
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
        if not torch.compiler.is_compiling():
            self._heed_answer()
        for tensor in (self.codebook, self.cluster_size):
            # as `load_state_dict` and `setattr` see to, but not an assignment to ``.data``
            if tensor.dtype != torch.float32 and tensor.is_leaf and not self._is_sharded:
                tensor.data = tensor.data.float()
        must_broadcast = (
            self.sync_codebook and not self._is_broadcast and distributed.world_size() > 1
        )
        if not must_broadcast and self._has_codes():
            return
        # before anything changes or other ranks are waited for
        check_arguments(vectors, self.codebook, mask, precision="exact", backend=self.backend)
        self._check_writable()
        if must_broadcast:
            with torch.no_grad():
                # not state_dict(): FSDP2 has hooks on it that put the shards back
                distributed.broadcast_([*self.parameters(), *self.buffers()])
            # a flag and no look at the tensors: all ranks must come to the same answer
            self._is_broadcast, self._seen = True, None
        if not self._has_codes():
            self._start_from_data(vectors.detach(), mask)
            self._has_codes()

    def _look(self) -> None:
        """Before an inference: warns once if there are only zeros that wait for a start."""
        if self._has_warned or not self.kmeans_init:
            return
        if not torch.compiler.is_compiling():
            self._heed_answer()
        if not self._has_codes():
            if not torch.compiler.is_compiling():
                self._has_warned = True
            warn_of_zeros()

    @torch.no_grad()
    def _update(self, rows: Tensor, indices: Tensor) -> None:
        """One step of the statistics, and of what follows from them."""
        sums, counts = code_sums(rows, indices, self.codebook_size, backend=self.backend)
        local = [counts, sums] if self.codebook_update == "ema" else [counts]
        if self._pending is not None:
            local = [now + before for now, before in zip(local, self._pending, strict=True)]
        self._pending = local if self._accumulates else None
        if self._accumulates:
            return
        if self._revives:
            keep = (indices >= 0) & finite_rows(rows)
            local += distributed.sample_rows(
                rows, self.codebook_size, keep=keep, sync=self.sync_codebook
            )
        counts, *others = distributed.all_reduce(local, sync=self.sync_codebook)
        averaged = others.pop(0) if self.codebook_update == "ema" else None
        if self._rates.device != self.cluster_size.device:
            self._rates = self._rates_on(self.cluster_size.device)
        is_own = self._owns_codebook()
        codebook = self.codebook if is_own else self.codebook.detach().clone()
        ops.ema_update_(
            self.cluster_size,
            codebook,
            counts,
            averaged,
            *(others or (None, None)),
            self._rates,
            self.backend,
        )
        if not is_own:
            self._write(codebook)

    def _kept(self, codebook: Tensor) -> Tensor | PreparedCodebook:
        """The codebook as it was prepared for an earlier inference, where it is surely the same.

        On a CPU its values are compared. Elsewhere that would wait for the device, and a write
        through ``.data`` or by a graph leaves no trace, so there only a frozen one is kept.
        """
        is_cpu = codebook.device.type == "cpu"
        if not (is_cpu or self.frozen) or not _is_plain(codebook):
            return codebook
        mark = codebook.data_ptr(), codebook._version, codebook.device, self.backend
        if self._prepared is not None:
            of, prepared = self._prepared
            if torch.equal(prepared.codebook, codebook) if is_cpu else of == mark:
                return prepared
        # a later inference may want gradients, for which this one's tensors could not be saved
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare_codebook(codebook, backend=self.backend)
        self._prepared = mark, prepared
        return prepared

    # --- the state ---

    def _has_codes(self) -> bool:
        """Whether the codebook is more than zeros that wait for ``kmeans_init``.

        Waits for the device until it has seen codes. A stale yes, after zeros were written by hand,
        does no harm; a no is always an answer of the codes themselves.
        """
        if not self.kmeans_init:
            return True
        stored = self.codebook
        if is_parametrized(self, "codebook"):
            parametrization = self.get_submodule("parametrizations.codebook")
            stored = next(chain(parametrization.parameters(), parametrization.buffers()))
        if self._seen is not None and self._seen[0] is stored:
            return True
        if torch.compiler.is_compiling():
            return self._seen is not None
        if stored.is_meta or not holds_codes(self.codebook):
            return False
        self._seen = (stored,)
        return True

    @torch.no_grad()
    def _start_from_data(self, vectors: Tensor, mask: Tensor | None) -> None:
        rows = vectors.reshape(-1, self.dim) if mask is None else vectors[mask]
        codebook, counts, has_rows = clustering.lloyd(
            clustering.Rows(rows),
            self.codebook_size,
            self.kmeans_iters,
            sync=self.sync_codebook,
            backend=self.backend,
        )
        # without a row on any rank: the next batch may have some
        if has_rows:
            self._write(codebook)
            self.cluster_size.copy_(counts.clamp(min=1))

    def _first_codes(self) -> Tensor:
        codes = torch.zeros(self.codebook_size, self.dim, dtype=torch.float32)
        return codes if self.kmeans_init else codes.uniform_(-1 / len(codes), 1 / len(codes))

    def _owns_codebook(self) -> bool:
        return "codebook" in self._buffers or "codebook" in self._parameters

    def _check_writable(self) -> None:
        """
        Raises:
            ValueError: what is written to the codebook would be lost.
        """
        if self._owns_codebook():
            return
        if not is_parametrized(self, "codebook"):
            raise ValueError(
                "codebook is made anew in each forward, as by torch.nn.utils.weight_norm, so what "
                "is learned in forward would be lost; use torch.nn.utils.parametrizations"
            )
        for parametrization in self.get_submodule("parametrizations.codebook").children():
            if not hasattr(parametrization, "right_inverse"):
                raise ValueError(
                    f"codebook has the parametrization {type(parametrization).__name__}, which "
                    "has no right_inverse, so what is learned in forward would be lost; give it "
                    "one, or use codebook_update='gradient' without kmeans_init and revival"
                )

    def _write(self, codes: Tensor) -> None:
        """Into the codebook, through what it is parametrized by."""
        self._check_writable()
        if self._owns_codebook():
            self.codebook.copy_(codes)
        else:
            self.codebook = codes

    def _mask_of_codes(self, which: Tensor) -> Tensor:
        """[K] bool of what `reset_codes` takes."""
        if not isinstance(which, Tensor):
            raise TypeError(f"which is a {type(which).__name__}; it must be a tensor")
        which = which.to(self.codebook.device)
        is_mask = which.dtype == torch.bool
        if is_mask and which.shape != (self.codebook_size,):
            raise ValueError(
                f"which has shape {tuple(which.shape)}; a mask must be ({self.codebook_size},)"
            )
        if is_mask:
            return which
        if which.is_floating_point() or which.is_complex():
            raise TypeError(f"which is a {which.dtype} tensor; it must be bool or integers")
        if ((which < 0) | (which >= self.codebook_size)).any():
            raise ValueError(f"which has indices outside [0, {self.codebook_size})")
        mask = torch.zeros(self.codebook_size, dtype=torch.bool, device=which.device)
        mask[which.long()] = True
        return mask

    def _rates_on(self, device: torch.device) -> Tensor:
        rates = [1 - self.decay, self.threshold_ema_dead_code]
        return torch.tensor(rates, dtype=torch.float32, device="cpu").to(device)

    def _heed_answer(self) -> None:
        """Starts anew if somebody wrote False into what `is_initialized` gave."""
        if self._answer is not None:
            (answer, said), self._answer = self._answer, None
            if said and not answer:
                self.reset_parameters()

    def _forget(self) -> None:
        """What is known of codes that are no more."""
        self._seen = self._answer = self._pending = self._prepared = None
        self._has_warned = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("codebook", "cluster_size") and isinstance(value, Tensor):
            value = self._fitting(name, value)
        super().__setattr__(name, value)

    def _fitting(self, name: str, value: Tensor) -> Tensor:
        """What is set as codebook or cluster size, in float32.

        FSDP2 sets a shard in place of the parameter. Forward then sees a copy, gathered from the
        shards, and what it changes there is lost; the optimizer's steps are not.
        """
        before = self._parameters.get(name)
        if hasattr(value, "device_mesh") or hasattr(before, "device_mesh"):
            for option, used in (
                ("threshold_ema_dead_code", self._revives),
                ("kmeans_init", not hasattr(before, "device_mesh") and not self._has_codes()),
            ):
                if used:
                    raise ValueError(
                        f"{option} changes the codebook in forward, so that one which is a "
                        "parameter cannot be sharded; pass ignored_params={vq.codebook} to "
                        'fully_shard, or use codebook_update="ema"'
                    )
            self._is_sharded = True
            return value
        shape = (self.codebook_size, self.dim)[: 2 if name == "codebook" else 1]
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
        if self.codebook_update == "ema" or name == "cluster_size":
            return value.detach().float()
        if isinstance(value, nn.Parameter) and value.dtype != torch.float32:
            return nn.Parameter(value.detach().float(), value.requires_grad)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(keep_dtype, recurse)
        self._rates = self._rates_on(self.cluster_size.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # earlier versions had averages and a flag beside the codes
        state_dict.pop(f"{prefix}embed_sum", None)
        was_started = state_dict.pop(f"{prefix}is_initialized", None)
        for name in ("codebook", "cluster_size"):
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor) and value.dtype != torch.float32:
                state_dict[f"{prefix}{name}"] = value.float()
        if self.kmeans_init and was_started is not None and not was_started:
            state_dict[f"{prefix}codebook"] = torch.zeros_like(state_dict[f"{prefix}codebook"])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._forget()
        self._has_codes()

    def train(self, mode: bool = True) -> Codebook:
        super().train(mode)
        if not mode:
            # an export, which cannot look for itself, mostly follows
            self._has_codes()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # what can be made again is not copied or pickled
        return {**self.__dict__, "_prepared": None, "_answer": None}


def holds_codes(codebook: Tensor) -> bool:
    """Whether one is not zero. A parametrization may have made NaN of zeros."""
    return bool(codebook.detach().nan_to_num(0).any())


def warn_of_zeros() -> None:
    warnings.warn(
        "VectorQuantize(kmeans_init=True) has no codes yet, only zeros: train a step, load a state "
        "or call set_codebook first",
        # who called the module
        stacklevel=6,
    )


# a compiler would leave out the warning, but calls this as it compiles. It is what
# torch.compiler.assume_constant_result does, which imports all of the compiler, and Triton
vars(warn_of_zeros)["_dynamo_marked_constant"] = True


def _is_plain(tensor: Tensor) -> bool:
    """Whether its values are there and will be: not traced, transformed or captured."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or type(tensor) not in (Tensor, nn.Parameter)
        or tensor.is_meta
        or tensor.is_inference()
        # what is prepared in a graph has the memory of the graph
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
