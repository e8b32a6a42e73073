# SPDX-License-Identifier: Apache-2.0
"""`deepspeed --module moellava.train …`, `torchrun -m moellava.train …`, `python -m moellava.train …`."""

import sys

from moellava.train.entry import main

sys.exit(main(sys.argv[1:]))
