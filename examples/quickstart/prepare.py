"""Makes the quickstart's model, warmed up, and its questions.

python -m examples.quickstart.prepare DIRECTORY SEED
"""

import sys
from pathlib import Path

from examples.quickstart.run import prepare

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    prepare(directory, int(sys.argv[2]), {})
