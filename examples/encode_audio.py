"""Audio to tokens with a codec of transformers, by its own search and by that of vqtriton.

    .venv/bin/python examples/encode_audio.py
    .venv/bin/python examples/encode_audio.py --codec mimi --dtype bfloat16
    .venv/bin/python examples/encode_audio.py --model FOLDER --wav speech.wav --out tokens.npz

``vqtriton.patch`` changes the search for the nearest codes and nothing else in the codec. The
report says whether the tokens are the nearest codes, whether they depend on the batch, and what
the search costs. Without ``--model`` the weights are random: no checkpoint is downloaded.
"""

from __future__ import annotations

import startup  # isort: skip

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from compare_tokens import BATCH
from sounds import chord
from token_args import add_flags, check_flags, load_model, need
from token_report import report
from torch import Tensor
from train_args import Parser
from wav_file import read_wav, resample


class Codec(NamedTuple):
    """A codec of transformers; its classes are named ``name`` + Model and Config."""

    name: str
    # the method of its quantizer that the model calls
    method: str
    # the attribute of its quantizer that is the number of levels
    levels: str
    # quantizer, latents [B, D, T], levels -> tokens [B, levels, T]
    tokens: Callable[[Any, Tensor, int], Tensor]


def encodec_tokens(quantizer: Any, latents: Tensor, levels: int) -> Tensor:
    # a bandwidth, in kbit/s, between that of these levels and that of one more
    a_level = np.log2(quantizer.codebook_size) * quantizer.frame_rate / 1000
    return quantizer.encode(latents, (levels + 0.5) * a_level).transpose(0, 1)


CODECS = {
    "encodec": Codec("Encodec", "encode", "num_quantizers", encodec_tokens),
    "mimi": Codec(
        "Mimi", "encode", "max_num_quantizers", lambda q, x, n: q.encode(x, n).transpose(0, 1)
    ),
    "dac": Codec("Dac", "forward", "n_codebooks", lambda q, x, n: q(x, n)[1]),
}


def build_parser() -> Parser:
    parser = Parser("Compare the tokens of an audio codec with and without vqtriton.")
    parser.add("wav", "WAV file, PCM; without it, a chord is generated", type=Path)
    parser.add("seconds", "length of the chord; of a longer WAV file, only the start is used", 16.0)
    add_flags(parser, "a checkpoint of --codec")
    parser.begin("codec")
    parser.add("codec", "class of transformers", "encodec", choices=sorted(CODECS))
    parser.add("levels", "codebooks to use (default: 8, or all if there are fewer)", type=int)
    return parser


def parse_args(parser: Parser, argv: list[str] | None) -> Namespace:
    args = parser.parse_args(argv)
    check_flags(parser, args)
    parser.check(args, "seconds", 1, 3600)
    parser.check(args, "levels", 1, 2**10)
    if args.wav is not None and not args.wav.is_file():
        parser.fail("wav", f"{args.wav} is not a file")
    return args


def read_audio(parser: Parser, args: Namespace, rate: int, channels: int) -> tuple[np.ndarray, str]:
    """Samples [channels, T] at the rate of the codec, and where they come from."""
    if args.wav is None:
        samples, what = chord(args.seconds, rate), "a generated chord"
    else:
        try:
            samples, found = read_wav(args.wav, args.seconds)
        except (OSError, ValueError) as error:
            parser.fail("wav", error)
        what = str(args.wav)
        if found != rate:
            samples = resample(samples, found, rate)
            what += f", resampled from {found} Hz by a Fourier transform"
    if len(samples) != channels:
        samples = np.repeat(samples.mean(0, keepdims=True), channels, axis=0)
    if samples.shape[1] < rate:
        parser.fail("wav", f"{args.wav} lasts {samples.shape[1] / rate:.2f} s; it must be 1 s")
    return samples, what


def latents_of(model: Any, method: str, audio: Tensor) -> Tensor:
    """What the quantizer of the model is given, [B, D, T], for audio [B, channels, samples]."""
    given: list[Tensor] = []
    original = getattr(model.quantizer, method)

    def watched(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(latents)
        return original(latents, *args, **kwargs)

    model.quantizer.__dict__[method] = watched
    try:
        model.encode(audio)
    finally:
        del model.quantizer.__dict__[method]
    # a codec may encode long audio in several chunks
    return torch.cat(given, -1)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parse_args(parser, argv)
    codec = CODECS[args.codec]
    transformers = need("transformers")
    config = getattr(transformers, f"{codec.name}Config")()
    model = load_model(parser, args, "transformers", f"{codec.name}Model", config)
    most = getattr(model.quantizer, codec.levels)
    parser.check(args, "levels", 1, most + 1)
    args.levels = args.levels or min(8, most)
    rate = model.config.sampling_rate
    samples, what = read_audio(parser, args, rate, getattr(model.config, "audio_channels", 1))
    seconds = samples.shape[1] / rate
    pieces = np.split(samples[:, : samples.shape[1] // BATCH * BATCH], BATCH, axis=1)
    audio = torch.from_numpy(np.stack(pieces)).to(args.device, getattr(torch, args.dtype))
    source = "random weights" if args.model is None else f"the weights in {args.model}"
    print(f"{codec.name}Model with {source}, {args.dtype}, on {args.device}; {args.levels} levels.")
    print(f"Audio: {what}; {seconds:.1f} s at {rate} Hz, cut into {BATCH} pieces.", flush=True)
    latents = latents_of(model, codec.method, audio)

    def quantize(quantizer: Any, latents: Tensor) -> Tensor:
        return codec.tokens(quantizer, latents, args.levels)

    report(args, model, "quantizer", quantize, latents)


if __name__ == "__main__":
    startup.run(main)
