"""How far a run is: a bar in a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

# seconds between two lines
PAUSE = 10.0


class Progress:
    """Counts up to a total.

    Args:
        total: what the whole run counts up to.
        done: how much of it was done before.
        is_shown: False shows nothing: on all ranks but the first.
    """

    def __init__(self, total: int, done: int = 0, is_shown: bool = True) -> None:
        self.total, self.done = total, done
        self.began_with, self.start = done, time.perf_counter()
        self.last_line = self.start
        self.numbers = ""
        is_terminal = is_shown and sys.stderr.isatty()
        self.prints_lines = is_shown and not is_terminal
        self.bar = tqdm(
            total=total,
            initial=done,
            leave=False,
            disable=not is_terminal,
            # without the counts and rates of the default there is room for a bar in 80 columns
            bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left{postfix}",
        )

    def advance(self, count: int, title: str) -> None:
        self.done += count
        self.bar.set_description_str(title, refresh=False)
        self.bar.update(count)
        now = time.perf_counter()
        if self.prints_lines and now - self.last_line >= PAUSE:
            self.last_line = now
            left = (now - self.start) * (self.total - self.done) / (self.done - self.began_with)
            percent = 100 * self.done / self.total
            print(f"{title}: {percent:.0f} %, {minutes(left)} left{self.numbers}", flush=True)

    def show(self, values: dict[str, float]) -> None:
        """Numbers that are shown from now on."""
        self.bar.postfix = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        self.numbers = f", {self.bar.postfix}"

    def write(self, line: str) -> None:
        """A line that stays."""
        self.last_line = time.perf_counter()
        tqdm.write(line)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


def minutes(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
