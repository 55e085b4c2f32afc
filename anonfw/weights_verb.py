"""The verb `weights`: list, fetch or verify the files of the weights table."""

from __future__ import annotations

import argparse

from anonfw import weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb `weights`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|get|verify")
    actions.add_parser("list", help="every pretrained file: state here, size, licence")
    fetching = actions.add_parser("get", help="fetch files into the cache and print their paths")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="names as printed by `list`")
    fetching.add_argument("--commercial-only", action="store_true", help="refuse files for research only")
    actions.add_parser("verify", help="check the hash of every file that is here")


def run(args: argparse.Namespace) -> int:
    """Do what the verb was asked for; the exit code."""
    if args.action == "get":
        try:
            for file in weights.get(args.names, args.commercial_only):
                print(file)
        except weights.WeightsError as error:
            weights.say(str(error))
            return 1
        return 0
    if args.action == "verify":
        rows = weights.verify()
        for row in rows:
            print(f"{row.state:<11} {row.weight.name:<26} {row.path}")
        bad = sum(row.state == "wrong hash" for row in rows)
        places = f"cache: {weights.cache_dir()}; local folder: {weights.local_dir()}"
        print(f"{len(rows)} files here, {bad} with a wrong hash; {places}")
        return 1 if bad else 0
    for row in weights.list_weights():
        use = "any use" if row.weight.commercial else "research"
        size = f"{row.weight.size / 1e6:>6.1f} MB" if row.weight.size else "        ?"
        print(f"{row.weight.name:<26} {row.state:<11} {size}  {use:<9} {row.weight.what}")
        print(f"{'':<26} licence: {row.weight.licence}")
    print(f"cache: {weights.cache_dir()}; local folder: {weights.local_dir()}")
    return 0
