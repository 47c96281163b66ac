"""Arguments in, one answer out: the parser, the commands, and errors as one line on stderr.

Exit codes: 0, and 2 if the question cannot be answered as it was put; `verify` also has 1, for a file that is
not sound. jsonargparse, the parser of Lightning's own command line, is needed here only (the extra `cli`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_influence.cli import advice, checking, dampings, examples, facts, loading, tables
from lightning_influence.cli.progress import progress
from lightning_influence.errors import InfluenceError
from lightning_influence.exports import WRITERS, example_columns
from lightning_influence.row_choice import DEFAULT_BYTES
from lightning_influence.store import StoreReader
from lightning_influence.trajectory import merge_segments

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

PROGRAM = "lightning-influence"
DEFAULT_K = 10
BROKEN_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: its name and arguments; None for those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: after `--help`, and with code 2 if arguments cannot be parsed.
    """
    try:
        parser = build_parser()
    except ImportError:
        return _fail(f"the command line needs jsonargparse; install it with `pip install '{PROGRAM}[cli]'`.")
    arguments = parser.parse_args(argv)
    options = arguments[arguments.subcommand]
    try:
        code = COMMANDS[arguments.subcommand].run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # as with `| head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (InfluenceError, ValueError, OSError) as error:
        if options.traceback:
            raise
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def info(options: Namespace) -> int:
    """Print what a file holds."""
    store = StoreReader(options.file)
    found = facts.facts_of(store)
    found["damping"] = advice.advice_of(store)
    _print(found, "\n".join([facts.text_of(found), advice.text_of(found["damping"])]), options.json)
    return 0


def verify(options: Namespace) -> int:
    """Check all of a file, and print what is wrong with it."""
    report = checking.check(options.file)
    print("\n".join([*report.problems, report.verdict]))
    return 1 if report.problems else 0


def top(options: Namespace) -> int:
    """Print the examples with the largest, and the smallest, scores of each query."""
    with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the answer
        queries = _ranked(options)
    _print(queries, tables.queries_text(queries), options.json)
    return 0


def _ranked(options: Namespace) -> list[dict[str, Any]]:
    """The records of each query."""
    asked = loading.asked(options) | loading.measured(options)
    influence = loading.load_influence(options)
    asked |= loading.asked_subset(options, influence.store)
    ends = {"top": True, "bottom": False} if options.bottom else {"top": True}
    queries: list[dict[str, Any]] = []
    k = options.k
    if k is None:
        k = min(DEFAULT_K, _valid_rows(influence.store, asked.get("subset")))
    for batch in loading.batches(options):
        found = {end: influence.top_k(batch, k, largest=largest, **asked) for end, largest in ends.items()}
        for row in range(len(found["top"].indices)):
            tables.check_scores(len(queries), found["top"].scores[row])
            entry: dict[str, Any] = {"query": len(queries)}
            for end, (indices, scores) in found.items():
                entry[end] = tables.records(influence.store, indices[row], score=scores[row])
            queries.append(entry)
    return queries


def _valid_rows(store: StoreReader, subset: np.ndarray | None) -> int:
    """At least 1, so that a file without any is refused as ever."""
    valid = store.column("written").astype(bool) & store.column("valid").astype(bool)
    return max(1, int((valid if subset is None else valid[subset]).sum()))


def self_influence(options: Namespace) -> int:
    """Print the examples for which the model bends most: mislabelled and atypical ones."""
    if options.top < 1:
        raise ValueError(f"`--top` must be at least 1, got {options.top}.")
    store = StoreReader(options.file)
    asked = loading.asked(options) | loading.asked_subset(options, store)
    indices, values = examples.self_influence_of(store, asked)
    best = tables.largest(values, options.top)
    found = tables.records(store, indices[best], self_influence=values[best])
    _print(found, tables.table(found), options.json)
    return 0


def export(options: Namespace) -> int:
    """Write every example's columns and self-influence, and scores if there are queries, to a table."""
    write = tables.writer_to(options.to, options.file)
    with redirect_stdout(sys.stderr):
        columns, scores = _exported(options)
    print(write(columns, scores))
    return 0


def _exported(options: Namespace) -> tuple[dict[str, np.ndarray], list[np.ndarray] | None]:
    """The columns of all examples, and scores [N] of each query if there are any."""
    asked = loading.asked(options)
    scores: list[np.ndarray] | None = None
    if not (options.checkpoint or options.model or options.data or options.measurement):
        store = StoreReader(options.file)
    else:
        measured = asked | loading.measured(options)
        influence = loading.load_influence(options)
        store, scores = influence.store, []
        for batch in loading.batches(options):
            found = influence.scores(batch, **measured)
            for row in found:
                tables.check_scores(len(scores), row)
                scores.append(row.numpy())
    columns = example_columns(store) | {"self_influence": examples.self_influence_of(store, asked)[1].numpy()}
    return columns, scores


def merge(options: Namespace) -> int:
    """Merge the segments of a file to one row an example, into a new file."""
    store = StoreReader(options.file)
    count = merge_segments(
        store,
        options.to,
        weighting=options.weighting,
        bytes_per_example=options.bytes_per_example,
        watch=lambda chunks: progress(chunks, desc="merging"),
    )
    found = StoreReader(options.to)
    print(
        f"{options.to}: {count} segments merged for the weights of segment {store.number}, "
        f"{found.attributes['rows_written']:,} rows of {found.attributes['bytes_per_row']:,} bytes, "
        f"{facts.megabytes(found.path.stat().st_size)}"
    )
    return 0


class Command:
    """A subcommand: what it does, in a line, and its arguments.

    Args:
        run: from parsed arguments to the exit code.
        about: for the list of commands; what follows is for its own help.
        add_arguments: adds them to the parser.
    """

    def __init__(
        self, run: Callable[[Namespace], int], about: str, *add_arguments: Callable[[ArgumentParser], None]
    ) -> None:
        self.run, self.about, self.add_arguments = run, about, add_arguments


def build_parser() -> ArgumentParser:
    """The parser of all commands.

    Raises:
        ImportError: without jsonargparse.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog=PROGRAM, description="Ask a file of captured gradients.")
    commands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        own = ArgumentParser(description=command.about)
        own.add_argument("file", type=str, help="the file that was captured")
        for add in command.add_arguments:
            add(own)
        own.add_argument("--config", action=ActionConfigFile, help="YAML file with arguments")
        own.add_argument("--traceback", action="store_true", help="show where an error comes from")
        commands.add_subcommand(name, own, help=command.about)
    return parser


def _json_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, with null for what is not known")


def _curvature_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--damping", type=float | str, default="1*mean", help=dampings.HELP)
    curvatures = "ekfac, kfac, diagonal, empirical_fisher or identity"
    parser.add_argument("--curvature", type=str, default="ekfac", help=curvatures)
    parser.add_argument(
        "--segments",
        type=Literal["last", "mean", "learning_rate"] | dict[int, float],
        default="last",
        help="which epochs of a file that keeps several, or {epoch: weight}",
    )

    parser.add_argument(
        "--layers",
        type=list[str] | str | None,
        help="name or pattern of the layers to sum over, or a list such as '[encoder.*, head]'; all by default",
    )


def _subset_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--subset", type=str | None, help=examples.HELP)


def _question_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=str | None, help="Lightning checkpoint with the file's weights")
    parser.add_argument("--model", type=str | None, help="module:Class of the LightningModule")
    parser.add_argument(
        "--data",
        type=str | None,
        help="module:function that returns the queries: a DataLoader, a Dataset, one batch (a tuple, mapping or "
        "tensor) or an iterable of batches, as `training_step` takes them",
    )
    parser.add_argument("--model_args", type=dict[str, Any], default={}, help="for `load_from_checkpoint`")
    parser.add_argument(
        "--measurement",
        type=str | None,
        help="module:function of (model, batch) -> [q], to ask about anything else than the log-likelihood",
    )
    parser.add_argument("--batch_size", type=int, default=32, help="of queries, where a Dataset is returned")
    parser.add_argument("--device", type=str, default="cpu", help="where to compute, such as cuda")
    parser.add_argument(
        "--weights_only",
        type=bool,
        default=True,
        help="false loads a checkpoint of more than plain values, which can run code: only if you trust it",
    )


def _top_arguments(parser: ArgumentParser) -> None:
    number = f"how many examples of each query; {DEFAULT_K}, or all if there are fewer"
    parser.add_argument("--k", type=int | None, help=number)
    parser.add_argument("--bottom", action="store_true", help="also those with the smallest scores")


def _number_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--top", type=int, default=100, help="how many examples")


def _target_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--to", type=str, required=True, help=f"where to write, ending in {', '.join(WRITERS)}")


def _merge_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--to", type=str, required=True, help="the new file")
    parser.add_argument(
        "--weighting",
        type=Literal["learning_rate", "mean"],
        default="learning_rate",
        help="of epochs: by their mean learning rates, or equally",
    )
    parser.add_argument("--bytes_per_example", type=int, default=DEFAULT_BYTES, help="budget of a merged row")


COMMANDS = {
    "info": Command(info, "what a file holds, of which weights, and how good it is", _json_arguments),
    "verify": Command(verify, "check structure, checksums and counts; exit code 1 if something is wrong"),
    "top": Command(
        top,
        "the training examples that raise each query's log-likelihood most",
        _question_arguments,
        _top_arguments,
        _curvature_arguments,
        _subset_arguments,
        _json_arguments,
    ),
    "self-influence": Command(
        self_influence,
        "the examples that bend the model most for themselves; look at their labels",
        _number_arguments,
        _curvature_arguments,
        _subset_arguments,
        _json_arguments,
    ),
    "export": Command(
        export,
        "a table of all examples with their self-influence, and scores if --data names queries",
        _target_arguments,
        _question_arguments,
        _curvature_arguments,
    ),
    "merge": Command(
        merge,
        "add up the epochs of a file that keeps several to one row an example, for the last weights",
        _merge_arguments,
    ),
}


def _print(found: Any, text: str, as_json: bool) -> None:
    print(json.dumps(tables.plain(found), indent=2, allow_nan=False) if as_json else text)
