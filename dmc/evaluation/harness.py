"""lm-eval's own command with the model ``dmc``:

    python -m dmc.evaluation.harness run --model dmc --model_args pretrained=DIR,policy=h2o,heavy=64,recent=64 --tasks arc_easy

Releases of lm-eval after 0.4.13 find the model by this package's entry point (group ``lm_eval.models``), so that there
``lm_eval run --model dmc ...`` does the same. 0.4.13 looks up names in a table of its own before any other package is imported;
this module registers the model first.
"""

from __future__ import annotations

from dmc.extras import needed_by_script


def main() -> None:
    """Runs lm-eval's command on the process's arguments."""
    with needed_by_script("lm-eval's command"):
        from lm_eval.__main__ import cli_evaluate

    import dmc.evaluation.lm_eval  # noqa: F401 (registers the model)

    cli_evaluate()


if __name__ == "__main__":
    main()
