"""The progress bar: one line on a terminal, silence elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping


class Bar:
    """A running bar; without a terminal, or without tqdm, every call does nothing."""

    def __init__(self, bar) -> None:
        self._bar = bar
        self._shown: dict[str, str] = {}

    def advance(self, record: Mapping[str, float]) -> None:
        """One step done."""
        self._show({"loss": record["loss"]})
        if self._bar is not None:
            self._bar.update(1)

    def note(self, values: Mapping[str, float]) -> None:
        """Shows the newest evaluation."""
        self._show({key: value for key, value in values.items() if key.startswith(("accuracy/", "forward_kl/"))})

    def _show(self, values: Mapping[str, float]) -> None:
        if self._bar is not None:
            self._shown |= {key.replace("accuracy/", ""): f"{value:.3f}" for key, value in values.items()}
            self._bar.set_postfix(self._shown, refresh=False)


class Progress:
    """Makes bars on standard error where it is a terminal and `shown` is true."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()

    def _open(self, title: str, total: int, initial: int = 0):
        if not self._shown:
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=total, initial=initial, desc=title, dynamic_ncols=True)

    @contextlib.contextmanager
    def training(self, total: int, done: int) -> Iterator[Bar]:
        """The bar of the run's steps."""
        bar = self._open("distilling", total, done)
        try:
            yield Bar(bar)
        finally:
            if bar is not None:
                bar.close()

    def supervised(self, title: str, total: int) -> Callable[[int, float], None]:
        """A callback for train_on_sequences that moves a bar of its own."""
        bar = self._open(title, total)

        def on_step(step: int, loss: float) -> None:
            if bar is not None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update(1)
                if step + 1 == total:
                    bar.close()

        return on_step
