"""python -m minillm.bench: minillm.programs.bench."""

import sys

from minillm.programs.bench import main

if __name__ == "__main__":
    sys.exit(main())
