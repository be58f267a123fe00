"""`patch` and `unpatch`: a module gets a subclass of its class, or its class back.

No class of another project is changed, so nothing but the given modules is touched.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.utils.parametrize import is_parametrized

from vqtriton import dispatch
from vqtriton.clients.search import ATTRIBUTE, ORIGINAL, Searches
from vqtriton.clients.table import CLIENTS, Client
from vqtriton.clients.trial import disagreement

# the names of classes that are mentioned where they are not known
QUANTIZER = re.compile("codebook|quantiz", re.IGNORECASE)
# the standard library's, by which a pickle makes an object of a class
REBUILD = vars(copyreg)["_reconstructor"]


class Patched:
    """What `patch` did. As a context manager, it takes that back at the end of the block.

    Attributes:
        modules: dict, the name of each module that `patch` changed -> what it was recognised as.
        left: dict, the name of each module that looks like a quantizer but was left as it is ->
            the reason.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> with vqtriton.patch(model) as patched:
        ...     print(patched)
        nothing was patched
    """

    def __init__(self) -> None:
        self.modules: dict[str, str] = {}
        self.left: dict[str, str] = {}
        self._changed: list[nn.Module] = []

    def __str__(self) -> str:
        lines = [f"{name or '(the module)'}: {what}" for name, what in self.modules.items()]
        lines = lines or ["nothing was patched"]
        left = [f"{name or '(the module)'}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines + left)

    __repr__ = __str__

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        _restore(self._changed)


def patch(model: nn.Module, *, backend: str = "auto") -> Patched:
    """Lets the quantizers inside of a model search with vqtriton.

    It knows the quantizers of transformers (EnCodec, Mimi, DAC, XCodec, Higgs Audio, WavTokenizer,
    Chameleon, Janus, Emu3, GLM-Image), diffusers, taming-transformers, the original
    encodec, descript-audio-codec and moshi, and vector-quantize-pytorch 1.32. Each module is tried
    beside the new code first, on random values, so one that only resembles these is left alone.

    The module's class is replaced by a subclass of it; its tensors, its state dict and its
    methods' results keep their names, shapes and dtypes. Copies made by `copy.deepcopy` are patched
    as well. A pickle, such as ``torch.save(model)`` writes, has the class of the other project, so
    it loads without vqtriton, and unpatched. docs/models.md has the details.

    Args:
        model: any module; those inside of it are looked at as well.
        backend: see `vqtriton.nearest_code`.

    Returns:
        `Patched`, which says what was patched, and what was left and why. It can be printed, and
        used as a context manager.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown backend, or one that cannot run where a quantizer is. Then nothing is
            patched.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> print(vqtriton.patch(model))
        nothing was patched
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    if backend not in dispatch.BACKENDS:
        raise ValueError(
            f"backend is {backend!r:.80}; it must be one of {', '.join(dispatch.BACKENDS)}"
        )
    patched = Patched()
    try:
        _patch(model, backend, patched)
    except BaseException:
        _restore(patched._changed)
        raise
    return patched


def unpatch(model: nn.Module) -> list[str]:
    """Gives the modules that `patch` changed their own classes back.

    Args:
        model: a module; those inside of it are restored as well.

    Returns:
        The names of the modules that were restored.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: the class of a module was changed once more after `patch`, by a
            parametrization or by FSDP. Nothing is restored then.

    Example:
        >>> vqtriton.unpatch(torch.nn.Linear(8, 8))
        []
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    found = {name: module for name, module in model.named_modules() if _is_patched(module)}
    _restore(found.values())
    return list(found)


def _patch(model: nn.Module, backend: str, patched: Patched) -> None:
    # a module around a codebook asks whether that is patched
    for name, module in _from_the_inside(model):
        if _is_patched(module):
            patched.left[name] = "it is patched already"
            continue
        found = _find(module)
        if isinstance(found, str):
            patched.left[name] = found
        elif found is not None:
            dispatch.resolve_backend(
                backend, next(chain(module.parameters(), module.buffers())).device
            )
            module.__dict__[ATTRIBUTE] = Searches(backend)
            kind: Any = type(module)
            module.__class__ = _subclass(kind, CLIENTS.index(found))
            patched.modules[name] = found.project
            patched._changed.append(module)
        elif QUANTIZER.search(type(module).__name__):
            # around one that is mentioned it needs no mention
            inside = f"{name}." if name else ""
            if not any(other.startswith(inside) for other in (*patched.modules, *patched.left)):
                patched.left[name] = f"{type(module).__name__} is not known"


def _from_the_inside(
    module: nn.Module, name: str = "", seen: set[nn.Module] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, each after those inside of it."""
    seen = set() if seen is None else seen
    if module not in seen:
        seen.add(module)
        for place, child in module.named_children():
            yield from _from_the_inside(child, f"{name}.{place}" if name else place, seen)
        yield name, module


def _find(module: nn.Module) -> Client | str | None:
    """The kind of a quantizer; why it is left alone; None for another module."""
    if isinstance(module, ScriptModule):
        return None
    reason = None
    for base in type(module).__mro__:
        for client in CLIENTS:
            if not client.fits(base):
                continue
            codebook = client.codebook_of(module)
            if codebook is None:
                continue
            obstacle = _obstacle(module, base, client, codebook)
            if obstacle is None:
                obstacle = disagreement(module, base, client, codebook)
            if obstacle is None:
                return client
            # what the class itself says comes before what it inherits
            reason = reason or obstacle
    return reason


def _obstacle(module: nn.Module, base: type, client: Client, codebook: Tensor) -> str | None:
    for name in client.methods:
        if name in module.__dict__:
            return f"its {name} was replaced on the module itself, as hooks of accelerate do"
        if getattr(type(module), name) is not vars(base)[name]:
            return f"its class replaces {name} of {base.__name__}"
    if not all(_is_patched(inside) for inside in client.codebooks_inside(module)):
        return "the codebook inside of it was left"
    if is_parametrized(module):
        return "it is parametrized: patch it before that"
    if codebook.is_meta:
        return "its codebook has no values yet: patch the model once it is loaded"
    if type(codebook) not in (Tensor, nn.Parameter):
        return f"its codebook is a {type(codebook).__name__}"
    return None


def _is_patched(module: nn.Module) -> bool:
    return ATTRIBUTE in module.__dict__


def _restore(modules: Iterable[nn.Module]) -> None:
    modules = [module for module in modules if _is_patched(module)]
    for module in modules:
        if ORIGINAL not in vars(type(module)):
            raise RuntimeError(
                f"the class of a patched module is now {type(module).__name__}, which was made "
                "after the patch; take back what made it, then unpatch"
            )
    for module in modules:
        module.__class__ = getattr(module, ORIGINAL)
        del module.__dict__[ATTRIBUTE]


@functools.cache
def _subclass(original: Any, place: int) -> Any:
    """A class with the methods of a row of the table."""
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(original, name) for name in names}
    copying: dict[str, Any] = {"__reduce_ex__": _reduce_ex, "__copy__": _copy}
    if not hasattr(original, "__deepcopy__"):
        copying["__deepcopy__"] = _deepcopy
    namespace |= {ORIGINAL: original, **copying, **CLIENTS[place].methods}
    return type(original.__name__, (original,), namespace)


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """A pickle has the class of the other project."""
    state = {name: value for name, value in self.__getstate__().items() if name != ATTRIBUTE}
    return REBUILD, (getattr(self, ORIGINAL), object, None), state


def _copy(self: nn.Module) -> nn.Module:
    other = object.__new__(type(self))
    other.__dict__.update(self.__dict__)
    return other


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    other = object.__new__(type(self))
    memo[id(self)] = other
    other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
    return other
