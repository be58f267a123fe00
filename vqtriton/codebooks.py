"""A codebook as tensors: what holds its codes, and every way in which they arrive.

The codes are the state, and nothing beside them may disagree with them. ``cluster_size`` says how
many rows a step each code stands for, so how slowly it moves. Whoever writes codes, by whatever
way, finds them in the next step as they were written. docs/codebook.md is this in one page.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from vqtriton.checks import check_x
from vqtriton.dispatch import resolve_backend
from vqtriton.functional import PreparedCodebook, prepare_codebook
from vqtriton.tensors import is_traced

SHARDED = (
    "codebook is sharded, and forward sees a copy of it, so what is written to it would be lost: "
    "kmeans_init, threshold_ema_dead_code and set_codebook cannot be used with it; pass "
    'ignored_params={vq.codebook} to fully_shard, or use codebook_update="ema"'
)


class Codebook(nn.Module):
    """The codes and their cluster sizes: set, reset, loaded, copied, prepared for inference.

    Arguments and attributes are those of `vqtriton.VectorQuantize`, whose D is ``codebook_dim``
    here. With ``num_codebooks`` it holds that many, [H, K, D]; 0 is one, [K, D].
    """

    codebook: Tensor
    cluster_size: Tensor

    def __init__(
        self,
        codebook_dim: int,
        codebook_size: int,
        *,
        num_codebooks: int,
        codebook_update: str,
        kmeans_init: bool,
        backend: str,
    ) -> None:
        super().__init__()
        self.codebook_dim = codebook_dim
        self.codebook_size = codebook_size
        self.num_codebooks = num_codebooks
        self.codebook_update = codebook_update
        self.kmeans_init = kmeans_init
        self.backend = backend
        # True: the codes stay as they are, in training mode as well
        self.frozen = False
        # the tensor that was seen to hold codes, so that steps need not wait for the device
        self._seen: tuple[Tensor] | None = None
        self._has_warned = self._is_sharded = False
        # what it was prepared of: its marks, and the tensor
        self._prepared: dict[int, tuple[tuple[Any, ...], Tensor, PreparedCodebook]] = {}

        codebook = torch.empty(self._shape_of("codebook"), dtype=torch.float32)
        if codebook_update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        cluster_size = torch.empty(self._shape_of("cluster_size"), dtype=torch.float32)
        self.register_buffer("cluster_size", cluster_size)
        self.reset_parameters()

    def _shape_of(self, name: str) -> tuple[int, ...]:
        heads = (self.num_codebooks,) if self.num_codebooks else ()
        size = *heads, self.codebook_size
        return (*size, self.codebook_dim) if name == "codebook" else size

    def _by_codebook(self, tensor: Tensor, dim: int = 0) -> Sequence[Tensor]:
        """What belongs to each codebook."""
        return tensor.unbind(dim) if self.num_codebooks else (tensor,)

    def _joined(self, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
        """What `_by_codebook` took apart."""
        return torch.stack(list(tensors), dim) if self.num_codebooks else tensors[0]

    @property
    def is_initialized(self) -> Tensor:
        """[] bool, on the CPU: whether there are codes, and not only zeros that wait for
        ``kmeans_init``. False that is written into it, as by ``fill_``, starts anew."""
        has_codes = not self.kmeans_init or holds_codes(self.codebook)
        answer = torch.tensor(has_codes, dtype=torch.bool, device="cpu").as_subclass(Answer)
        answer.asked = self
        return answer

    @is_initialized.setter
    def is_initialized(self, value: Tensor | bool) -> None:
        if not value:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gives codes and cluster sizes the values of a new module, whatever they were.

        Call it after ``to_empty``. With several ranks, call it on all of them, as `set_codebook`
        and `reset_codes`; the codes of rank 0 reach the others with the next step.

        Example:
            >>> vq = vqtriton.VectorQuantize(16, 128)
            >>> vq.reset_parameters()
        """
        is_own = self._owns_codebook()
        codebook = self.codebook if is_own else torch.empty_like(self.codebook)
        # by functions of nn.init, which loaders replace for tensors that they have loaded
        if self.kmeans_init:
            nn.init.zeros_(codebook)
        else:
            self._draw(codebook)
        if not is_own:
            self._write(codebook)
        # one row each: the codes move with the first rows that choose them
        nn.init.ones_(self.cluster_size)
        self._renew()

    def _draw(self, codebook: Tensor) -> None:
        """The values of a new codebook; for subclasses as well."""
        nn.init.uniform_(codebook, -1 / self.codebook_size, 1 / self.codebook_size)

    @torch.no_grad()
    def set_codebook(self, codes: Tensor, cluster_size: Tensor | float = 1.0) -> None:
        """Replaces all codes, in place: optimizers and graphs keep their tensor.

        Args:
            codes: [K, D], or [H, K, D] for H codebooks; finite, on any device.
            cluster_size: how many rows per step each code stands for, [K] ([H, K]) or one number.
                The larger it is, the slower the code moves in the next steps ("ema").

        Raises:
            TypeError, ValueError: an argument does not fit, or the codebook cannot be written to.

        Example:
            >>> vq, x = vqtriton.VectorQuantize(16, 128), torch.randn(4000, 16)
            >>> vq.set_codebook(vqtriton.kmeans(x, 128), cluster_size=len(x) / 128)
            >>> quantized, indices, loss = vq(x)
        """
        check_x(codes, name="codes")
        shape = self._shape_of("codebook")
        if tuple(codes.shape) != shape:
            raise ValueError(f"codes has shape {tuple(codes.shape)}; it must be {shape}")
        # of float64 some that are finite overflow in float32
        codes = codes.detach().to(self.codebook.device, torch.float32)
        if not codes.isfinite().all():
            raise ValueError("codes holds NaN or infinity, or what is infinite in float32")
        if not isinstance(cluster_size, (Tensor, int, float)):
            kind = type(cluster_size).__name__
            raise TypeError(f"cluster_size is a {kind}; it must be a tensor or a number")
        size = torch.as_tensor(cluster_size, dtype=torch.float32)
        shape = self._shape_of("cluster_size")
        if tuple(size.shape) not in ((), shape) or not (
            (size >= 0).all() and size.isfinite().all()
        ):
            raise ValueError(
                f"cluster_size is {cluster_size!r:.80}; it must be finite and at least 0, one "
                f"number or a tensor of shape {shape}"
            )
        self._write(codes)
        self.cluster_size.copy_(size)
        self._renew()

    # --- what holds the codes ---

    def _has_codes(self) -> bool:
        """Whether the codebook is more than zeros that wait for ``kmeans_init``.

        Waits for the device until it has seen codes. A stale yes, after zeros were written by hand,
        loses nothing; a no is always an answer of the codes themselves.
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

    def _look(self) -> None:
        """Before an inference: warns once if there are only zeros that wait for a start."""
        if self._has_warned or not self.kmeans_init:
            return
        if not self._has_codes():
            if not torch.compiler.is_compiling():
                self._has_warned = True
            warn_of_zeros()

    def _owns_codebook(self) -> bool:
        return "codebook" in self._buffers or "codebook" in self._parameters

    def _check_writable(self) -> None:
        """
        Raises:
            ValueError: what is written to the codebook would be lost.
        """
        if self._is_sharded:
            raise ValueError(SHARDED)
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

    def _kept(self, codebook: Tensor, head: int = 0) -> Tensor | PreparedCodebook:
        """A frozen codebook as it was prepared for an earlier inference with the kernels.

        Others are not kept: a write through ``.data`` or by a graph leaves no trace. The torch
        backend searches the codes as they are sooner than it could compare them with older ones.
        """
        if not self.frozen or not is_plain(codebook):
            return codebook
        if resolve_backend(self.backend, codebook.device) == "torch":
            return codebook
        mark = self.backend, codebook.device, codebook.data_ptr(), codebook._version
        if head in self._prepared:
            of, _, prepared = self._prepared[head]
            if of == mark:
                return prepared
        # a later inference may want gradients, for which this one's tensors could not be saved
        with torch.inference_mode(False), torch.no_grad():
            prepared = prepare_codebook(codebook, backend=self.backend)
        # with the tensor, so that no other can come to have its address
        self._prepared[head] = mark, codebook, prepared
        return prepared

    def _forget(self) -> None:
        """What is known of codes that are no more."""
        self._seen, self._prepared = None, {}
        self._has_warned = False

    def _renew(self) -> None:
        """After the user has written codes."""
        self._forget()
        self._has_codes()

    # --- how they arrive ---

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("codebook", "cluster_size") and isinstance(value, Tensor):
            value = self._fitting(name, value)
        super().__setattr__(name, value)

    def _fitting(self, name: str, value: Tensor) -> Tensor:
        """What is set as codebook or cluster size, in float32."""
        if self._is_sharded:
            # FSDP sets a shard, and in forward a copy that it gathered, as it likes
            return value
        shape = self._shape_of(name)
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {shape}")
        fitting = value
        if 0 in value.stride() and value.numel() > 1:
            # an expanded tensor, whose elements are one
            fitting = fitting.detach().clone(memory_format=torch.contiguous_format)
        if self.codebook_update == "ema" or name == "cluster_size":
            fitting = fitting.detach().float() if value.requires_grad else fitting.float()
        elif isinstance(value, nn.Parameter) and value.dtype != torch.float32:
            fitting = nn.Parameter(fitting.detach().float(), value.requires_grad)
        if fitting is not value:
            # a loader may have made a note on it
            vars(fitting).update(vars(value))
        return fitting

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        for name, child in self.named_children() if recurse else ():
            # what a codebook is made of keeps its dtype as well; projections do not
            child._apply(keep_dtype if name == "parametrizations" else fn)
        super()._apply(keep_dtype, recurse=False)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # earlier versions had averages and a flag beside the codes
        state_dict.pop(f"{prefix}embed_sum", None)
        was_started = state_dict.pop(f"{prefix}is_initialized", None)
        if f"{prefix}_codebook.embed" in state_dict:
            was_started, fault = self._take_embed(state_dict, prefix)
            if fault:
                # the last argument; torch raises it together with the faults of other modules
                args[-1].append(fault)
                return
        for name in ("codebook", "cluster_size"):
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor) and value.dtype != torch.float32:
                state_dict[f"{prefix}{name}"] = value.float()
        codebook = state_dict.get(f"{prefix}codebook")
        if self.kmeans_init and was_started is not None and not was_started:
            state_dict[f"{prefix}codebook"] = torch.zeros_like(
                self.codebook if codebook is None else codebook
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._renew()

    def _take_embed(self, state_dict: dict[str, Any], prefix: str) -> tuple[Any, str]:
        """Renames what a ``VectorQuantize`` of vector-quantize-pytorch has written.

        Their ``embed_avg`` is the codes times their smoothed sizes, and a step here goes on from
        the codes: so it is dropped, but for the lengths of codes that are looked for by cosine.

        Returns:
            Their flag ``initted``, or None; and why it does not fit, or "".
        """
        place = f"{prefix}_codebook."
        theirs = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(place)}
        embed, sizes = theirs.pop(f"{place}embed"), theirs.pop(f"{place}cluster_size", None)
        was_started = theirs.pop(f"{place}initted", None)
        embed_avg = theirs.pop(f"{place}embed_avg", None)
        shape, found = self._shape_of("codebook"), tuple(embed.shape)
        if theirs:
            return None, f"{min(theirs)} has no counterpart in a VectorQuantize of vqtriton"
        wanted = shape if self.num_codebooks else (1, *shape)
        if found != wanted:
            fault = f"{place}embed has shape {found}; it must be {wanted}"
            if embed.ndim == 3 and len(embed) != max(self.num_codebooks, 1):
                fault += f"; it has {len(embed)} heads, see separate_codebook_per_head"
            elif f"{prefix}project_in.weight" in state_dict:
                fault += "; project_in is before it, see codebook_dim"
            return None, fault
        if was_started is not None and not was_started and not self.kmeans_init:
            return None, f"{place}initted is false: it waits for k-means, as with kmeans_init=True"
        codes = self._codes_of_embed(embed.detach(), embed_avg, sizes)
        state_dict[f"{prefix}codebook"] = codes.reshape(shape)
        if sizes is not None:
            state_dict[f"{prefix}cluster_size"] = sizes.detach().reshape(shape[:-1])
        return was_started, ""

    def _codes_of_embed(
        self, embed: Tensor, embed_avg: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        """The codes that the three tensors of vector-quantize-pytorch stand for."""
        return embed

    def train(self, mode: bool = True) -> Codebook:
        super().train(mode)
        if not mode:
            # an export, which cannot look for itself, mostly follows
            self._has_codes()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # what can be made again is not copied or pickled
        return {**self.__dict__, "_prepared": {}}


class Answer(Tensor):
    """What `Codebook.is_initialized` gives: a flag, into which False can be written."""

    asked: Codebook

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            flags = [arg for arg in args if isinstance(arg, Answer)]
            before = [bool(flag) for flag in flags]
            result = func(*args, **(kwargs or {}))
            for flag, said in zip(flags, before, strict=True):
                if said and not flag:
                    flag.asked.reset_parameters()
        return result


def holds_codes(codebook: Tensor) -> bool:
    """Whether one is not zero. A parametrization may have made NaN of zeros."""
    return bool(codebook.detach().nan_to_num(0).any())


def warn_of_zeros() -> None:
    warnings.warn(
        "VectorQuantize(kmeans_init=True) has no codes yet, only zeros: train a step, load a state "
        "or call set_codebook first",
        # who called the module
        stacklevel=7,
    )


# a compiler would leave out the warning, but calls this as it compiles. It is what
# torch.compiler.assume_constant_result does, which imports all of the compiler, and Triton
vars(warn_of_zeros)["_dynamo_marked_constant"] = True


def is_plain(tensor: Tensor) -> bool:
    """Whether its values are there and will be: not traced, transformed or captured."""
    return not (
        is_traced()
        or type(tensor) not in (Tensor, nn.Parameter)
        or tensor.is_meta
        or tensor.is_inference()
        # what is prepared in a graph has the memory of the graph
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
