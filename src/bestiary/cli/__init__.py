"""The command line: `bestiary VERB ...`, one thin file per verb: parse, call, print.

Exit codes: 0 done, 1 failed, 2 used wrongly. Errors are one clear line; `--debug` shows the traceback.
"""

import importlib
import sys

from bestiary.errors import BestiaryError, UsageError, unknown

VERBS = {
    "compare": "train several architectures on the same text and compare quality, recall, speed and memory",
    "train": "train a language model on text",
    "generate": "continue a prompt with a trained model",
    "eval": "bits per byte and perplexity of a model on a text",
    "info": "parameters, FLOPs a token and state bytes of a layout, layer by layer",
    "check": "try the laws of the contract on a mixer, also on your own",
    "doctor": "show what is installed, what runs where, and why",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        return _run(argv)
    except BestiaryError as error:
        if debug:
            raise
        print(f"bestiary: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("bestiary: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 0


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        import bestiary

        print(f"bestiary {bestiary.__version__}")
        return 0
    if argv[0] not in VERBS:
        raise unknown("verb", argv[0], VERBS)
    return importlib.import_module(f"bestiary.cli.{argv[0]}").main(argv[1:])


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [
        "usage: bestiary VERB [options]      (bestiary VERB --help explains a verb, with examples)",
        "",
        *(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()),
        "",
        "Start with:  bestiary compare",
    ]
    return "\n".join(lines)
