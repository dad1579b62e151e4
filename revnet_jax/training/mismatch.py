"""Warns or stops a run when the backward pass disagrees with the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from revnet_jax.errors import UserError, tell

ACTIONS = ("warn", "stop")


class MismatchError(UserError):
    """The exactness check of a step failed, and `config.on_mismatch` is "stop"."""


class MismatchAlarm:
    """Reads the exactness check of every step, and warns or raises at the first mismatch.

    It reads metrics that are on the host already, so it costs no synchronisation.

    Args:
      action: "warn" or "stop", from `config.on_mismatch`.
      seen: mismatches of the run before this start, which were reported then.
      say: prints a line.
    """

    def __init__(self, action: str, seen: float = 0.0, say: Callable[[str], None] | None = None):
        self._action, self._seen = action, seen
        self._say = say or tell
        self._silent = False

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Checks the metrics of a step. Without the exactness check they have no `exact_...`.

        Raises MismatchError for a mismatch if the action is "stop".
        """
        total = values.get("exact_mismatches", 0.0)
        # The total never falls, and earlier starts have told of what they have seen.
        if self._silent or total <= self._seen:
            return
        line = describe_mismatch(step, total - self._seen, values)
        if self._action == "stop":
            raise MismatchError(
                f"{line}. config.on_mismatch=stop ended the run; the last checkpoint before, if "
                "any, is kept, and --config.on_mismatch=warn goes on from it"
            )
        # Once per start, because streams that drift differ at every step.
        self._silent = True
        self._say(
            f"WARNING: {line}. --config.on_mismatch=stop would end the run here; mismatches of "
            "later steps are in metrics.jsonl only"
        )


def describe_mismatch(step: int, mismatches: float, values: Mapping[str, float]) -> str:
    """One line: what differed, by how much, and what to try."""
    largest = values["exact_max_difference"]
    # Measured on the rebuilt chain input: 0 if only intermediates of a branch differed.
    by = f", by at most {largest:.3g}" if largest else ""
    return (
        f"step {step}: {mismatches:,.0f} values of the backward pass differed from the forward "
        f"pass's{by}, so its gradient is not exact. {_advice(values.get('grid_range_used'))}"
    )


def _advice(range_used):
    """What to try. range_used: the share of the grid's range in use; None without a grid."""
    otherwise = "--config.model.backprop=store or remat, which rebuild nothing"
    if range_used is None:
        return f"Streams drift without a grid: try --config.model.grid=True, or {otherwise}"
    # Beyond the range float32 has no room for the grid's bits, and sums are rounded.
    if range_used >= 1:
        return (
            f"Streams reached {range_used:.3g} times the range of the grid: try fewer "
            f"--config.model.grid_bits (one less doubles the range), or {otherwise}"
        )
    return (
        "The compiler made the backward pass round otherwise, or a branch is no pure function: "
        f"try {otherwise}"
    )
