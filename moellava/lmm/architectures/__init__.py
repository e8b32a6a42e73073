# SPDX-License-Identifier: Apache-2.0
"""One short file per released architecture; importing this package registers all of them."""

import importlib
import pkgutil

# By the folder's content, not by a list: an architecture is one file, and one that is not listed would not be missed.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
