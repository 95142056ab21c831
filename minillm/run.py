"""python -m minillm.run: minillm.programs.run."""

import sys

from minillm.programs.run import main

if __name__ == "__main__":
    sys.exit(main())
