"""Aligned faces in an LMDB, as a data set of data/SCHEMA.md.

    python data/lmdb_faces.py train.lmdb OUT --name webface --licence "..." --workers 4

The layouts that are known stand in anonfw/data/sources/lmdb_store.py. Needs lmdb: pip install 'anonfw[sources]'.
"""

from anonfw.data.sources import script
from anonfw.data.sources.lmdb_store import lmdb_faces


def main() -> int:
    parser = script.parser("Make a data set from an LMDB.", "folder with data.mdb, or a file")
    parser.add_argument("--name", default="lmdb", help="of the data set: lower-case letters, digits and _")
    parser.add_argument("--licence", default="not stated", help="kept in the card")
    args = parser.parse_args()

    def read(place):
        return lmdb_faces(place, args.name)

    return script.main(args, read, name=args.name, title=f"{args.name}, LMDB", licence=args.licence)


if __name__ == "__main__":
    raise SystemExit(main())
