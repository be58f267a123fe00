"""Trains a small neural audio codec with a residual quantizer: five minutes on two CPU cores.

    .venv/bin/python examples/train_codec.py
    .venv/bin/python examples/train_codec.py --resume
    .venv/bin/python examples/train_codec.py --wavs FOLDER
    .venv/bin/python examples/train_codec.py --epochs 1 --steps 20      # only to see it run

A sound becomes frames of 64 samples, and a frame becomes one token per level. The decoder can also
work with those of the first levels: fewer bits, and a lower signal-to-noise ratio (SNR). Without
``--wavs``, the script makes its sounds: chords, sweeps, plucked strings, bursts of noise.

The folder ``--out`` gets after each epoch: log.jsonl, a line an epoch; metrics.json, the last of
them and what made it; snr.png; original.wav, and levels_N.wav, what is left of it with N levels;
and checkpoint.safetensors, from which --resume goes on as if nothing had happened.
"""

from __future__ import annotations

import startup  # isort: skip

import hashlib
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import plots
import torch
import torch.nn.functional as F
from codec import FRAME, Codec, snr, spectral_distance
from run_files import write_atomically
from sounds import make_sounds
from torch import Tensor, nn
from train_args import REVIVE_BELOW, Parser, add_run_flags, check_places
from trainer import Trainer, Values, end_if_complete, make_repeatable
from wav_file import read_wav, resample, to_wav

import vqtriton

# frames of a clip, which is what is trained on, and of a piece, which is what is tested on
CLIP, PIECE = 64, 256
# clips that the codebooks start from, by k-means
START_CLIPS = 128
# pieces that are tested on, at most, and those that are written
TEST_PIECES, SHOWN_PIECES = 64, 8
# what makes a codec what it is
RECORDED = (
    *("rate", "sounds", "seconds", "channels", "dim", "codebook_size", "levels", "decay"),
    *("threshold_ema_dead_code", "epochs", "steps", "batch_size", "lr", "seed"),
)


class Sounds:
    """What to train on, float32 [samples], and to test on, [pieces, samples of a piece].

    Raises:
        ValueError: the folder of --wavs has no WAV files, or they do not do.
    """

    def __init__(self, args: Namespace) -> None:
        if args.wavs is None:
            made = make_sounds(args.sounds, PIECE * FRAME, args.rate, args.seed)
            pieces = torch.from_numpy(made)
        else:
            pieces = torch.from_numpy(read_folder(args.wavs, args.rate, args.seconds))
        count = max(1, len(pieces) // 10)
        if len(pieces) == count or not pieces[:-count].any() or not pieces[-count:].any():
            raise ValueError(f"{args.wavs} has less than two seconds of sound, or it is silent")
        self.train = pieces[:-count].flatten().to(args.device)
        self.test = pieces[-count:][:TEST_PIECES].to(args.device)

    def clips(self, starts: np.ndarray) -> Tensor:
        """[B, samples of a clip]."""
        places = torch.from_numpy(starts)[:, None] + torch.arange(CLIP * FRAME)
        return self.train[places.to(self.train.device)]


def read_folder(folder: Path, rate: int, seconds: float) -> np.ndarray:
    """All WAV files in a folder and below it, in pieces; the last of each is filled with zeros."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav")
    if not paths:
        raise ValueError(f"{folder} has no WAV files")
    pieces = []
    for path in paths:
        samples, found = read_wav(path, seconds)
        mono = resample(samples.mean(0), found, rate)
        pieces.append(np.pad(mono, (0, -len(mono) % (PIECE * FRAME))))
    return np.concatenate(pieces).reshape(-1, PIECE * FRAME)


def describe(record: dict[str, Any]) -> str:
    """What a codec does on the test set, in words."""
    first, last = record["levels"][0], record["levels"][-1]
    return (
        f"on the test set SNR {first['snr_db']:.1f} dB with 1 level, "
        f"{last['snr_db']:.1f} dB with {last['levels']} ({last['kbps']:.2f} kbit/s)"
    )


class CodecTrainer(Trainer):
    unit = "clips"
    shown = ("loss", "SNR")
    describe = staticmethod(describe)

    def __init__(self, args: Namespace, model: Codec, sounds: Sounds) -> None:
        optimizer = torch.optim.Adam(model.parameters(), args.lr)
        super().__init__(args, model, optimizer, args.steps * args.batch_size, warmup=0.1)
        self.sounds, self.vq = sounds, model.vq
        self.sums = {"sums": torch.zeros(3, dtype=torch.float64, device=args.device)}
        if not args.checkpoint:
            self.start()

    @torch.no_grad()
    def start(self) -> None:
        """The scale of the sounds, and codes of all levels by k-means of one large batch."""
        self.model.scale.copy_(self.sounds.train.square().mean().sqrt())
        clips = self.sounds.clips(self.starts(0, START_CLIPS))
        # all levels, whatever dropout would leave
        self.vq(self.model.latents(clips), num_quantizers=self.vq.num_quantizers)

    def starts(self, epoch: int, count: int) -> np.ndarray:
        """Where the clips of an epoch begin: of nothing but the seed and the epoch."""
        rng = np.random.default_rng((self.args.seed, epoch))
        return rng.integers(0, len(self.sounds.train) - CLIP * FRAME + 1, count)

    def batches(self, places: Iterable[Tensor], epoch: int) -> Iterator[Tensor]:
        starts = self.starts(epoch, self.count)
        for batch in places:
            yield self.sounds.clips(starts[batch.numpy()])

    def train_on(self, batch: Tensor, is_looked_at: bool) -> Values:
        for layer in self.vq.layers:
            layer.threshold_ema_dead_code = self.args.threshold_ema_dead_code if self.revives else 0
        self.model.train()
        target = batch / self.model.scale
        decoded, _, vq_loss = self.model(target)
        wave, spectral = F.mse_loss(decoded, target), spectral_distance(decoded, target)
        loss = wave + spectral + vq_loss.sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.sums["sums"] += torch.stack([wave, spectral, vq_loss.sum()]).detach() * len(batch)
        if not is_looked_at:
            return {}
        self.check(loss)
        return {"loss": loss.item(), "SNR": snr(target, decoded.detach())}

    def end_epoch(self) -> dict[str, Any]:
        terms = (self.sums["sums"] / self.count).tolist()
        return dict(zip(("wave_term", "spectral_term", "vq_term"), terms, strict=True))

    def publish(self, record: dict[str, Any]) -> None:
        model, out, test = self.model.eval(), self.args.out, self.sounds.test
        record["levels"] = measure(model, test, self.args.rate)
        shown = test[:SHOWN_PIECES]
        record["tokens"] = check_tokens(model, shown)
        write_atomically(out / "snr.png", plots.snr_by_levels(record["levels"]))
        heard = {"original.wav": shown}
        indices = model.encode(shown)
        for count in sorted({1, 2, 4, self.vq.num_quantizers}):
            if count <= self.vq.num_quantizers:
                heard[f"levels_{count}.wav"] = model.decode(indices[..., :count])
        for name, sounds in heard.items():
            write_atomically(out / name, to_wav(sounds.flatten().cpu().numpy(), self.args.rate))

    def configs(self) -> dict[str, Any]:
        samples = self.sounds.train.cpu().numpy().tobytes()
        sha256 = hashlib.sha256(samples).hexdigest()
        return super().configs() | {"quantizer": self.vq.config, "sounds": sha256}

    def restore(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        if info.get("sounds") != self.configs()["sounds"]:
            raise ValueError("it was trained on other sounds; say the same --wavs")
        super().restore(tensors, info)


@torch.no_grad()
def measure(model: Codec, sounds: Tensor, rate: int) -> list[dict[str, float]]:
    """What the first levels do with sounds [B, T], a row for each number of them."""
    indices = model.encode(sounds)
    rows, kbps = [], 0.0
    for level, size in enumerate(model.vq.codebook_sizes, 1):
        kbps += math.log2(size) * rate / FRAME / 1000
        counts = vqtriton.metrics.counts(indices[..., level - 1], size)
        rows.append(
            {
                "levels": level,
                "kbps": kbps,
                "snr_db": snr(sounds, model.decode(indices[..., :level])),
                # the last of these levels alone
                "perplexity": vqtriton.metrics.perplexity(counts).item(),
                "usage": vqtriton.metrics.usage(counts).item(),
            }
        )
    return rows


@torch.no_grad()
def check_tokens(model: Codec, sounds: Tensor) -> dict[str, int]:
    """Tokens of the whole chain on whole sounds [B, T], and how many differ computed in parts."""
    vq, x = model.vq, model.latents(sounds)
    whole = vq(x).indices
    chains = range(1, vq.num_quantizers + 1)
    alone = [(vq(x, num_quantizers=n).indices != whole[..., :n]).sum() for n in chains]
    frames = torch.cat([vq(frame).indices for frame in x.split(1, dim=2)], 1)
    return {
        "count": whole.numel(),
        "differ_in_shorter_chains": int(sum(alone)),
        "differ_frame_by_frame": int((frames != whole).sum()),
    }


def show(record: dict[str, Any]) -> None:
    """Prints what came out, level by level."""
    print("\nlevels   kbit/s   SNR in dB   perplexity   usage   (of the last level)")
    for row in record["levels"]:
        print(
            f"{row['levels']:6}{row['kbps']:9.2f}{row['snr_db']:12.2f}"
            f"{row['perplexity']:13.1f}{row['usage']:8.0%}"
        )
    tokens = record["tokens"]
    print(
        f"Of {tokens['count']} tokens, {tokens['differ_in_shorter_chains']} differ where the first "
        "levels are computed alone,\n"
        f"and {tokens['differ_frame_by_frame']} where the frames are quantized one by one."
    )


def build_parser() -> Parser:
    parser = Parser("Train an audio codec with a residual quantizer, and measure it by levels.")
    add = parser.add
    add("wavs", "folder with WAV files, PCM; without it, sounds are made", type=Path)
    add("seconds", "of a longer WAV file, only the start is used", 600.0)
    add("sounds", "how many sounds of a second to make; one in ten is for the test", 600)
    add("rate", "samples a second; WAV files of another rate are resampled", 16000)
    parser.begin("model")
    add("channels", "of the outermost layers; the innermost have four times as many", 24)
    parser.begin("quantizer, see vqtriton.ResidualVectorQuantize")
    add("dim", "D, size of a code", 64)
    add("codebook_size", "K, number of codes of each level", 256)
    add("levels", "number of levels", 8)
    add("decay", "of the moving averages that the codes are", 0.98)
    text = "revive codes that fewer vectors a step choose, until 80 %% of training; 0 is never "
    text += f"(default: {REVIVE_BELOW} · frames of a batch / K)"
    add("threshold_ema_dead_code", text, type=float)
    parser.begin("training")
    add("epochs", "with --resume, more than before", 6)
    add("steps", "of an epoch; each is a batch of clips from random places", 200)
    add("batch_size", f"clips a step, each of {CLIP * FRAME} samples", 16)
    add("lr", "peak of the OneCycle rate", 2e-3)
    add_run_flags(parser, "runs/codec")
    return parser


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The flags, checked; ``recorded``: what makes a run what it is; ``checkpoint``, or None."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs", "codec")
    args = parser.resume(args, argv)
    limits: dict[str, tuple[float, float]] = dict.fromkeys(
        ("channels", "dim", "codebook_size", "epochs", "steps", "batch_size"), (1, 2**31)
    )
    limits |= {"levels": (1, 2**10), "sounds": (2, 2**20), "rate": (1000, 2**20), "decay": (0, 1)}
    limits |= {"lr": (1e-9, math.inf), "seed": (0, 2**63), "seconds": (1, 2**31)}
    limits |= {"threshold_ema_dead_code": (0, math.inf)}
    for name, (low, high) in limits.items():
        parser.check(args, name, low, high)
    if args.wavs is not None and not args.wavs.is_dir():
        parser.fail("wavs", f"{args.wavs} is not a folder")
    check_places(parser, args)
    if args.threshold_ema_dead_code is None:
        args.threshold_ema_dead_code = REVIVE_BELOW * args.batch_size * CLIP / args.codebook_size
    args.recorded = {name: getattr(args, name) for name in RECORDED}
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    make_repeatable(args)
    end_if_complete(args, describe)
    what = "generated sounds" if args.wavs is None else f"the WAV files in {args.wavs}"
    print(f"Training an audio codec on {what}.", flush=True)
    try:
        sounds = Sounds(args)
    except ValueError as error:
        raise SystemExit(f"{startup.SCRIPT}: {error}") from error
    vq = vqtriton.ResidualVectorQuantize(
        args.dim,
        args.codebook_size,
        args.levels,
        channel_last=False,
        decay=args.decay,
        kmeans_init=True,
        # half of the batches train the first levels to do without the others
        quantize_dropout=0.5,
    )
    trainer = CodecTrainer(args, Codec(vq, args.channels).to(args.device), sounds)
    trainer.run()
    show(trainer.log[-1])


if __name__ == "__main__":
    startup.run(main)
