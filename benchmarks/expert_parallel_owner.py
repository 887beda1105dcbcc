"""An owner of experts for benchmarks/expert_parallel_serving.py, on the disk that all share.

Arguments: the disk's MB/s (0 = as fast as it is) and the file that its readers share.
"""

import sys
from pathlib import Path

from paced_disk import PacedDisk

from moeyard.serving.expert_parallel.owner_process import main

if __name__ == "__main__":
    PacedDisk(float(sys.argv[1]) * 1e6 or None, Path(sys.argv[2]))
    main()
