"""A trained language model for EleutherAI's lm-evaluation-harness, the package lm_eval.

`harness_model(workdir)` is a model for `lm_eval.simple_evaluate(model=..., tasks=[...])`, which
`scripts/harness.py` calls.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revnet_jax.errors import UserError
from revnet_jax.training.restore import Which
from revnet_jax.training.scoring import Scorer


def harness_model(
    workdir: Path,
    which: Which = "newest",
    *,
    tokenizer: Path | None = None,
    batch_size: int = 16,
) -> Any:
    """Returns a `lm_eval.api.model.LM` of a run. Arguments and errors: see `Scorer`.

    Raises UserError if lm_eval is not installed.
    """
    base = load_harness("lm_eval.api.model").LM  # first, because restoring takes longer
    scorer = Scorer(workdir, which, tokenizer=tokenizer, batch_size=batch_size)

    # Defined here, because the package must load without lm_eval.
    class RunModel(base):
        """The requests of the harness; each has its arguments as `args`."""

        def loglikelihood(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            """The log-likelihood of a text after another, and whether it is greedy decoding's."""
            found = scorer.continuations([request.args for request in requests])
            return [(score.nats, score.is_greedy) for score in found]

        def loglikelihood_rolling(
            self, requests: Sequence[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """The log-likelihood of whole texts."""
            return [score.nats for score in scorer.texts([r.args[0] for r in requests])]

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            """Text after a prompt, until one of the strings that stop it."""
            return [
                # The number of a request is its seed, so that answers are the same in every run.
                scorer.answer(request.args[0], **_options(request.args[1], number))
                for number, request in enumerate(requests)
            ]

    return RunModel()


def load_harness(module: str) -> Any:
    """Imports a module of lm_eval. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"the evaluation harness cannot be imported ({error}): pip install 'lm_eval>=0.4.13'"
        ) from error


def _options(given: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The options of `Scorer.answer` for the generation options of a task, which may lack any.

    One that is null counts as absent.
    """
    options = {"until": [], "max_gen_toks": 256, "temperature": 1.0, "top_p": 1.0}
    options |= {name: value for name, value in given.items() if value is not None}
    # Greedy decoding unless a task asks for samples, as the harness's own models do.
    until, is_random = options["until"], given.get("do_sample", False)
    return {
        "until": [until] if isinstance(until, str) else until,
        "num_tokens": options["max_gen_toks"],
        "temperature": options["temperature"] if is_random else 0.0,
        "top_p": options["top_p"] if is_random else 1.0,
        "seed": seed,
    }
