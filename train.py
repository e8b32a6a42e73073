# SPDX-License-Identifier: Apache-2.0
"""`deepspeed train.py …`, `torchrun train.py …`, `python train.py …`: one stage of training."""

import sys

from moellava.train.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
