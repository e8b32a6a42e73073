# SPDX-License-Identifier: Apache-2.0
"""`python -m moellava …` is `moellava …`."""

import sys

from moellava.cli import main

sys.exit(main())
