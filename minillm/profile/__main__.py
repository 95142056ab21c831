import sys

from minillm.profile.make import main

sys.exit(main())
