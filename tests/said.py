"""A child of tests: it prints one of its variables, or sleeps.

python -P -m tests.said NAME
"""

import os
import sys
import time

SUFFIX = ""

if __name__ == "__main__":
    if sys.argv[1] == "sleep":
        time.sleep(60)
    print(os.environ[sys.argv[1]] + SUFFIX)
