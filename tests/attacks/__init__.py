# SPDX-License-Identifier: Apache-2.0
"""Bad inputs by the thousand: a quick share of them among the tests, all of them by `python -m tests.attacks.…`."""
