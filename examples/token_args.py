"""The flags of encode_audio.py and tokenize_images.py, and the models that these name."""

from __future__ import annotations

import startup  # isort: skip

import json
from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from train_args import Parser

DTYPES = ("float32", "float16", "bfloat16")
FORMATS = (".npz", ".safetensors")


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
