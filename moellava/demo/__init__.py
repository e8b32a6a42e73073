# SPDX-License-Identifier: Apache-2.0
"""The demo: from two small base models to a sparse vision-language model that answers questions about pictures.

`moellava demo` runs it; playground/README.md in the repository describes it.
"""
