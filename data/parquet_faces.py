"""Aligned faces in the parquet layout of the Hugging Face hub, as a data set of data/SCHEMA.md.

    python data/parquet_faces.py DOWNLOAD OUT --name webface --licence "..." --workers 4

DOWNLOAD: a .parquet file or a folder with some: columns `image` ({bytes, path} or binary) and `label` (number or name).
Needs pyarrow: pip install 'anonfw[sources]'. docs/datasets.md has the details.
"""

from anonfw.data.sources import script
from anonfw.data.sources.parquet_files import parquet


def main() -> int:
    parser = script.parser("Make a data set from parquet files.", ".parquet file, or folder with such files")
    parser.add_argument("--name", default="parquet", help="of the data set: lower-case letters, digits and _")
    parser.add_argument("--licence", default="not stated", help="kept in the card")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--label-column", default="label")
    args = parser.parse_args()

    def read(place):
        return parquet(place, args.name, args.image_column, args.label_column)

    return script.main(args, read, name=args.name, title=f"{args.name}, parquet files", licence=args.licence)


if __name__ == "__main__":
    raise SystemExit(main())
