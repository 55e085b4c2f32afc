"""Your own photographs, a folder a person, as a data set of data/SCHEMA.md.

    python data/image_folder.py PHOTOS OUT --name family --licence "private" --workers 2

PHOTOS/NAME/anything.jpg: the main face of each photo is found and aligned; photos without one are listed in
OUT/skipped.jsonl. Crops that are aligned already (CASIA-WebFace, DCFace and others, 112 px): --aligned.
"""

from anonfw.data import script
from anonfw.data.build import folder_people


def main() -> int:
    parser = script.parser("Make a data set from a folder a person.", "folder with PERSON/PHOTO.jpg")
    parser.add_argument("--name", default="folder", help="of the data set: lower-case letters, digits and _")
    parser.add_argument("--licence", default="not stated", help="under which the photos may be used; kept in the card")
    args = parser.parse_args()
    return script.main(args, folder_people, name=args.name, source="image folder", licence=args.licence)


if __name__ == "__main__":
    raise SystemExit(main())
