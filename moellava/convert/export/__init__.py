# SPDX-License-Identifier: Apache-2.0
"""A model as a folder that opens without moellava."""

AUTO, NATIVE, CODE, LLAVA = "auto", "native", "code", "llava"
"""Values of `--to`, beside the names of `TARGETS`: the first native target or else code; a native one; one file of
modelling code; LLaVA's layout."""
