# SPDX-License-Identifier: Apache-2.0
"""Flags, stages, trainer, checkpoints. The package can be called: `from moellava import train` is `python.train`."""

from moellava.startup import called

called(__name__, "moellava.train.python", "train")
