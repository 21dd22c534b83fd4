"""`python -m nextvit VERB ...`"""

import sys

from nextvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
