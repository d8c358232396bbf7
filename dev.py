"""Entry for people who work on or try TrueFill: `python dev.py -h`."""

import sys

# Checked before anything is imported that an old Python could not even read.
if sys.version_info < (3, 10):
    sys.exit("TrueFill needs Python 3.10 or later; this is Python %d.%d." % sys.version_info[:2])

from devtools.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
