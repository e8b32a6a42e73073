# SPDX-License-Identifier: Apache-2.0
"""What a run would take and give, from its flags alone: no weight is read and no tensor made."""
