"""Profiling: a trace of some training steps, for TensorBoard's profile plugin or xprof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from revnet_jax.errors import tell, writing
from revnet_jax.training.distributed import is_first


class Trace:
    """A context that traces steps `start_step` to `start_step + num_steps - 1` into `folder`.

    Operations are named by the part of the step they belong to: forward, rewind (or backward),
    update, stem, transition, head. With several processes each records its own devices, in
    `folder/process_N`.
    """

    def __init__(self, folder: Path, *, start_step: int, num_steps: int, last_step: int):
        end = start_step + num_steps - 1
        if start_step < 1 or num_steps < 0 or (num_steps and end > last_step):
            raise ValueError(
                f"got start_step={start_step}, num_steps={num_steps}, expected steps of 1 to "
                f"{last_step}, or none: num_steps=0"
            )
        self._folder, self._steps = folder, range(start_step, start_step + num_steps)
        self._tracing = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def from_step(self, start: int) -> Trace:
        """Returns itself. Prints a note if training goes on after the first step to be traced."""
        if self._steps and start >= self._steps[0] and is_first():
            tell(
                f"note: config.profile.start_step: got {self._steps[0]}, expected more than "
                f"{start}, the step that training goes on from: nothing is profiled"
            )
        return self

    def before(self, step: int) -> None:
        """Call before a step is dispatched."""
        if self._steps and step == self._steps[0]:
            # JAX names a trace after its host, so processes of one host would overwrite each other.
            of_several = jax.process_count() > 1
            own = f"process_{jax.process_index()}" if of_several else ""
            jax.profiler.start_trace(str(self._folder / own))
            self._tracing = True

    def after(self, step: int, results: Any) -> None:
        """Call after a step is dispatched. Waits for `results`, only at the end of the trace."""
        if self._tracing and step == self._steps[-1]:
            # The step was only dispatched: a trace that ends now would not have it.
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            # First, so that a trace that cannot be written is not stopped again at exit.
            self._tracing = False
            with writing(self._folder):
                try:
                    jax.profiler.stop_trace()
                except jax.errors.JaxRuntimeError as error:  # raised if the trace cannot be written
                    raise OSError(str(error).partition("\n")[0]) from error
