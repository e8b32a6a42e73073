# SPDX-License-Identifier: Apache-2.0
"""One short file per language model family; importing this package registers all of them."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):  # by the folder's content: a family is one file
    importlib.import_module(f"{__name__}.{_module.name}")
