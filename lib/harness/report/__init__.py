# SPDX-License-Identifier: GPL-2.0-only
"""An HTML report on runs, from their results folders; ``python -m harness.report`` makes it.

``saved`` reads the folders, ``tables`` and ``plots`` arrange what they have, and ``page`` fills the template with it.
"""
