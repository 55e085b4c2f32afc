"""Labeled Faces in the Wild (Huang et al. 2007) as a data set of data/SCHEMA.md. Research use.

    python data/lfw.py lfw OUT --alignment portrait --size 128 --factors --workers 2

Takes the official folder layout (lfw/NAME/NAME_0001.jpg), whole pictures or centre crops of them. The main face of a
photo, large and central, is the named person's. The official verification pairs are not needed here.
"""

from anonfw.data import script
from anonfw.data.build import folder_people

LICENCE = "research use, as distributed by the University of Massachusetts; the photographs belong to their agencies"


def main() -> int:
    parser = script.parser("Make a data set from Labeled Faces in the Wild.", "folder with NAME/NAME_0001.jpg")
    source = "Labeled Faces in the Wild, https://vis-www.cs.umass.edu/lfw/"
    return script.main(parser.parse_args(), folder_people, name="lfw", source=source, licence=LICENCE)


if __name__ == "__main__":
    raise SystemExit(main())
