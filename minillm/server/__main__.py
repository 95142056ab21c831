"""python -m minillm.server (or `minillm-server`): see minillm.server.serve."""

import sys

from minillm.server.serve import main

if __name__ == "__main__":
    sys.exit(main())
