# SPDX-License-Identifier: Apache-2.0
"""Runs several command lines of train.py one after the other in this process: what stands in each line of stdin.

Importing torch, transformers and peft takes longer than a tiny stage; the stages of one family share it.
"""

from __future__ import annotations

import json
import sys

from moellava.train.train import main

for line in sys.stdin:
    status = main(json.loads(line))
    if status:
        sys.exit(status)
