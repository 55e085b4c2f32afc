"""CASIA-WebFace (Yi et al. 2014) as InsightFace publishes it, 112 px crops, as a data set of data/SCHEMA.md.

    python data/casia_webface.py faces_webface_112x112 OUT --workers 4

Reads train.rec (with train.idx, train.lst and property where they are there); no MXNet is needed. The JPEGs go into the
shards byte for byte. InsightFace's other sets in this form (MS1M, VGGFace2, Glint, ...) work too: --name. An export to
a folder a person is taken as well. docs/datasets.md has the details.
"""

from anonfw.data.sources import script
from anonfw.data.sources.folders import folders
from anonfw.data.sources.records import insightface

LICENCE = "CASIA-WebFace: non-commercial research, by agreement with CASIA; the photographs belong to their owners"


def main() -> int:
    parser = script.parser(
        "Make a data set from InsightFace's CASIA-WebFace.", "folder with train.rec, or the .rec file"
    )
    parser.add_argument("--name", default="casia_webface", help="of the data set: lower-case letters, digits and _")
    parser.add_argument("--licence", default=LICENCE, help="kept in the card")
    args = parser.parse_args()

    def read(place):
        records = place.is_file() or any(place.glob("*.rec"))
        return insightface(place, args.name) if records else folders(place, args.name)

    title = (
        "CASIA-WebFace, InsightFace's 112 px crops" if args.name == "casia_webface" else f"{args.name}, aligned crops"
    )
    return script.main(args, read, name=args.name, title=title, licence=args.licence)


if __name__ == "__main__":
    raise SystemExit(main())
