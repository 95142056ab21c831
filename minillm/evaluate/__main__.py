import sys

from minillm.evaluate.cli import main

sys.exit(main())
