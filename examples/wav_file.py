"""WAV files with uncompressed integer samples."""

from __future__ import annotations

import io
import math
import wave
from pathlib import Path

import numpy as np


def read_wav(path: Path, seconds: float) -> tuple[np.ndarray, int]:
    """The first seconds of a file, float32 [channels, samples] in [-1, 1), and its rate in Hz.

    Raises:
        ValueError: the file is not a whole WAV file of 8, 16, 24 or 32 bits PCM, or has no samples.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, rate, frames = file.getparams()[:4]
            frames = min(frames, math.ceil(seconds * rate))
            content = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        reason = str(error) or "it ends too early"
        raise ValueError(f"{path} cannot be read as a WAV file of PCM samples: {reason}") from error
    if width not in (1, 2, 3, 4):
        raise ValueError(f"{path} has {8 * width} bits a sample; they must be 8, 16, 24 or 32")
    if frames == 0 or rate < 1:
        raise ValueError(f"{path} has no samples")
    if len(content) < frames * channels * width:
        raise ValueError(f"{path} is cut short: {len(content)} bytes of samples are left")
    samples = np.frombuffer(content, np.uint8).reshape(-1, width)
    if width == 1:
        # unsigned, the others are signed
        samples = samples ^ 128
    # the bytes of a sample are the highest of a little-endian int32
    wide = np.zeros((len(samples), 4), np.uint8)
    wide[:, 4 - width :] = samples
    values = wide.view("<i4").reshape(-1, channels).T
    return (values / 2**31).astype(np.float32), rate


def to_wav(samples: np.ndarray, rate: int) -> bytes:
    """A file of 16 bits PCM, of samples [T] in [-1, 1]; what is beyond is cut off."""
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        # channels, bytes of a sample, rate; the other fields are those of uncompressed PCM
        writer.setparams((1, 2, rate, 0, "NONE", ""))
        writer.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return file.getvalue()


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """By the discrete Fourier transform: frequencies that the new rate cannot hold are cut off.

    The clip is taken as periodic, so its first and last milliseconds may mix a little.
    """
    if rate == new_rate:
        return samples
    length = samples.shape[-1]
    new_length = max(1, round(length * new_rate / rate))
    spectrum = np.fft.rfft(samples.astype(np.float64))
    return (np.fft.irfft(spectrum, new_length) * (new_length / length)).astype(np.float32)
