"""`patch` and `unpatch`: a module gets a subclass of its class, or its class back.

No class of another project is changed, so nothing but the given modules is touched.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import re
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from vqtriton import dispatch
from vqtriton.clients.search import ATTRIBUTE, Searches
from vqtriton.clients.table import CLIENTS, Client
from vqtriton.clients.trial import disagreement

# the names of classes that are mentioned where they are not known
QUANTIZER = re.compile("codebook|quantiz", re.IGNORECASE)
# the standard library's, by which a pickle makes an object of a class
REBUILD = vars(copyreg)["_reconstructor"]


class Patched:
    """What `patch` did. As a context manager, it takes that back at the end of the block.

    Attributes:
        modules: dict, the name of each module that is patched now -> what it was recognised as.
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
        for module in self._changed:
            _restore(module)


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
        ValueError: an unknown backend.

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
    # from the inside: a module around a codebook asks whether that is patched
    for name, module in reversed(list(model.named_modules())):
        if _is_patched(module):
            patched.left[name] = "it is patched already"
            continue
        found = _find(module)
        if isinstance(found, str):
            patched.left[name] = found
        elif found is not None:
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
    for names in (patched.modules, patched.left):
        in_order = list(reversed(names.items()))
        names.clear()
        names.update(in_order)
    return patched


def unpatch(model: nn.Module) -> list[str]:
    """Gives the modules that `patch` changed their own classes back.

    Args:
        model: a module; those inside of it are restored as well.

    Returns:
        The names of the modules that were restored.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> vqtriton.unpatch(torch.nn.Linear(8, 8))
        []
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    names = [name for name, module in model.named_modules() if _is_patched(module)]
    for name in names:
        _restore(model.get_submodule(name))
    return names


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
        return "its codebook was left"
    if codebook.is_meta:
        return "its codebook has no values yet: patch the model once it is loaded"
    if type(codebook) not in (Tensor, nn.Parameter):
        return f"its codebook is a {type(codebook).__name__}"
    return None


def _is_patched(module: nn.Module) -> bool:
    return ATTRIBUTE in module.__dict__


def _restore(module: nn.Module) -> None:
    if _is_patched(module):
        module.__class__ = type(module).__mro__[1]
        del module.__dict__[ATTRIBUTE]


@functools.cache
def _subclass(original: Any, place: int) -> Any:
    """A class with the methods of a row of the table."""
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(original, name) for name in names}
    changed = {"__reduce_ex__": _reduce_ex, "__deepcopy__": _deepcopy}
    return type(original.__name__, (original,), {**namespace, **changed, **CLIENTS[place].methods})


def _reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """A pickle has the class of the other project."""
    state = {name: value for name, value in self.__getstate__().items() if name != ATTRIBUTE}
    return REBUILD, (type(self).__mro__[1], object, None), state


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    build, arguments, state = _reduce_ex(self, None)
    other = build(*arguments)
    memo[id(self)] = other
    other.__setstate__(copy.deepcopy(state, memo))
    other.__dict__[ATTRIBUTE] = copy.copy(self.__dict__[ATTRIBUTE])
    other.__class__ = type(self)
    return other
