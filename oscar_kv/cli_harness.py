"""``oscar-kv lm-eval``: lm-evaluation-harness with one more model."""

from __future__ import annotations

import sys

import typer

PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness, which then knows the model oscar-hf; arguments are its own."""
    try:
        from lm_eval.__main__ import cli_evaluate

        import oscar_kv.evaluation.lm_eval  # noqa: F401  registers oscar-hf
    except ImportError as error:
        raise ValueError(f'{error}: pip install "oscar-kv[lm-eval]"') from error
    sys.argv = ["lm_eval", *context.args]
    cli_evaluate()
