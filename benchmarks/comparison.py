"""What a benchmark that compares danlu with its peers can be told on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from danlu.hub.config import PullConfig
from danlu.hub.pull import pull


def comparison_parser(
    description: str | None, tasks: Collection[str], peers: Collection[str], elsewhere: str, meaning: str
) -> argparse.ArgumentParser:
    """The arguments that all comparisons have.

    Args:
        elsewhere, meaning: the option that names peers of other environments, and its help.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(tasks), help=f"tasks, with commas (default {','.join(tasks)})")
    parser.add_argument("--peers", default=",".join(peers), help=f"with commas (default {','.join(peers)})")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each (default 2)")
    parser.add_argument("--model", type=Path, help="GGUF file (default: danlu pull smollm2)")
    parser.add_argument(
        elsewhere, dest="elsewhere", action="append", default=[], metavar="PEER=PYTHON", type=_peer_elsewhere,
        help=meaning,
    )  # fmt: skip
    return parser


def parse_comparison(
    parser: argparse.ArgumentParser, tasks: Collection[str], peers: Collection[str]
) -> argparse.Namespace:
    """``only`` and ``peers`` as lists of known names, ``elsewhere`` as (peer, python), ``model`` as a file."""
    given = parser.parse_args()
    given.only, given.peers = given.only.split(","), given.peers.split(",")
    for names, known in ((given.only, tasks), (given.peers, peers), ([name for name, _ in given.elsewhere], peers)):
        if wrong := [name for name in names if name not in known]:
            parser.error(f"there is no {', '.join(wrong)}; choose from {', '.join(known)}")
    given.model = given.model or next(pull(PullConfig(source="smollm2")).glob("*.gguf"))
    return given


def _peer_elsewhere(text: str) -> tuple[str, str]:
    peer, equals, python = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not PEER=PYTHON, as llama.cpp=/path/bin/python")
    return peer, python
