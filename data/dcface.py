"""DCFace's synthetic people (Kim et al. 2023), as released, as a data set of data/SCHEMA.md.

    python data/dcface.py dcface_0.5m_oversample_xid OUT --workers 4

Reads the release (record/file.rec, file.idx, list.txt) or a folder a person. Of the pictures that the release repeats
one copy is kept; the id image gets the factor `id_image` 1, the person's others 0. docs/datasets.md has the details.
"""

import functools

from anonfw.data.sources import script
from anonfw.data.sources.folders import folders
from anonfw.data.sources.id_images import mark
from anonfw.data.sources.records import dcface

LICENCE = "DCFace: as its authors state (github.com/mk-minchul/dcface); made by a generator trained on CASIA-WebFace"


def main() -> int:
    parser = script.parser(
        "Make a data set from DCFace's release.", "folder with record/file.rec, or a folder a person"
    )
    parser.add_argument("--id-image", metavar="REGEX", help="what the paths of id images have in them; else by copies")
    parser.add_argument("--keep-copies", action="store_true", help="take every copy of a repeated picture")
    args = parser.parse_args()

    def read(place):
        if place.is_file() or any(place.glob("*.rec")) or (place / "record").is_dir():
            return dcface(place, args.id_image, args.keep_copies)
        source = folders(place, "dcface")
        source.judge = functools.partial(mark, id_image=args.id_image, keep_copies=args.keep_copies)
        source.about["copies"] = "kept" if args.keep_copies else "left out"
        return source

    title = "DCFace synthetic faces, CVPR 2023, github.com/mk-minchul/dcface"
    return script.main(args, read, name="dcface", title=title, licence=LICENCE)


if __name__ == "__main__":
    raise SystemExit(main())
