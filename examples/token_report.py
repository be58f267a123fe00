"""What encode_audio.py and tokenize_images.py have in common: flags, the report and the file."""

from __future__ import annotations

import startup  # isort: skip

import io
import json
from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from compare_tokens import BATCH, TURNS, Comparison, Quantize, Side, compare, fill_codebooks
from run_files import write_atomically
from torch import Tensor
from train_args import Parser

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = (".npz", ".safetensors")
FILLED = (
    "The weights are random, so the figures say nothing about a trained model. Each codebook\n"
    "was filled with vectors that its level is given, plus noise of half their deviation."
)


def add_flags(parser: Parser, model: str) -> None:
    """The flags of both."""
    parser.begin("model")
    parser.add("model", f"folder with {model}; without it, the weights are random", type=Path)
    parser.add("dtype", "of the model and its input", "float32", choices=DTYPES)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add("device", "where to compute", best, choices=("cpu", "cuda"))
    parser.begin("results")
    text = "file for the tokens with and without vqtriton, ending in .npz or .safetensors"
    parser.add("out", text, type=Path)


def check_flags(parser: Parser, args: Namespace) -> None:
    """Ends the program with a line that names the flag that is wrong."""
    if args.model is not None and not args.model.is_dir():
        parser.fail("model", f"{args.model} is not a folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.fail("device", "cuda; torch finds no GPU that it can use")
    if args.out is None:
        return
    if args.out.suffix not in FORMATS:
        parser.fail("out", f"{args.out}; its name must end in .npz or .safetensors")
    if not args.out.parent.is_dir() or args.out.is_dir():
        parser.fail("out", f"{args.out} is not a file in a folder that exists")


def need(package: str) -> Any:
    """Imports a package that only some examples need."""
    if find_spec(package) is None:
        raise SystemExit(
            f"{startup.SCRIPT}: {package} is not installed. In the folder of the clone: "
            "pip install '.[clients]'"
        )
    return import_module(package)


def load_model(parser: Parser, args: Namespace, package: str, name: str, config: Any = None) -> Any:
    """The class ``name`` of a package: from --model, or random from a config of that class."""
    model_class = getattr(need(package), name)
    if args.model is None:
        torch.manual_seed(0)
        model = model_class(config) if package == "transformers" else model_class(**config)
    else:
        options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
        try:
            written = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
            found = written.get("_class_name") or (written.get("architectures") or [name])[0]
            if found != name:
                raise ValueError(f"its config.json is that of {found}, not of {name}")
            model, info = model_class.from_pretrained(args.model, **options)
            if info["missing_keys"]:
                raise ValueError(f"it has no weights for {sorted(info['missing_keys'])[0]}")
        # what these packages raise for a damaged checkpoint has no common class
        except Exception as error:
            parser.fail("model", f"{args.model}: {str(error).splitlines()[0]}")
    # that of diffusers warns of modules that have to stay in float32, even where there are none
    return torch.nn.Module.to(model.eval(), args.device, getattr(torch, args.dtype))


def report(args: Namespace, model: Any, name: str, quantize: Quantize, latents: Tensor) -> None:
    """Compares the searches of the quantizer ``name``; prints, and writes what --out asks for."""
    if args.model is None:
        fill_codebooks(model.get_submodule(name), quantize, latents)
        print(FILLED)
    print(describe(latents), flush=True)
    comparison = compare(model, name, quantize, latents)
    show(comparison)
    if args.out is not None:
        save(args.out, comparison)


def describe(latents: Tensor) -> str:
    """How hard the search is in few bits: formulas with a product cancel what is common to all."""
    rows = latents.double().movedim(1, -1).flatten(0, -2)
    mean = rows.mean(0)
    ratio = (mean.square().sum() / (rows - mean).square().sum(1).mean()).sqrt().item()
    return (
        f"The mean of the latents is {ratio:.1f} times as long as their usual distance from it. The\n"
        "larger this is, the more tokens can rounding change."
    )


def show(comparison: Comparison) -> None:
    """Prints what was patched, and how the two searches compare."""
    patched, ours, own = comparison
    groups: dict[str, list[str]] = {}
    for module, what in patched.modules.items():
        groups.setdefault(what, []).append(module)
    for what, names in groups.items():
        ends = names[0] if len(names) == 1 else f"{len(names)} modules, {names[0]} to {names[-1]}"
        print(f"vqtriton.patch changed {ends}: {what}.")
    for module, why in patched.left.items():
        print(f"vqtriton.patch left {module or 'the model'}: {why}")
    total = ours.tokens.numel()
    print(f"\nTokens: int64 {list(ours.tokens.shape)}, which are items, levels and places.")
    sides = [own, ours]
    if isinstance(own, str):
        print(f"The model's own search cannot run here: {own}")
        sides = [None, ours]
    rows = [
        (f"time of the quantizer, ms, median of {TURNS}", _milliseconds),
        ("peak memory of the quantizer, MiB", _mebibytes),
        (f"tokens that differ in batches of 1 and {BATCH}", lambda side: side.changed),
        ("tokens that are not the nearest code", lambda side: int(side.wrong.sum())),
    ]
    print(f"\n{'':44}{'own search':>12}{'vqtriton':>12}")
    for text, value in rows:
        print(f"{text:44}" + "".join(f"{value(s) if s else '-':>12}" for s in sides))
    print(
        f"The last two rows count tokens, of {total} in all. The nearest code is the one with the\n"
        "least float64 distance from the vector that the search was given."
    )
    if isinstance(own, Side):
        show_levels(own, ours)


def _milliseconds(side: Side) -> str:
    return f"{1e3 * side.seconds:.2f}"


def _mebibytes(side: Side) -> str:
    return "?" if side.memory is None else f"{side.memory / 2**20:.2f}"


def show_levels(own: Side, ours: Side) -> None:
    """Prints, level by level, how many tokens differ and which of the two is right."""
    differ = torch.stack(
        [a.indices != b.indices for a, b in zip(own.searches, ours.searches, strict=True)]
    )
    if not differ.any():
        print("\nThe two give the same tokens.")
        return
    # after a token that differs, the next level is given another residual
    same_input = torch.stack(
        [(a.rows == b.rows).all(1) for a, b in zip(own.searches, ours.searches, strict=True)]
    )
    print(f"\n{int(differ.sum())} of {differ.numel()} tokens differ between the two:")
    print("level   differ   same input   own search wrong   vqtriton wrong")
    columns = torch.stack([differ, differ & same_input, own.wrong, ours.wrong]).sum(2).T.tolist()
    for level, (a, b, c, d) in enumerate(columns, 1):
        print(f"{level:5}{a:9}{b:13}{c:19}{d:17}")
    first = differ & same_input
    neither = ~(own.wrong | ours.wrong)
    a, b, c = (int((first & which).sum()) for which in (own.wrong, ours.wrong, neither))
    print(
        f"Where both searches were given the same vector, {int(first.sum())} tokens differ. The own\n"
        f"search is wrong in {a} of them, vqtriton in {b}. In {c} both codes are equally near."
    )
    if (differ & ~same_input).any():
        print(
            "The other tokens differ because an earlier level does, so that the two searches were\n"
            "given different residuals."
        )


def save(path: Path, comparison: Comparison) -> None:
    """Writes ``tokens``, and ``own_tokens`` if the model's own search can run."""
    tensors = {"tokens": comparison.ours.tokens}
    if isinstance(comparison.own, Side):
        tensors["own_tokens"] = comparison.own.tokens
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".npz":
        file = io.BytesIO()
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
        content = file.getvalue()
    else:
        content = safetensors.torch.save(tensors)
    write_atomically(path, content)
    print(f"\nWritten: {path}, with {' and '.join(tensors)}.")
