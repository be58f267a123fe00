"""Who is measured: ours and its peers, each as a step that starts from the same inputs.

Scopes: *assign* is the index of each vector. *inference* is the module in eval mode: quantized and
indices. *forward* is the module in training mode: the loss, and the codebook learns (EMA).
*training* is that and the gradient of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import vqtriton
from bench.cases import SCOPES, Case
from bench.provenance import version

DECAY, EPS, COMMITMENT_WEIGHT = 0.99, 1e-5, 0.25
# what learns: all have the first two, a peer the sums as well
STATE = ("codebook", "cluster_size", "embed_sum")
Search = Callable[[Tensor, Tensor], Tensor]
Outputs = dict[str, Tensor]


class Inputs(NamedTuple):
    """What every subject starts from."""

    x: Tensor  # [N, D], requires grad
    codebook: Tensor  # [K, D] in the dtype of x
    grad_quantized: Tensor  # [N, D], what a decoder would send back


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        values = torch.randn(rows, case.dim, generator=generator)
        if case.is_unit_norm:
            values = nn.functional.normalize(values)
        return values.to(device, dtype)

    x, codebook, grad = (draw(n) for n in (case.num_rows, case.codebook_size, case.num_rows))
    return Inputs(x.requires_grad_(), codebook, grad)


@dataclass(frozen=True)
class Subject:
    """One way to do it."""

    name: str
    # that it is taken from
    package: str
    # makes a search, and a module: a `Plain` around the search unless said otherwise
    search: Callable[[], Search] | None = None
    module: Callable[[int, int], nn.Module] | None = None
    scopes: tuple[str, ...] = SCOPES
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    # each index is that of the float64 argmin
    is_exact: bool = False
    # bit for bit, whenever it is done again
    is_repeatable: bool = False
    # its memory grows as N + K·D
    holds_no_matrix: bool = False
    # for each shape anew
    is_compiled: bool = False
    # bytes for each (row, code) pair, about
    bytes_per_pair: int = 0
    # of what it multiplies or stores; the dtype's if that is larger
    roundoff: float = 2.0**-24

    def can_run(self, scope: str, device: str, dtype: torch.dtype) -> bool:
        return scope in self.scopes and device in self.devices and dtype in self.dtypes

    def is_installed(self) -> bool:
        # ours is imported above, whether installed or a checkout
        return self.package == "vqtriton" or version(self.package) is not None

    def memory(self, case: Case) -> int:
        """Bytes of the matrices that it holds, about."""
        return self.bytes_per_pair * case.num_rows * case.codebook_size


class Run:
    """A subject, ready to take steps of a scope."""

    def __init__(self, subject: Subject, scope: str, inputs: Inputs) -> None:
        self.subject, self.scope, self.inputs = subject, scope, inputs
        if scope == "assign":
            self._search = subject.search()
        else:
            make = subject.module or partial(Plain, subject.search)
            module = make(inputs.codebook.shape[1], inputs.codebook.shape[0])
            self._module = module.to(inputs.x.device).train(scope != "inference")

    def reset(self) -> None:
        """Puts codebook and statistics back where they started."""
        if self.scope != "assign":
            codebook, cluster_size, *embed_sum = self._state()
            codebook.copy_(self.inputs.codebook)
            # without a past, whose average would hide the last bits of a step's sums
            cluster_size.fill_(1 if embed_sum else 0)
            for sums in embed_sum:
                sums.zero_()

    def step(self) -> Outputs:
        x, codebook, grad_quantized = self.inputs
        if self.scope == "assign":
            return {"indices": self._search(x.detach(), codebook)}
        # a batch of one: what vector-quantize-pytorch takes for [N, D] is [N, 1, D]
        if self.scope == "inference":
            with torch.no_grad():
                quantized, indices, _ = self._module(x[None])
            return {"quantized": quantized[0], "indices": indices[0]}
        quantized, indices, loss = self._module(x[None])
        outputs = {"quantized": quantized[0], "indices": indices[0], "loss": loss}
        if self.scope == "training":
            grads = [grad_quantized[None], torch.ones_like(loss)]
            (outputs["grad_x"],) = torch.autograd.grad([quantized, loss], x, grads)
        return {name: value.detach() for name, value in outputs.items()}

    def from_start(self) -> Outputs:
        """Outputs, and what became of the state, of a first step."""
        self.reset()
        return {**self.step(), **self.state()}

    def state(self) -> Outputs:
        """What the step made of codebook and statistics."""
        if self.scope in ("assign", "inference"):
            return {}
        return {n: t.detach().clone() for n, t in zip(STATE, self._state(), strict=False)}

    def _state(self) -> tuple[Tensor, ...]:
        """Codebook, cluster sizes and, where there are any, averaged sums."""
        if hasattr(self._module, "_codebook"):
            peer = self._module._codebook
            return peer.embed[0], peer.cluster_size[0], peer.embed_avg[0]
        state = self._module.codebook, self._module.cluster_size
        # earlier versions of ours had the sums
        return (*state, self._module.embed_sum) if hasattr(self._module, "embed_sum") else state


class Plain(nn.Module):
    """A quantizer in plain torch around any search."""

    def __init__(self, search: Callable[[], Search], dim: int, codebook_size: int) -> None:
        super().__init__()
        self.search = search()
        self.register_buffer("codebook", torch.zeros(codebook_size, dim))
        self.register_buffer("cluster_size", torch.ones(codebook_size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = self.search(x.detach()[0], self.codebook.to(x.dtype))[None]
        codes = self.codebook[indices]
        loss = COMMITMENT_WEIGHT * (x - codes).square().mean()
        if self.training:
            self._learn(x.detach()[0].float(), indices[0])
        return x + (codes - x).detach(), indices, loss

    @torch.no_grad()
    def _learn(self, x: Tensor, indices: Tensor) -> None:
        counts = torch.bincount(indices, minlength=self.codebook.shape[0]).float()
        sums = torch.zeros_like(self.codebook).index_add_(0, indices, x)
        self.cluster_size.lerp_(counts, 1 - DECAY)
        share = ((1 - DECAY) * counts / self.cluster_size).nan_to_num_(0)[:, None]
        self.codebook.lerp_(sums / counts.clamp(min=1)[:, None], share)


def _ours(precision: str) -> dict[str, Callable]:
    return {
        "search": lambda: partial(vqtriton.nearest_code, precision=precision),
        "module": partial(
            vqtriton.VectorQuantize,
            decay=DECAY,
            commitment_weight=COMMITMENT_WEIGHT,
            precision=precision,
        ),
    }


def _addmm_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    half_sqnorm = codebook.square().sum(1) / 2
    return torch.addmm(half_sqnorm, x, codebook.T, alpha=-1).argmin(1)


def _cdist_argmin(x: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(x, codebook).argmin(1)


def _peer(dim: int, codebook_size: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(
        dim=dim,
        codebook_size=codebook_size,
        decay=DECAY,
        eps=EPS,
        commitment_weight=COMMITMENT_WEIGHT,
        rotation_trick=False,
    )


def _faiss() -> Search:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def search(x: Tensor, codebook: Tensor) -> Tensor:
        return torch.from_numpy(faiss.knn(x.numpy(), codebook.numpy(), 1)[1][:, 0])

    return search


def _flash_kmeans(norms_are_given: bool) -> Search:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    norms: list[Tensor] = []

    def search(x: Tensor, codebook: Tensor) -> Tensor:
        if not (norms_are_given and norms):
            norms[:] = (t.float().square().sum(1)[None] for t in (x, codebook))
        return euclid_assign_triton(x[None], codebook[None], norms[0], c_sq=norms[1])[0]

    return search


OURS, PEER = "vqtriton exact", "vector-quantize-pytorch"
SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(
            OURS,
            "vqtriton",
            **_ours("exact"),
            is_exact=True,
            is_repeatable=True,
            holds_no_matrix=True,
        ),
        # the screen alone; on a GPU it multiplies 16-bit numbers
        Subject(
            "vqtriton fast",
            "vqtriton",
            **_ours("fast"),
            is_repeatable=True,
            holds_no_matrix=True,
            roundoff=2.0**-11 if torch.cuda.is_available() else 2.0**-24,
        ),
        Subject(
            "vqtriton.reference",
            "vqtriton",
            search=lambda: vqtriton.reference.nearest_code,
            is_exact=True,
            bytes_per_pair=32,
        ),
        Subject("torch addmm+argmin", "torch", search=lambda: _addmm_argmin, bytes_per_pair=4),
        Subject(
            "torch.compile of it",
            "torch",
            search=lambda: torch.compile(_addmm_argmin, dynamic=False),
            is_compiled=True,
            bytes_per_pair=4,
        ),
        Subject(
            "torch.cdist+argmin",
            "torch",
            search=lambda: _cdist_argmin,
            dtypes=(torch.float32,),
            bytes_per_pair=4,
        ),
        Subject(PEER, PEER, module=_peer, scopes=SCOPES[1:], bytes_per_pair=24),
        Subject(
            "faiss",
            "faiss-cpu",
            search=_faiss,
            scopes=("assign",),
            devices=("cpu",),
            dtypes=(torch.float32,),
        ),
        # its dots of float32 may round their inputs to TF32
        *(
            Subject(
                name,
                "flash-kmeans",
                search=partial(_flash_kmeans, norms_are_given),
                scopes=("assign",),
                devices=("cuda",),
                roundoff=2.0**-11,
            )
            for name, norms_are_given in (
                ("flash-kmeans", False),
                ("flash-kmeans, norms given", True),
            )
        ),
    )
}
MODULES = (OURS, "vqtriton fast", "torch addmm+argmin", PEER)


def default_subjects(scope: str, device: str, dtype: torch.dtype) -> list[str]:
    """Where it is the search that is compared, all but the reference, which takes seconds."""
    names = MODULES if scope != "assign" else [n for n in SUBJECTS if n != "vqtriton.reference"]
    return [name for name in names if SUBJECTS[name].can_run(scope, device, dtype)]
