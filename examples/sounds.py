"""Sounds that need no recording: chords, sweeps, plucked strings, noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# the first samples of each second of the chord are other notes
NOTES = (220.0, 246.94, 277.18, 293.66, 329.63, 369.99, 415.3, 440.0)


def chord(seconds: float, rate: int) -> np.ndarray:
    """Three notes at a time that fade, others in each second, and a little noise; [1, samples]."""
    time = np.arange(math.ceil(seconds * rate)) / rate
    second = time.astype(np.int64)
    total = np.random.default_rng(0).normal(0, 0.005, len(time))
    for voice in range(3):
        note = np.take(NOTES, (2 * voice + 3 * second) % len(NOTES))
        overtones = sum(np.sin(2 * np.pi * k * note * time) / k for k in (1, 2, 3))
        total += 0.15 * overtones * np.exp(-2 * (time - second))
    return total[None].astype(np.float32)


def random_chord(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Three or four notes of a scale with some overtones, which begin together and fade."""
    notes = rng.choice(NOTES, rng.integers(3, 5), replace=False) * rng.choice((0.5, 1.0))
    tones = [
        np.sin(2 * np.pi * k * note * time + rng.uniform(0, 6)) / k
        for note in notes
        for k in (1, 2, 3)
    ]
    return np.sum(tones, 0) * np.exp(-rng.uniform(0.5, 3) * time)


def sweep(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """A tone that rises or falls evenly between two pitches."""
    low, high = 2.0 ** rng.uniform(7, 10.5, 2)
    octaves = math.log2(high / low) / time[-1]
    # the phase is the integral of the frequency, low · 2^(octaves · time)
    turns = low * (2 ** (octaves * time) - 1) / (octaves * math.log(2))
    return np.sin(2 * np.pi * turns)


def plucked_strings(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Four notes one after the other, whose overtones fade the sooner the higher they are."""
    total = np.zeros_like(time)
    for begin in np.sort(rng.uniform(0, 0.8 * time[-1], 4)):
        note, place = rng.choice(NOTES), rng.uniform(0.1, 0.4)
        since = np.maximum(time - begin, 0)
        for k in range(1, 9):
            strength = np.sin(np.pi * k * place) / k
            total += strength * np.sin(2 * np.pi * k * note * since) * np.exp(-3 * k * since)
    return total


def bursts(rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Noise in short bursts, as of a drum."""
    noise = rng.normal(0, 1, len(time))
    begins = rng.uniform(0, time[-1], 4)
    envelope = sum(np.exp(-40 * (time - begin)) * (time >= begin) for begin in begins)
    # the mean of neighbours: less of the high frequencies
    return np.convolve(noise * envelope, np.ones(8) / 8, "same")


Kind = Callable[[np.random.Generator, np.ndarray], np.ndarray]
KINDS: tuple[Kind, ...] = (random_chord, sweep, plucked_strings, bursts)


def make_sounds(count: int, samples: int, rate: int, seed: int) -> np.ndarray:
    """float32 [count, samples] in [-0.5, 0.5], the kinds by turns; the first ones do not depend on
    how many there are.
    """
    time = np.arange(samples) / rate
    made = []
    for i in range(count):
        sound = KINDS[i % len(KINDS)](np.random.default_rng((seed, i)), time)
        made.append(0.5 * sound / np.abs(sound).max())
    return np.stack(made).astype(np.float32)
